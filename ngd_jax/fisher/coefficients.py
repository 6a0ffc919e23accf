"""Coefficients of the square root A as one real vector, and back.

    ⟨a, b⟩ = Re Σ conj(a) b

A complex coefficient is two real ones, its real and its imaginary part. With this inner
product real, complex and mixed parameters and outputs are one case.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.types import Array, PyTree

__all__ = ["mean_square", "ravel_real", "real_parts", "real_size", "unravel_real"]


def ravel_real(values: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """Coefficients as one real vector, and the way back.

    Leaf by leaf as in `ravel_pytree`; of a complex leaf first all real parts, then all
    imaginary ones.
    """
    wide = tree.widen(values)
    like = jax.eval_shape(lambda: wide)
    dtype = tree.accumulator_dtype(wide)
    parts = [
        jnp.ravel(part).astype(dtype)
        for leaf in jax.tree.leaves(wide)
        for part in real_parts(leaf)
    ]
    vector = jnp.concatenate(parts) if parts else jnp.zeros(0, dtype)
    return vector, lambda vector: unravel_real(vector, like)


def real_parts(leaf: Array) -> tuple[Array, ...]:
    """A real leaf, or the real and the imaginary part of a complex one."""
    return (jnp.real(leaf), jnp.imag(leaf)) if jnp.iscomplexobj(leaf) else (leaf,)


def mean_square(leaf: Array) -> Array:
    """Squares; of a complex leaf the mean of both parts, since one number serves both.

    Real, float32 or wider.
    """
    leaf = leaf.astype(tree.wide_dtype(leaf))
    if jnp.iscomplexobj(leaf):
        return jnp.real(leaf * jnp.conj(leaf)) / 2
    return leaf**2


def unravel_real(vector: Array, like: PyTree) -> PyTree:
    """The inverse of `ravel_real`, for a tree of the shapes and dtypes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    values, start = [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape)

        def part(at: int, leaf: Any = leaf, size: int = size) -> Array:
            real = jnp.finfo(leaf.dtype).dtype
            return vector[at : at + size].reshape(leaf.shape).astype(real)

        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            values.append(jax.lax.complex(part(start), part(start + size)))
            start += 2 * size
        else:
            values.append(part(start))
            start += size
    return jax.tree.unflatten(structure, values)


def real_size(like: PyTree) -> int:
    """The length of the vector that `ravel_real` makes of such a tree."""
    return sum(
        math.prod(leaf.shape) * (1 + jnp.issubdtype(leaf.dtype, jnp.complexfloating))
        for leaf in jax.tree.leaves(like)
    )
