"""The square root A of the Fisher as a matrix, `[M, P]`, F = Aᵀ A, and F from it.

    row i:  Aᵀ eᵢ, one backward pass for each example and output, or
    column j:  A eⱼ, one `jvp` over the batch for each parameter

For F the rows of some examples at a time do, and one half of their products.

The condition number of A is the square root of that of F, so that what is solved with A
keeps the digits that F has lost.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngd_jax import tree
from ngd_jax.fisher.coefficients import ravel_real, real_parts
from ngd_jax.fisher.gram import MEMORY
from ngd_jax.fisher.outer_squares import square_by_factors
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

__all__ = ["FEW_ROWS", "dense_root", "sum_of_squares"]

# Examples whose rows, or parameters whose columns, are made at once.
_CHUNK = 256
_BASIS_CHUNK = 32
# Rows of an example up to which F from rows is cheaper than by columns, of which each
# is a product with F.
FEW_ROWS = 4
# Of columns of F, below whose diagonal blocks nothing is computed twice; and the least
# number of parameters for which that is worth its own cost.
_PANELS = 2
_FEW_PARAMS = 128


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


def sum_of_squares(fisher: "Fisher", dtype: Any = None) -> tuple[Array, Array] | None:
    """F = Aᵀ A from the rows; real, `[P, P]`.

    By pairs of inputs and cotangents, where rows are outer products that fit into
    memory; else by the rows of a block of examples after the other.

    Args:
      fisher: whose F.
      dtype: of the products; None for that of the parameters, float32 or wider.

    Returns:
      F, and whether the model is separable over examples, so that it is right; None
      where F by columns is cheaper, or where parameters are complex.

    Raises:
      NoRowsError: where there are no rows.
    """
    if any(map(jnp.iscomplexobj, jax.tree.leaves(fisher.params))):
        return None
    dtype = tree.accumulator_dtype(fisher.params) if dtype is None else dtype
    groups = row_groups(fisher)
    if any(group.rows_per_example > FEW_ROWS for group in groups):
        return None
    if (found := square_by_factors(fisher, dtype, MEMORY)) is not None:
        return found
    size = tree.size(fisher.params)
    count = _PANELS if size >= _FEW_PARAMS else 1
    ends = [size * (panel + 1) // count for panel in range(count)]
    starts = [0, *ends[:-1]]
    panels = [
        jnp.zeros((end - start, end), dtype)
        for start, end in zip(starts, ends, strict=True)
    ]
    apart = []
    for group in groups:

        def add(panels: list[Array], rows: Array) -> list[Array]:
            return [
                panel + _product(rows[:, start:end].T, rows[:, :end])
                for panel, start, end in zip(panels, starts, ends, strict=True)
            ]

        panels, differences = _fold_blocks(group, dtype, add, panels)
        apart.append(differences)
    # What is above the diagonal blocks is what is below them.
    lower = jnp.concatenate(
        [jnp.pad(x, ((0, 0), (0, size - x.shape[1]))) for x in panels]
    )
    matrix = jnp.tril(lower) + jnp.tril(lower, -1).T
    return matrix, agreement(groups, apart)


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _fold_blocks(
    group: Group, dtype: Any, add: Callable[..., Any], total: Any
) -> tuple[Any, list[Array]]:
    """`add` over blocks of rows, and how far examples are apart at most."""
    size = min(_CHUNK, group.size)
    whole = group.size // size * size

    def step(carry: Any, start: Array | int, size: int = size) -> tuple[Any, None]:
        total, largest = carry
        rows, differences = _block_rows(group, dtype, start, size)
        largest = jax.tree.map(jnp.maximum, largest, differences)
        return (add(total, rows), largest), None

    carry = (total, group.zero_apart())
    carry, _ = jax.lax.scan(step, carry, jnp.arange(0, whole, size))
    if whole < group.size:
        carry, _ = step(carry, whole, size=group.size - whole)
    return carry


def _block_rows(
    group: Group, dtype: Any, start: Array | int, size: int
) -> tuple[Array, list[Array]]:
    """The rows of `size` examples from `start` on, and how far apart they are."""
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


def _group_rows(group: Group, dtype: Any) -> tuple[Array, list[Array]]:
    if group.size <= _CHUNK:
        return _block_rows(group, dtype, 0, group.size)
    # The last block is as long as the others and overlaps its neighbour.
    count = -(-group.size // _CHUNK)
    size = -(-group.size // count)
    starts = jnp.minimum(jnp.arange(count) * size, group.size - size)
    blocks, apart = jax.lax.map(
        lambda start: _block_rows(group, dtype, start, size), starts
    )
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
