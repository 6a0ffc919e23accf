"""Convolutions whose derivatives are as fast inside a loop as outside, on CPUs.

    y = x * k        dx = dy ⋆ k        dk = x ⋆ dy

XLA's CPU compiler has a fast routine for convolutions with one particular order of
axes. At the top level of a program it brings other orders into that one; inside `scan`,
`cond` and `while_loop` it does not, and compiles them to plain loops, some twenty times
slower. JAX's own transposes of a convolution use other orders. Those written here use
the fast one, so that conjugate gradients, and many steps per dispatch, cost what they
should.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, linear_call

__all__ = ["Conv", "convolve"]

# The fast order of axes: images [B, H, W, C], kernels [H, W, C, D].
_ORDER = ("NHWC", "HWIO", "NHWC")

Pads = tuple[tuple[int, int], ...]


class Conv(nn.Module):
    """`nn.Conv(..., padding="SAME", use_bias=False)`: same parameters, same values.

    Attributes:
      features: channels of the output.
      kernel_size: height and width of the kernel.
      strides: of both axes.
    """

    features: int
    kernel_size: Sequence[int]
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `[B, H', W', features]` for images `[B, H, W, C]`."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return convolve(x, kernel, self.strides)


def convolve(x: jax.Array, kernel: jax.Array, strides: int = 1) -> jax.Array:
    """Returns x * kernel with zero padding: H' = ⌈H / strides⌉, W' likewise.

    Supports first derivatives in both modes, and transposes of tangents, as products
    with the Fisher matrix need them; not second derivatives, and not `vmap`.

    Args:
      x: images `[B, H, W, C]`.
      kernel: `[h, w, C, D]`.
      strides: of both axes.
    """
    pads = tuple(
        _pads(size, length, strides)
        for size, length in zip(x.shape[1:3], kernel.shape[:2], strict=True)
    )

    @jax.custom_jvp
    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _convolve(x, kernel, pads, strides=strides)

    def tangent(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> Any:
        (x, kernel), (dx, dk) = primals, tangents
        y = product(x, kernel)
        terms = [
            of_one(fixed, moved)
            for of_one, fixed, moved in (
                (_linear_in_images(x.shape, pads, strides), kernel, dx),
                (_linear_in_kernels(kernel.shape, pads, strides), x, dk),
            )
            if not isinstance(moved, SymbolicZero)
        ]
        return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)

    product.defjvp(tangent, symbolic_zeros=True)
    return product(x, kernel)


def _linear_in_images(
    shape: Sequence[int], pads: Pads, strides: int
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def transpose(kernel: jax.Array, dy: jax.Array) -> jax.Array:
        # Zeros between the entries of dy, and around them up to the shape of x.
        around = [
            (length - 1 - low, size + low - (count - 1) * strides - 1)
            for size, length, count, (low, _) in zip(
                shape[1:3], kernel.shape[:2], dy.shape[1:3], pads, strict=True
            )
        ]
        mirrored = kernel[::-1, ::-1].swapaxes(2, 3)
        return _convolve(dy, mirrored, around, x_dilation=strides)

    def of_images(kernel: jax.Array, dx: jax.Array) -> jax.Array:
        return _convolve(dx, kernel, pads, strides=strides)

    return lambda kernel, dx: linear_call(of_images, transpose, kernel, dx)


def _linear_in_kernels(
    shape: Sequence[int], pads: Pads, strides: int
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def transpose(x: jax.Array, dy: jax.Array) -> jax.Array:
        # The sum is over examples, so they take the place of the channels.
        around = [
            (low, (count - 1) * strides + length - size - low)
            for size, length, count, (low, _) in zip(
                x.shape[1:3], shape[:2], dy.shape[1:3], pads, strict=True
            )
        ]
        images, kernel = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
        dk = _convolve(images, kernel, around, kernel_dilation=strides)
        return dk.transpose(1, 2, 0, 3)

    def of_kernels(x: jax.Array, dk: jax.Array) -> jax.Array:
        return _convolve(x, dk, pads, strides=strides)

    return lambda x, dk: linear_call(of_kernels, transpose, x, dk)


def _convolve(
    x: jax.Array,
    kernel: jax.Array,
    pads: Sequence[tuple[int, int]],
    *,
    strides: int = 1,
    x_dilation: int = 1,
    kernel_dilation: int = 1,
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        pads,
        lhs_dilation=(x_dilation, x_dilation),
        rhs_dilation=(kernel_dilation, kernel_dilation),
        dimension_numbers=_ORDER,
    )


def _pads(size: int, length: int, strides: int) -> tuple[int, int]:
    """Zeros before and after an axis, as for "SAME" padding."""
    count = -(-size // strides)
    total = max((count - 1) * strides + length - size, 0)
    return total // 2, total - total // 2
