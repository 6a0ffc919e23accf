"""Vectors kept in order to stay orthogonal to them, in tree space.

    v <- v - Q Qᵀ v,    Q the vectors so far

The short recurrences of Lanczos and of Golub and Kahan lose the orthogonality that they
have on paper as soon as a singular value is found, and then find it again and again.
"""

import functools

import jax
import jax.numpy as jnp

from ngd_jax.types import Array, PyTree

__all__ = ["empty", "project_out", "remember"]


def empty(like: PyTree, size: int) -> PyTree:
    """Room for `size` vectors; () for none, which stays () below."""
    if size == 0:
        return ()
    return jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), like)


def remember(basis: PyTree, vector: PyTree, index: int | Array) -> PyTree:
    """Writes a vector into the place `index`, modulo the size."""
    if isinstance(basis, tuple):
        return ()
    return jax.tree.map(
        lambda rows, leaf: rows.at[index % len(rows)].set(leaf), basis, vector
    )


def project_out(basis: PyTree, vector: PyTree) -> PyTree:
    """Subtracts Σ q Re⟨q, v⟩ over the vectors q of the basis, twice.

    Once leaves what cancellation leaves, and the basis would lose its orthogonality
    faster than without; twice is enough (Kahan, in Parlett 1980, section 6-9).
    """
    if isinstance(basis, tuple):
        return vector
    contract = functools.partial(jnp.tensordot, precision=jax.lax.Precision.HIGHEST)

    def product(rows: Array, leaf: Array) -> Array:
        return jnp.real(contract(jnp.conj(rows), leaf, leaf.ndim))

    for _ in range(2):
        parts = map(product, jax.tree.leaves(basis), jax.tree.leaves(vector))
        products = functools.reduce(jnp.add, parts)
        vector = jax.tree.map(
            lambda rows, leaf, c=products: (
                leaf - contract(c.astype(rows.dtype), rows, 1)
            ),
            basis,
            vector,
        )
    return vector
