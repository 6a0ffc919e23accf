"""Trees as real vectors, in which real, complex and mixed ones are one case.

    ⟨a, b⟩ = Re Σ conj(a) b

Leaf by leaf; of a complex leaf first all real parts, then all imaginary parts.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ngd_jax import tree
from ngd_jax.types import Array, ArrayLike, PyTree

__all__ = ["random_signs", "ravel_real", "real_parts", "real_size", "unravel_real"]


def ravel_real(values: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """A tree as one real vector, and the way back.

        ⟨a, b⟩ = Re Σ conj(a) b

    Leaf by leaf as in `jax.flatten_util.ravel_pytree`; a complex leaf is all its real
    parts, then all its imaginary parts. With this inner product real, complex and mixed
    trees are one case.

    Returns:
      The vector, float32 or wider, and a function from such vectors to trees of the
      structure of `values`, likewise float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> vector, unravel = ravel_real({"a": jnp.array([1 + 2j]), "b": jnp.ones(1)})
      >>> vector
      Array([1., 2., 1.], dtype=float32)
    """
    wide = tree.replicate(tree.widen(values))
    like = jax.eval_shape(lambda: wide)
    dtype = tree.accumulator_dtype(wide)
    parts = [
        jnp.ravel(part).astype(dtype)
        for leaf in jax.tree.leaves(wide)
        for part in real_parts(leaf)
    ]
    vector = jnp.concatenate(parts) if parts else jnp.zeros(0, dtype)
    return vector, lambda vector: unravel_real(vector, like)


def unravel_real(vector: Array, like: PyTree) -> PyTree:
    """The inverse of `ravel_real`, for a tree of the shapes and dtypes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    values, start = [], 0
    for leaf in leaves:
        count = math.prod(leaf.shape)
        is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        parts = []
        for _ in range(1 + is_complex):
            part = vector[start : start + count].reshape(leaf.shape)
            parts.append(part.astype(jnp.finfo(leaf.dtype).dtype))
            start += count
        values.append(jax.lax.complex(*parts) if is_complex else parts[0])
    return jax.tree.unflatten(structure, values)


def real_parts(leaf: Array) -> tuple[Array, ...]:
    """A real leaf, or the real and the imaginary part of a complex one."""
    return (jnp.real(leaf), jnp.imag(leaf)) if jnp.iscomplexobj(leaf) else (leaf,)


def real_size(like: PyTree) -> int:
    """The length of the vector that `ravel_real` makes from such a tree."""
    return sum(
        math.prod(leaf.shape) * (1 + jnp.issubdtype(leaf.dtype, jnp.complexfloating))
        for leaf in jax.tree.leaves(like)
    )


def random_signs(like: PyTree, count: ArrayLike | None = None) -> PyTree:
    """±1 from a hash of the position (and a number), in both parts of complex leaves.

    Any signs that are independent of the data and of each other will do; this takes one
    kernel, a random number generator many. The hash is the finalizer of MurmurHash3, in
    which every input bit flips every output bit in half of all cases.
    """

    def mixed(bits: Array) -> Array:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ (bits >> shift)) * np.uint32(factor)
        return bits ^ (bits >> 16)

    bits = mixed(jnp.arange(real_size(like), dtype=jnp.uint32))
    if count is not None:
        bits = mixed(bits + mixed(jnp.asarray(count, jnp.uint32) + np.uint32(1)))
    return unravel_real(1 - 2 * (bits & 1).astype(jnp.float32), like)
