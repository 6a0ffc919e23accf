"""F = Aᵀ A from rows that are outer products, by pairs of inputs and of cotangents.

    Σ (a ⊗ δ)(a ⊗ δ)ᵀ  at (i, k), (j, l):    Σ aᵢ aⱼ · δₖ δₗ

Both factors are symmetric, so that of a layer with m inputs and n outputs the products
of m(m + 1)/2 pairs with n(n + 1)/2 pairs are all that there is to it: a quarter of the
operations of AᵀA, and however many coefficients an example has, since the pairs of
their δ are summed first.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngd_jax import tree
from ngd_jax.fisher.outer_products import PASS, FactoredRows, Layer, find_factors
from ngd_jax.fisher.rows import agreement
from ngd_jax.types import Array

if TYPE_CHECKING:
    from ngd_jax.fisher.operator import Fisher

__all__ = [
    "Multiplications",
    "count_multiplications",
    "factored_square",
    "square_by_factors",
]


def square_by_factors(
    fisher: "Fisher", dtype: Any, memory: int
) -> tuple[Array, Array] | None:
    """F, `[P, P]`, and whether the model is separable over examples.

    Args:
      fisher: of a model with real parameters.
      dtype: of the result.
      memory: bytes that rows and pairs may take.

    Returns:
      None where rows are no outer products, or do not fit into memory.
    """
    found = find_factors(fisher, dtype, memory)
    if found is None or not _fits(found.rows, memory):
        return None
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(fisher.params)]
    matrix = factored_square(found.rows, found.layers, sizes, found.root)
    return matrix, agreement([found.group], [found.apart])


class Multiplications(NamedTuple):
    """What products of rows cost that are outer products.

    Attributes:
      gram: for the product of two rows.
      square: for what one row adds to AᵀA; None where pairs do not fit into memory.
    """

    gram: int
    square: int | None


def count_multiplications(fisher: "Fisher", memory: int) -> Multiplications | None:
    """The cost of AAᵀ and of AᵀA; None where rows are no outer products.

    Args:
      fisher: whose A; nothing is computed.
      memory: bytes that rows and pairs may take.

    Raises:
      NoRowsError: where there are no rows.
    """
    found: list[Multiplications] = []

    def count() -> None:
        factors = find_factors(fisher, tree.accumulator_dtype(fisher.params), memory)
        if factors is None:
            return
        num_before = num_rest = factors.rows.dense.shape[-1]
        gram, square = num_rest, num_rest**2
        for a, delta in factors.rows.outer:
            m, n = a.shape[-1], delta.shape[-1]
            gram += m + n + PASS
            square += _num_pairs(m) * _num_pairs(n) + num_before * m * n
            num_before += m * n
        fits = _fits(factors.rows, memory)
        found.append(Multiplications(gram, square if fits else None))

    jax.eval_shape(count)
    return found[0] if found else None


def _fits(rows: FactoredRows, memory: int) -> bool:
    count, units, num_numbers = rows.dense.shape
    for a, delta in rows.outer:
        m, n = a.shape[-1], delta.shape[-1]
        num_numbers += m * n + (_num_pairs(m) + _num_pairs(n)) // units
    return num_numbers * count * units * rows.dense.dtype.itemsize <= memory


def factored_square(
    rows: FactoredRows, layers: list[Layer], sizes: list[int], root: Array | None
) -> Array:
    """Aᵀ A, `[P, P]`, in the order of the leaves.

    Args:
      rows: A itself, or where F is a covariance √μ J, whose mean is to be subtracted.
      layers: to which the outer products of `rows` belong.
      sizes: of all leaves.
      root: √μ, `[N, K]`, where F is a covariance; else None.
    """
    blocks = _blocks(rows, layers, sizes, root)
    ends = np.cumsum([columns.shape[1] for columns, _, _ in blocks])
    # What is left of the diagonal, one line of blocks after the other.
    left, before = [], blocks[0][0][:, :0]
    for columns, _, _ in blocks:
        left.append(_product(columns, before, root))
        before = jnp.concatenate([before, columns], axis=1)
    lines, start = [], 0
    for k, end in enumerate(ends):
        above = [block[:, start:end].T for block in left[k + 1 :]]
        lines.append(jnp.concatenate([left[k], blocks[k][1], *above], axis=1))
        start = end
    matrix = jnp.concatenate(lines)
    order = np.argsort(np.concatenate([places for _, _, places in blocks]))
    if np.any(order != np.arange(len(order))):
        matrix = matrix[order[:, None], order[None, :]]
    return matrix


def _blocks(
    rows: FactoredRows, layers: list[Layer], sizes: list[int], root: Array | None
) -> list[tuple[Array, Array, np.ndarray]]:
    """By layer, and for all the rest: columns of A, their AᵀA, and their places."""
    ends = np.cumsum(sizes)
    starts, taken, blocks = ends - sizes, set(), []
    for layer, (a, delta) in zip(layers, rows.outer, strict=True):
        products = a[:, None, :, None] * delta[:, :, None, :]
        where = np.empty(layer.order.size, int)
        where[layer.order] = starts[layer.weight] + np.arange(layer.order.size)
        taken.add(layer.weight)
        if layer.bias is not None:
            taken.add(layer.bias)
            of_bias = np.arange(starts[layer.bias], ends[layer.bias])
            where = np.concatenate([of_bias, where])
        square = _square_of_layer(a, delta, root, has_bias=layer.bias is not None)
        blocks.append((products.reshape(-1, where.size), square, where))
    rest = [
        np.arange(start, end)
        for place, (start, end) in enumerate(zip(starts, ends, strict=True))
        if place not in taken
    ]
    if rest:
        dense = rows.dense.reshape(-1, rows.dense.shape[-1])
        square = _product(dense, dense, root)
        blocks.append((dense, square, np.concatenate(rest)))
    # In the order in which they are: less to move at the end.
    return sorted(blocks, key=lambda block: block[2].min())


def _product(left: Array, right: Array, root: Array | None) -> Array:
    """XᵀY, or where F is a covariance, that of X and Y less their means."""
    if root is not None:
        # It is enough to centre one of them.
        if left.shape[1] < right.shape[1]:
            left = _centred(left, root)
        else:
            right = _centred(right, root)
    return jnp.matmul(left.T, right, precision=jax.lax.Precision.HIGHEST)


def _centred(columns: Array, root: Array) -> Array:
    s = root.ravel()
    return columns - jnp.outer(s, s @ columns / jnp.sum(s**2))


def _square_of_layer(
    a: Array, delta: Array, root: Array | None, *, has_bias: bool
) -> Array:
    """Σ (a ⊗ δ)(a ⊗ δ)ᵀ, or where F is a covariance, less the mean; `[mn, mn]`.

    Of a covariance the mean may be far longer than what the rows have beside it. With
    x = a - ā, δ = √μ (δ̄ + y), and X = (1, x), Y = √μ (1, y),

        a ⊗ δ = (ā X₀ + x) ⊗ (δ̄ Y₀ + √μ y)

    is linear in X and in Y. So the sums over pairs of those are made, and from them
    those over pairs of a and δ, without the one term that is a product of means.
    """
    if root is None:
        sums = _pair_sums(a, delta)
        return _expand(sums, a.shape[-1], delta.shape[-1])
    total = jnp.sum(root**2)
    first = 1 if has_bias else 0
    a = a[:, first:]
    a_mean = jnp.sum(root**2, axis=1) @ a / total
    delta_mean = jnp.einsum("nk,nkl->l", root, delta) / total
    y = delta - root[:, :, None] * delta_mean[None, None]
    y = jnp.concatenate([root[:, :, None], y], axis=-1)
    x = jnp.pad(a - a_mean[None], ((0, 0), (1, 0)), constant_values=1)
    sums = _pair_sums(x, y)
    # Of the pairs with X₀² or with Y₀², which come first, these are products with the
    # mean of a ⊗ δ: to be subtracted again, and zero but for the very first.
    sums = sums.at[0, : y.shape[-1]].set(0).at[: x.shape[1], 0].set(0)
    # Row (0, i), column (0, k): Σ μ x y, of which what is left of the mean is made.
    left = sums[: x.shape[1], : y.shape[-1]]
    m, n = a.shape[-1] + first, delta.shape[-1]

    def shift(sums: Array) -> Array:
        sums = _shift(sums, a_mean, has_bias=has_bias)
        return _shift(sums.T, delta_mean, has_bias=False).T

    # Where there is nothing to shift by, and for compilers, which would otherwise do
    # all of it again for every entry that is read off the result.
    has_mean = jnp.any(a_mean != 0) | jnp.any(delta_mean != 0)
    p, q = _num_pairs(m), _num_pairs(n)
    sums = jax.lax.cond(has_mean, shift, lambda sums: sums[-p:, -q:], sums)
    square = _expand(sums, m, n)
    ones = jnp.ones(first, a.dtype)
    means = jnp.outer(jnp.concatenate([ones, a_mean]), delta_mean).ravel()
    left = left[1 - first :, 1:].ravel()
    # sums hold each product of `means` and `left` on both sides of the diagonal.
    square -= jnp.outer(means, left) + jnp.outer(left, means)
    return square - jnp.outer(left, left) / total


def _pair_sums(a: Array, delta: Array) -> Array:
    """Σ aᵢ aⱼ δₖ δₗ for all pairs i ≤ j and k ≤ l."""
    of_delta = jnp.sum(_pairs(delta), axis=1)
    return jnp.matmul(_pairs(a).T, of_delta, precision=jax.lax.Precision.HIGHEST)


def _num_pairs(size: int) -> int:
    return size * (size + 1) // 2


def _pairs(values: Array) -> Array:
    i, j = np.triu_indices(values.shape[-1])
    return values[..., i] * values[..., j]


def _place_of_pair(size: int) -> np.ndarray:
    """Which pair (i, j) and (j, i) are, `[size, size]`."""
    places = np.zeros((size, size), int)
    i, j = np.triu_indices(size)
    places[i, j] = places[j, i] = np.arange(len(i))
    return places


def _shift(sums: Array, mean: Array, *, has_bias: bool) -> Array:
    """From pairs of (1, x) to those of (1, x + mean), or of x + mean alone."""
    places = _place_of_pair(len(mean) + 1)
    mean = jnp.concatenate([jnp.zeros(1, mean.dtype), mean])
    i, j = np.triu_indices(len(mean))
    if not has_bias:
        i, j = i[i > 0], j[i > 0]
    shifted = sums[places[i, j]] + mean[i, None] * sums[places[0, j]]
    shifted += mean[j, None] * sums[places[i, 0]]
    return shifted + jnp.outer(mean[i] * mean[j], sums[0])


def _expand(sums: Array, m: int, n: int) -> Array:
    """From pairs of inputs and pairs of outputs to pairs of entries, `[mn, mn]`."""
    full = sums[_place_of_pair(m)][:, :, _place_of_pair(n)]
    return full.transpose(0, 2, 1, 3).reshape(m * n, m * n)
