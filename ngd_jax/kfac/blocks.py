"""Factors that are block-diagonal, or kept in a narrow dtype.

    A ≈ diag(A₁, …, A_B),    (A + ε)⁻¹ ≈ Wᵀ W,    W = diag(L₁⁻¹, …, L_B⁻¹)

with A_b + ε = L_b L_bᵀ. A rounded inverse need not be positive definite, but Wᵀ W is,
for any triangular W without a zero on its diagonal, however it was rounded. Rounding A
costs damping: entries move by at most u √(aᵢᵢ aⱼⱼ), and eigenvalues, for errors of
random signs, by at most 2 u √n times the diagonal. Knows nothing of models and batches.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.types import Array

__all__ = [
    "BlockRoots",
    "Blocks",
    "block_gram",
    "inverse_roots",
    "multiply",
    "trace",
    "zero_blocks",
]


class Blocks(NamedTuple):
    """Blocks `[..., B, b, b]` on the diagonal of each factor, the last one padded."""

    values: Array


class BlockRoots(NamedTuple):
    """W of each factor, in the same blocks."""

    values: Array


def _layout(size: int, max_block: int) -> tuple[int, int]:
    """The number of blocks and their side, with room for a bias."""
    count = -(-size // max_block)
    return count, -(-(size + 1) // count)


def zero_blocks(count: int, size: int, max_block: int, dtype: Any) -> Blocks:
    """Of `count` factors with sides of that size."""
    num_blocks, side = _layout(size, max_block)
    return Blocks(jnp.zeros((count, num_blocks, side, side), dtype))


def block_gram(rows: Array, size: int, max_block: int) -> Blocks:
    """Σ row rowᵀ of rows `[N, size]` or, with a bias, one longer; block by block."""
    num_blocks, side = _layout(size, max_block)
    rows = jnp.pad(rows, ((0, 0), (0, num_blocks * side - rows.shape[1])))
    parts = [
        tree.contract(part, part, (0,), (0,)) for part in jnp.split(rows, num_blocks, 1)
    ]
    return Blocks(jnp.stack(parts))


def trace(blocks: Blocks | BlockRoots) -> Array:
    """The trace of each factor."""
    return jnp.einsum("kbii->k", tree.widen(blocks.values))


def inverse_roots(blocks: Blocks, shift: Array, dtype: Any) -> BlockRoots:
    """W for each A and ε; of the diagonal of A where A + ε has no root."""
    values, num_blocks = tree.widen(blocks.values), blocks.values.shape[1]
    side = values.shape[-1]
    identity = jnp.eye(side, dtype=values.dtype)
    # Of float32 this is less than what `shift` has already.
    share = 2 * side**0.5 * float(jnp.finfo(blocks.values.dtype).eps) / 2

    def one(block: Array, shift: Array) -> Array:
        diagonal = jnp.diagonal(block)
        damped = block + jnp.diag(share * diagonal + shift)
        # LAPACK is column-major: transposing a symmetric matrix saves a copy.
        root = jax.lax.linalg.cholesky(damped.T, symmetrize_input=False)
        inverse = jax.lax.linalg.triangular_solve(
            root, identity, left_side=True, lower=True
        )
        crude = jnp.diag(jax.lax.rsqrt(diagonal + shift))
        return jnp.where(jnp.isfinite(inverse[-1, -1]), inverse, crude).astype(dtype)

    flat = values.reshape(-1, side, side)
    shifts = jnp.repeat(shift, num_blocks)
    # One at a time: one program for all, and no batched LAPACK, which hung.
    roots = jax.lax.map(lambda pair: one(*pair), (flat, shifts))
    return BlockRoots(roots.reshape(values.shape))


def multiply(roots: BlockRoots, values: Array, axis: int) -> Array:
    """Wᵀ W of each factor times matrices `[K, r, c]`, along their `axis`, 1 or 2."""
    w = roots.values.astype(values.dtype)
    num_blocks, side = w.shape[1:3]
    moved = jnp.moveaxis(values, axis, 1)
    length, others = moved.shape[1:]
    moved = jnp.pad(moved, ((0, 0), (0, num_blocks * side - length), (0, 0)))
    moved = moved.reshape(-1, num_blocks, side, others)
    highest = jax.lax.Precision.HIGHEST
    for matrix in (w, jnp.swapaxes(w, 2, 3)):
        moved = jnp.matmul(matrix, moved, precision=highest)
    moved = moved.reshape(-1, num_blocks * side, others)[:, :length]
    return jnp.moveaxis(moved, 1, axis)
