"""The operations that gradients of weights come out of, as sums of outer products.

    a matrix product        ∂/∂W = Σ aₜ ⊗ δₜ             over examples and places t
    a convolution           the same, aₜ a patch of the images, t its place

One factor, a, is known before the cotangents of the outputs are, and the other, δ, is
linear in them. Knows nothing of layers, parameters or metrics.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.fisher.programs import Program, join
from ngd_jax.types import Array

__all__ = ["OuterProducts", "outer_products"]


class OuterProducts(NamedTuple):
    """How a gradient is a sum of outer products.

    Attributes:
      factors: the values that a and δ are made of.
      rows: from the two factors to a `[T, m]` and δ `[T, n]`, float32 or wider.
      num_inputs: m.
      num_outputs: n.
      output_axes: those of the second factor that count outputs.
      inputs_first: whether the weight counts inputs by its first axes and outputs by
        its last ones, or the other way round.
    """

    factors: tuple[Any, Any]
    rows: Callable[[Array, Array], tuple[Array, Array]]
    num_inputs: int
    num_outputs: int
    output_axes: tuple[int, ...]
    inputs_first: bool


def outer_products(program: Program, gradient: Any) -> OuterProducts | None:
    """What a gradient, one of the results of a program, is the sum of; None if nothing.

    Args:
      program: linear in its arguments.
      gradient: of a weight.
    """
    operation = program.source(program.before_layout(gradient))
    if operation is None or len(gradient.aval.shape) < 2:
        return None
    if jnp.issubdtype(operation.outvars[0].aval.dtype, jnp.complexfloating):
        return None
    moves = [program.is_moving(x) for x in operation.invars]
    if operation.primitive.name == "dot_general" and sorted(moves) == [False, True]:
        return _of_matrices(program, gradient, operation, moves.index(False))
    if operation.primitive.name == "conv_general_dilated" and moves == [False, True]:
        return _of_images(program, gradient, operation)
    return None


def _of_matrices(
    program: Program, gradient: Any, operation: Any, still: int
) -> OuterProducts | None:
    contracted, (batch, _) = operation.params["dimension_numbers"]
    if batch:
        return None
    sizes = [
        math.prod(n for axis, n in enumerate(x.aval.shape) if axis not in axes)
        for x, axes in zip(operation.invars, contracted, strict=True)
    ]
    m, n = sizes[still], sizes[1 - still]
    # What comes out counts what is free of its left factor by its first axes.
    is_in_order = _is_in_order(program, gradient, *sizes)
    if is_in_order is None:
        return None
    inputs_first = is_in_order == (still == 0)
    if 1 in (m, n):  # no order can be told from the other
        inputs_first = gradient.aval.shape[-1] == n

    def matrix(factor: Array, side: int) -> Array:
        axes = contracted[side]
        return _matrix(jnp.moveaxis(factor, axes, range(len(axes))), sizes[side])

    def rows(a: Array, delta: Array) -> tuple[Array, Array]:
        return matrix(a, still), matrix(delta, 1 - still)

    factors = (operation.invars[still], operation.invars[1 - still])
    axes = range(len(factors[1].aval.shape))
    outputs = tuple(axis for axis in axes if axis not in contracted[1 - still])
    return OuterProducts(factors, rows, m, n, outputs, inputs_first)


def _is_in_order(
    program: Program, gradient: Any, rows: int, columns: int
) -> bool | None:
    """Whether a matrix is as it came out of its product; None where it is torn."""
    source, axes = program.layout(gradient)
    if source is not program.before_layout(gradient):
        return None
    order = join(one for axis in axes for one in axis)
    by_rows, by_columns = (rows, columns), (columns, 1)
    if order == join([by_rows, by_columns]):
        return True
    return False if order == join([by_columns, by_rows]) else None


def _of_images(program: Program, gradient: Any, operation: Any) -> OuterProducts | None:
    """The gradient of a kernel: images convolved with cotangents, summed over examples.

    gradient[c, d, i] = Σₙₕ images[c, n, i·dilation + h·stride - low] δ[d, n, h]
    """
    told = operation.params
    images, delta = operation.invars
    numbers = told["dimension_numbers"]
    groups = told["feature_group_count"], told["batch_group_count"]
    if groups != (1, 1) or any(x != 1 for x in told["lhs_dilation"]):
        return None
    # Channels, kernel positions and outputs, where each axis of the gradient has them.
    channel, output, *positions = numbers.out_spec
    axes = _axes_after_transposes(program, gradient)
    if axes is None or output not in (axes[0], axes[-1]):
        return None
    inputs_first = axes[-1] == output
    input_axes = [axis for axis in axes if axis != output]
    sizes = operation.outvars[0].aval.shape
    counts = [delta.aval.shape[axis] for axis in numbers.rhs_spec[2:]]

    def patches(images: Array) -> Array:
        """[examples, places..., what `input_axes` count...]."""
        images = images.transpose(*numbers.lhs_spec[1:], numbers.lhs_spec[0])
        ends = [
            (size - 1) * dilation + (count - 1) * stride + 1 - length - low
            for size, dilation, count, stride, length, (low, _) in zip(
                [sizes[axis] for axis in positions],
                told["window_strides"],
                counts,
                told["rhs_dilation"],
                images.shape[1:-1],
                told["padding"],
                strict=True,
            )
        ]
        config = [
            (low, end, 0) for (low, _), end in zip(told["padding"], ends, strict=True)
        ]
        padded = jax.lax.pad(
            images, jnp.zeros((), images.dtype), [(0, 0, 0), *config, (0, 0, 0)]
        )
        stacked = padded
        # One axis after the other: strided slices, since a convolution that only copies
        # is slow inside of loops on a CPU.
        for place in range(len(positions)):
            size, stride = sizes[positions[place]], told["rhs_dilation"][place]
            dilation, span = told["window_strides"][place], (counts[place] - 1) * stride
            slices = [
                jax.lax.slice_in_dim(
                    stacked, i * dilation, i * dilation + span + 1, stride, 1 + place
                )
                for i in range(size)
            ]
            stacked = jnp.stack(slices, axis=-1)
        # Now [examples, places..., channels, positions...].
        first = 1 + len(positions)
        order = {channel: first}
        order |= {axis: first + 1 + k for k, axis in enumerate(positions)}
        return stacked.transpose(*range(first), *(order[axis] for axis in input_axes))

    def rows(images: Array, delta: Array) -> tuple[Array, Array]:
        # Examples, places, outputs.
        delta = delta.transpose(*numbers.rhs_spec[1:], numbers.rhs_spec[0])
        return _matrix(patches(images), m), _matrix(delta, n)

    m, n = math.prod(sizes[axis] for axis in input_axes), sizes[output]
    outputs = (numbers.rhs_spec[0],)
    return OuterProducts((images, delta), rows, m, n, outputs, inputs_first)


def _axes_after_transposes(program: Program, variable: Any) -> list[int] | None:
    """Which axis of the result of a convolution each axis of a value is."""
    operation = program.source(variable)
    if operation.primitive.name == "conv_general_dilated":
        return list(range(len(variable.aval.shape)))
    before = _axes_after_transposes(program, operation.invars[0])
    if before is None or operation.primitive.name in ("convert_element_type", "copy"):
        return before
    if operation.primitive.name == "transpose":
        return [before[axis] for axis in operation.params["permutation"]]
    return None


def _matrix(values: Array, columns: int) -> Array:
    return values.reshape(-1, columns).astype(tree.wide_dtype(values))
