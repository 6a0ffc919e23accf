"""The Gram matrix A Aᵀ of the root A of the Fisher, F = Aᵀ A.

    ⟨row, row'⟩ for all pairs of rows;    ⟨a ⊗ δ, a' ⊗ δ'⟩ = ⟨a, a'⟩ ⟨δ, δ'⟩

By pairs of blocks of rows, or without the rows of dense layers, which are outer
products of their inputs a and cotangents δ. Sits above `per_example` and `layers`, and
knows nothing of solvers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ngd_jax import metric, per_example, tree
from ngd_jax.fisher import Fisher
from ngd_jax.layers import Layer, backward_pass
from ngd_jax.types import Array, Float, Params

__all__ = ["gram"]

# Memory for rows where no number of them is given, in bytes.
_MEMORY = 512 * 2**20
# Weights as small as this are cheaper as ordinary rows: M² entries of a product cost
# another pass over the Gram matrix, which is worth as many operations on each entry.
_PASS = 64


def gram(fisher: Fisher, block_size: int | None = None) -> Float[Array, "M M"]:
    """A Aᵀ, symmetric, in real coordinates of what `fisher.sqrt_matvec` returns.

    2M²P operations, or 2M²(m + n) for a dense layer of m inputs and n outputs that is
    used once in an example. Two blocks of rows are in memory, and never all of A.

    Args:
      fisher: the Fisher of a model that does not mix its examples. This is not
        verified: a solver that uses the matrix must verify its solution.
      block_size: examples in a block. None takes the rows of dense layers as outer
        products, of all examples at once, if they fit into half a GiB.

    Raises:
      NoRowsError: at trace time, where the model cannot be run on single examples.
    """
    if block_size is not None:
        metric.check_count("block_size", block_size)
    groups = per_example.groups_of(fisher)
    matrix = _by_layers(fisher, groups) if block_size is None else None
    sizes = [group.size for group in groups]
    if matrix is None:
        matrix, sizes = _by_blocks(groups, block_size)
    order = per_example.order_of(fisher, groups, sizes)
    return per_example.permuted(matrix, order, order)


# --- From rows.


def _by_blocks(
    groups: list[per_example.Group], count: int | None
) -> tuple[Array, list[int]]:
    """A Aᵀ by pairs of blocks of examples, in their order; and the sizes of the blocks.

    The rows of the second block are recomputed for every first one: with m rows in a
    block that costs about 4mP against the 2m²P of the product.
    """
    dtype = per_example.working_dtype(groups[0].fisher)
    row_bytes = per_example.real_size(groups[0].fisher.params) * dtype.itemsize
    num_rows = min(per_example.BLOCK_ROWS, _MEMORY // max(1, 2 * row_bytes))

    def rows_of(group: per_example.Group, block: Array | int) -> tuple[Params, Array]:
        """The rows of a block, and the place of its first one."""
        size, _ = group.blocks(count, num_rows)
        place, _, rows = group.map(lambda row, units: jax.vmap(row)(units), block, size)
        return jax.tree.map(per_example.flat_rows, rows), place

    def add_products(
        group: per_example.Group, other: per_example.Group, matrix: Array
    ) -> Array:
        """Fills in the products of two groups."""
        (_, num_blocks), (_, num_others) = (
            one.blocks(count, num_rows) for one in (group, other)
        )

        def add_rows(block: Array | int, matrix: Array) -> Array:
            left, here = rows_of(group, block)

            def add_pair(other_block: Array | int, matrix: Array) -> Array:
                is_one = other is group and num_blocks == 1
                right, there = (left, here) if is_one else rows_of(other, other_block)
                product = _products(left, right, dtype)
                matrix = jax.lax.dynamic_update_slice(matrix, product, (here, there))
                return jax.lax.dynamic_update_slice(matrix, product.T, (there, here))

            stop = block + 1 if other is group else num_others
            return per_example.loop(stop, add_pair, matrix)

        return per_example.loop(num_blocks, add_rows, matrix)

    size = sum(group.size * group.rows_per_example for group in groups)
    matrix = jnp.zeros((size, size), dtype)
    for i, group in enumerate(groups):
        for other in groups[: i + 1]:
            matrix = add_products(group, other, matrix)
    return matrix, [group.blocks(count, num_rows)[0] for group in groups]


def _products(left: Params, right: Params, dtype: Any) -> Array:
    """Re ⟨rowᵢ, rowⱼ⟩ for all rows of both."""
    total: Any = 0
    parts = (
        jax.tree.leaves(jax.tree.map(per_example.real_parts, rows))
        for rows in (left, right)
    )
    for x, y in zip(*parts, strict=True):
        # Over all axes of the parameter: flattened, a sharded one would move.
        axes = range(1, x.ndim)
        total += tree.contract(x, y, axes, axes).astype(dtype)
    return total


# --- From the outer products of dense layers.


def _by_layers(fisher: Fisher, groups: list[per_example.Group]) -> Array | None:
    """A Aᵀ without the rows of dense layers, which are outer products.

    Returns:
      None if rows are not such products, or do not fit into memory.
    """
    leaves = jax.tree.leaves((fisher.params, fisher.outputs))
    is_complex = any(map(jnp.iscomplexobj, leaves))
    if fisher.chunks is not None or is_complex or len(groups) > 1:
        return None
    terms = groups[0].terms
    measures = [term.data[1] for term in terms if term.likelihood.centered]
    if measures and len(terms) > 1:
        return None
    layers: list[Layer] = []

    def rows_fn() -> tuple[list[tuple[Array, Array]], Array]:
        return _factored_rows(fisher, groups[0], layers)

    shapes = jax.tree.leaves(jax.eval_shape(rows_fn))
    num_bytes = sum(x.size * x.dtype.itemsize for x in shapes)
    if not layers or num_bytes > _MEMORY:
        return None
    outer, rest = rows_fn()
    root = jnp.sqrt(measures[0]).astype(rest.dtype).ravel() if measures else None
    if root is not None:
        outer = tree.replicate(outer)
    return _factored_gram(outer, rest, root)


def _is_large(m: int, n: int) -> bool:
    """Whether outer products are cheaper than the rows of an m times n weight."""
    return m * n > 2 * (m + n) + _PASS


def _factored_rows(
    fisher: Fisher, group: per_example.Group, layers: list[Layer]
) -> tuple[list[tuple[Array, Array]], Array]:
    """The rows of all examples, those of dense layers as outer products.

    Args:
      fisher: the Fisher.
      group: its only group.
      layers: takes the layers that are found.

    Returns:
      For each layer its inputs a `[N, m]`, with a 1 in front if it has a bias, and δ
      `[N, K, n]`; and all other entries of the rows, `[N·K, rest]`.
    """
    data, dtype = fisher.metric.data, per_example.working_dtype(fisher)

    def on_unit(unit: Array) -> tuple[list[Array], list[Array]]:
        cotangents = metric.join(fisher.likelihood, group.cotangents(data, unit))
        found, values, _ = backward_pass(fisher.pullback, cotangents, fisher.params)
        # A layer that is used at several places of an example is a sum of products.
        used = [
            (layer, one)
            for layer, one in zip(found, values, strict=True)
            if len(one.inputs) == group.size
            and _is_large(layer.num_inputs, layer.num_outputs)
        ]
        layers[:] = [layer for layer, _ in used]
        return [one.inputs for _, one in used], [one.cotangents for _, one in used]

    # The inputs are the same for all coefficients.
    inputs, deltas = jax.vmap(on_unit, out_axes=(None, 1))(group.units())
    outer = []
    for layer, a, delta in zip(layers, inputs, deltas, strict=True):
        ones = [] if layer.bias is None else [jnp.ones_like(a[:, :1])]
        a = jnp.concatenate([*ones, a], axis=1)
        outer.append((a.astype(dtype), delta.astype(dtype)))
    claimed = {place for layer in layers for place in (layer.weight, layer.bias)}

    def rest_of(row: per_example.Row, units: Array) -> Array:
        def rest(unit: Array) -> Array:
            leaves = enumerate(jax.tree.leaves(row(unit)))
            unclaimed = [leaf for place, leaf in leaves if place not in claimed]
            return per_example.ravel_real(unclaimed)[0].astype(dtype)

        return jax.vmap(rest)(units)

    # The mean is subtracted later, if there is one.
    terms = tuple(term._replace(means=()) for term in group.terms)
    whole = dataclasses.replace(group, terms=terms)
    return outer, per_example.flat_rows(whole.map(rest_of, 0, group.size)[2])


def _factored_gram(
    outer: list[tuple[Array, Array]], rest: Array, root: Array | None
) -> Array:
    """A Aᵀ, `[N·K, N·K]`, of the rows that `_factored_rows` returns.

    Args:
      outer, rest: the rows of A itself, or of √μ J where F is a covariance: minus their
        mean they are the rows of A, aᵢ = rowᵢ - √μᵢ Σⱼ √μⱼ rowⱼ / Σ μ.
      root: √μ, `[N·K]`, where F is a covariance; else None.
    """
    if root is None:
        # Over explicit mesh axes too, each device computes the rows of its examples.
        gram = tree.replicate(_inner(tree.rows_like(rest, outer[0][0])))
        products: Any = 0
        for a, delta in outer:
            of_delta = tree.contract(delta, delta, (2,), (2,))
            products += _inner(a)[:, None, :, None] * of_delta
        return gram + tree.replicate(products).reshape(gram.shape)
    total = root @ root
    gram = _inner(rest - jnp.outer(root, root @ rest / total))
    products = jnp.zeros_like(gram)
    for a, delta in outer:
        a = jnp.repeat(a, delta.shape[1], axis=0)
        products += _centred_products(a, delta.reshape(len(a), -1), root)
    # These are of rows less √μ c for some c near the mean. With s = √μ, X for them and
    # y = X s / Σμ - s (sᵀ X s) / (2 (Σμ)²), what is left of the mean comes off by
    # (I - s sᵀ/Σμ) X (I - s sᵀ/Σμ) = X - s yᵀ - y sᵀ, where little is left to cancel.
    mean = products @ root / total
    correction = mean - root * (root @ mean) / (2 * total)
    return gram + products - jnp.outer(root, correction) - jnp.outer(correction, root)


def _centred_products(a: Array, delta: Array, root: Array) -> Array:
    """⟨rowᵢ - √μᵢ c, rowⱼ - √μⱼ c⟩ of rows aᵢ ⊗ δᵢ, `[M, M]`, for a certain c.

    The mean row may be far longer than the rows' deviations from it, and subtracting it
    from their products would cost digits. c = ā ⊗ δ̄ is most of it, with the weighted
    means ā = Σ μ a / Σ μ and δ̄ = Σ √μ δ / Σ μ. With x = a - ā and y = δ - √μ δ̄,

        a ⊗ δ - √μ ā ⊗ δ̄ = x ⊗ δ + ā ⊗ y,

    where no large terms cancel; and likewise in its products

        ⟨x, x'⟩⟨δ, δ'⟩ + ⟨x, ā⟩⟨δ, y'⟩ + ⟨ā, x'⟩⟨y, δ'⟩ + ⟨ā, ā⟩⟨y, y'⟩.

    Those with δ follow from ⟨y, y'⟩ and q = ⟨y, δ̄⟩ by δ = y + √μ δ̄.
    """
    total = root @ root
    a_mean, delta_mean = root**2 @ a / total, root @ delta / total
    x, y = a - a_mean[None], delta - jnp.outer(root, delta_mean)
    q = y @ delta_mean
    yy = _inner(y)
    delta_y = yy + jnp.outer(root, q)
    square = delta_mean @ delta_mean
    delta_delta = delta_y + jnp.outer(q, root) + square * jnp.outer(root, root)
    cross = (x @ a_mean)[:, None] * delta_y
    return _inner(x) * delta_delta + cross + cross.T + (a_mean @ a_mean) * yy


def _inner(rows: Array) -> Array:
    return tree.contract(rows, rows, (1,), (1,))
