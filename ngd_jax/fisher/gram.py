"""The Gram matrix G = A Aᵀ of the samples, block by block of examples.

    Gᵢⱼ = ⟨Aᵀeᵢ, Aᵀeⱼ⟩,    F = Aᵀ A,    (F + λI)⁻¹ Aᵀ = Aᵀ (G + λI)⁻¹

For M coefficients and P parameters G takes 2M²P operations. The rows Aᵀeᵢ of two blocks
of examples are held at a time, and those of the second are made again for every first:
with m rows in a block that costs about 4mP against the 2m²P of the product. No array of
size M times P exists unless it fits the memory that is allowed. Where rows are mostly
outer products, as those of dense layers, all are held as such, and G is far cheaper.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngd_jax import tree
from ngd_jax.arguments import check_count
from ngd_jax.fisher.coefficients import real_parts
from ngd_jax.fisher.outer_products import factored_gram, find_factors
from ngd_jax.fisher.rows import Group, agreement, coefficient_order, row_groups
from ngd_jax.types import Array, Params

if TYPE_CHECKING:
    from ngd_jax.fisher.operator import Fisher

__all__ = ["MEMORY", "Gram", "gram_matrix"]

# What the rows in memory may take where no `block_size` is given, in bytes.
MEMORY = 512 * 2**20
# Rows in a block where they fit: wide enough for matrix products at full speed, narrow
# enough that the symmetry of G saves most of half the work.
_BLOCK_ROWS = 256


class Gram(NamedTuple):
    """The Gram matrix of the samples.

    Attributes:
      matrix: A Aᵀ, `[M, M]`, symmetric to round-off, float32 or wider.
      is_separable: False where the model mixes its examples, so that `matrix` is not
        what it should be.
    """

    matrix: Array
    is_separable: Array


def gram_matrix(fisher: "Fisher", block_size: int | None = None) -> Gram:
    """A Aᵀ; see `Fisher.gram`."""
    if block_size is not None:
        check_count("block_size", block_size)
    dtype = tree.accumulator_dtype((fisher.params, fisher.outputs))
    if block_size is None and (gram := _by_factors(fisher, dtype)) is not None:
        return gram
    groups = row_groups(fisher)
    row_bytes = _row_bytes(fisher.params)
    sizes = [_block_size(group, block_size, row_bytes) for group in groups]
    matrix, apart = _by_blocks(groups, sizes, dtype)
    order = coefficient_order(groups, fisher.likelihood)
    return Gram(_reorder(matrix, order), agreement(groups, apart))


def _by_factors(fisher: "Fisher", dtype: Any) -> Gram | None:
    """G by outer products; None where rows are not such, or do not fit into memory."""
    found = find_factors(fisher, dtype, MEMORY)
    if found is None:
        return None
    gram = factored_gram(found.rows, found.root)
    order = coefficient_order([found.group], fisher.likelihood)
    return Gram(_reorder(gram, order), agreement([found.group], [found.apart]))


def _reorder(matrix: Array, order: np.ndarray) -> Array:
    if np.any(order != np.arange(len(order))):
        return matrix[order[:, None], order[None, :]]
    return matrix


def _row_bytes(params: Params) -> int:
    shapes = jax.tree.leaves(jax.eval_shape(tree.widen, params))
    return sum(x.size * x.dtype.itemsize for x in shapes)


def _block_size(group: Group, block_size: int | None, row_bytes: int) -> int:
    if block_size is None:
        # Two blocks are held while their product is taken.
        most = min(_BLOCK_ROWS, MEMORY // max(1, 2 * row_bytes))
        block_size = most // max(1, group.rows_per_example)
    block_size = min(max(1, block_size), group.size)
    # As many blocks, but all of about one size, so that they overlap the least.
    return -(-group.size // -(-group.size // block_size))


def _rows(group: Group, data: Any) -> tuple[list[Array], Params]:
    """The rows of the examples in `data`, with one leading axis."""
    apart, rows = group.map(lambda row, units: jax.vmap(row)(units), data)
    return apart, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


def _products(left: Params, right: Params, dtype: Any) -> Array:
    """Re ⟨rowᵢ, rowⱼ⟩ for all rows of both."""
    count = [jax.tree.leaves(rows)[0].shape[0] for rows in (left, right)]
    total = jnp.zeros(count, dtype)
    for x_leaf, y_leaf in zip(
        jax.tree.leaves(left), jax.tree.leaves(right), strict=True
    ):
        for x, y in zip(real_parts(x_leaf), real_parts(y_leaf), strict=True):
            # Over all axes of the parameter: flattened, a sharded one would move.
            axes = tuple(range(1, x.ndim))
            product = jax.lax.dot_general(
                x, y, ((axes, axes), ((), ())), precision=jax.lax.Precision.HIGHEST
            )
            total += product.astype(dtype)
    return total


def _by_blocks(
    groups: list[Group], sizes: list[int], dtype: Any
) -> tuple[Array, list[list[Array]]]:
    counts = [group.size * group.rows_per_example for group in groups]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    matrix, apart = jnp.zeros((sum(counts),) * 2, dtype), []

    def start_of(i: int, block: Array | int) -> Array:
        # The last block is as long as the others and overlaps its neighbour: the same
        # products are written twice, and no block is a special case.
        return jnp.minimum(block * sizes[i], groups[i].size - sizes[i])

    def place(i: int, block: Array | int) -> Array:
        return offsets[i] + start_of(i, block) * groups[i].rows_per_example

    def num_blocks(i: int) -> int:
        return -(-groups[i].size // sizes[i])

    def loop(count: Any, body: Any, carry: Any) -> Any:
        # One turn needs no loop to be compiled.
        return (
            body(0, carry) if count == 1 else jax.lax.fori_loop(0, count, body, carry)
        )

    for i, group in enumerate(groups):

        def add_block(block: Array | int, carry: Any, i: int = i) -> Any:
            matrix, largest = carry
            group = groups[i]
            data = group.take(start_of(i, block), sizes[i])
            differences, left = _rows(group, data)
            largest = jax.tree.map(jnp.maximum, largest, differences)
            here = place(i, block)
            square = _products(left, left, dtype)
            square = (square + square.T) / 2
            matrix = jax.lax.dynamic_update_slice(matrix, square, (here, here))

            for j in range(i + 1):

                def add_pair(other: Array | int, matrix: Array, j: int = j) -> Array:
                    data = groups[j].take(start_of(j, other), sizes[j])
                    _, right = _rows(groups[j], data)
                    product = _products(left, right, dtype)
                    there = place(j, other)
                    # Both at once, so that overlaps stay symmetric.
                    matrix = jax.lax.dynamic_update_slice(
                        matrix, product, (here, there)
                    )
                    return jax.lax.dynamic_update_slice(
                        matrix, product.T, (there, here)
                    )

                if j < i:
                    matrix = loop(num_blocks(j), add_pair, matrix)
                elif num_blocks(i) > 1:
                    matrix = jax.lax.fori_loop(0, block, add_pair, matrix)
            return matrix, largest

        matrix, differences = loop(
            num_blocks(i), add_block, (matrix, group.zero_apart())
        )
        apart.append(differences)
    return matrix, apart
