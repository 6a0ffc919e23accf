"""The square root A of the Fisher as a matrix, `[M, P]`, F = Aᵀ A.

    row i:  Aᵀ eᵢ, one backward pass for each example and output, or
    column j:  A eⱼ, one `jvp` over the batch for each parameter

The condition number of A is the square root of that of F, so that what is solved with A
keeps the digits that F has lost.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngd_jax import tree
from ngd_jax.fisher.coefficients import ravel_real, real_parts
from ngd_jax.fisher.rows import (
    Group,
    NoRowsError,
    agreement,
    coefficient_order,
    row_groups,
)
from ngd_jax.types import Array

if TYPE_CHECKING:
    from ngd_jax.fisher.operator import Fisher

__all__ = ["dense_root"]

# Examples whose rows, or parameters whose columns, are made at once.
_CHUNK = 256
_BASIS_CHUNK = 32


class _Rows(NamedTuple):
    """All rows, and whether they are right: False where the model mixes examples."""

    matrix: Array
    is_separable: Array


def dense_root(fisher: "Fisher") -> Array:
    """A; see `Fisher.dense_root`."""
    try:
        rows = _from_rows(fisher)
    except NoRowsError:
        return _from_columns(fisher)
    return jax.lax.cond(
        rows.is_separable, lambda: rows.matrix, lambda: _from_columns(fisher)
    )


def _from_rows(fisher: "Fisher") -> _Rows:
    groups = row_groups(fisher)
    dtype = tree.accumulator_dtype((fisher.params, fisher.outputs))
    parts, apart = [], []
    for group in groups:
        rows, differences = _group_rows(group, dtype)
        parts.append(rows)
        apart.append(differences)
    matrix = jnp.concatenate(parts)
    order = coefficient_order(groups, fisher.likelihood)
    if np.any(order != np.arange(len(order))):
        matrix = matrix[order]
    return _Rows(matrix, agreement(groups, apart))


def _group_rows(group: Group, dtype: Any) -> tuple[Array, list[Array]]:
    def block(start: Array | int, size: int) -> tuple[Array, list[Array]]:
        data = group.take(start, size)
        apart, rows = group.map(lambda row, units: jax.vmap(row)(units), data)
        # [examples, rows of each, parameter] for every leaf; complex ones as two.
        flat = [
            part.reshape(*part.shape[:2], -1).astype(dtype)
            for leaf in jax.tree.leaves(rows)
            for part in real_parts(leaf)
        ]
        matrix = jnp.concatenate(flat, axis=-1)
        return matrix.reshape(-1, matrix.shape[-1]), apart

    if group.size <= _CHUNK:
        return block(0, group.size)
    # The last block is as long as the others and overlaps its neighbour.
    count = -(-group.size // _CHUNK)
    size = -(-group.size // count)
    starts = jnp.minimum(jnp.arange(count) * size, group.size - size)
    blocks, apart = jax.lax.map(lambda start: block(start, size), starts)
    whole = blocks[:-1].reshape(-1, blocks.shape[-1])
    overlap = count * size - group.size
    last = blocks[-1][overlap * group.rows_per_example :]
    return jnp.concatenate([whole, last]), [jnp.max(x) for x in apart]


def _from_columns(fisher: "Fisher") -> Array:
    vector, unravel = ravel_real(tree.zeros_like_wide(fisher.params))
    dtype = tree.accumulator_dtype((fisher.params, fisher.outputs))

    def column(index: Array) -> Array:
        unit = jnp.zeros_like(vector).at[index].set(1)
        return ravel_real(fisher.sqrt_matvec(unravel(unit)))[0].astype(dtype)

    indices = jnp.arange(vector.size)
    return jax.lax.map(column, indices, batch_size=_BASIS_CHUNK).T
