"""The Gram matrix A Aᵀ of the root A of the Fisher, F = Aᵀ A.

    ⟨row, row'⟩ for all pairs of rows;    ⟨a ⊗ δ, a' ⊗ δ'⟩ = ⟨a, a'⟩ ⟨δ, δ'⟩

By pairs of blocks of rows, or without the rows of dense layers, which are outer
products of their inputs a and cotangents δ. Sits above `per_example` and `layers`, and
knows nothing of solvers.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ngd_jax import metric, per_example, placement, tree
from ngd_jax.coordinates import ravel_real, real_parts, real_size
from ngd_jax.fisher import Fisher
from ngd_jax.layers import Layer, Wanted, read_backward
from ngd_jax.types import Array, Float, Params

__all__ = ["divided_gram", "gram"]

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
    groups = per_example.groups_of(fisher)
    matrix, sizes = _by_cheapest(fisher, groups, block_size)
    order = per_example.order_of(fisher, groups, sizes)
    return per_example.permuted(matrix, order, order)


def divided_gram(
    fisher: Fisher, sharding: NamedSharding, block_size: int | None = None
) -> tuple[Float[Array, "M M"], np.ndarray]:
    """A Aᵀ with its rows divided over devices, each of which computes its own.

    No device ever has the whole matrix: a block of rows of A is gathered at a time, or
    the inputs and cotangents of dense layers.

    Args:
      fisher, block_size: as for `gram`.
      sharding: the mesh, and its axes that divide the rows.

    Returns:
      A Aᵀ in the order of the examples, and where each entry of `ravel_real(A v)` is
      among its rows.

    Raises:
      NoRowsError: at trace time, where the model cannot be run on single examples.
      ValueError: at trace time, for terms with different numbers of examples, or
        examples that cannot be divided equally.
    """
    groups = per_example.groups_of(fisher, sharding)
    if len(groups) > 1:
        raise ValueError(
            f"`sharding` needs terms with the same number of examples, got "
            f"{[group.size for group in groups]}."
        )
    matrix, _ = _by_cheapest(fisher, groups, block_size, sharding)
    return matrix, per_example.order_of(fisher, groups, [groups[0].size])


def _by_cheapest(
    fisher: Fisher,
    groups: list[per_example.Group],
    block_size: int | None,
    sharding: NamedSharding | None = None,
) -> tuple[Array, list[int]]:
    """A Aᵀ by layers or blocks, and the sizes of blocks in whose order it is."""
    if block_size is not None:
        metric.check_count("block_size", block_size)
    matrix = _by_layers(fisher, groups, sharding) if block_size is None else None
    if matrix is None:
        return _by_blocks(groups, block_size, sharding)
    return matrix, [group.size for group in groups]


# --- From rows.


def _by_blocks(
    groups: list[per_example.Group],
    count: int | None,
    sharding: NamedSharding | None = None,
) -> tuple[Array, list[int]]:
    """A Aᵀ by pairs of blocks of examples, in their order; and the sizes of the blocks.

    With `sharding` in the order of the examples, and divided by rows.

    The rows of the second block are recomputed for every first one: with m rows in a
    block that costs about 4mP against the 2m²P of the product.
    """
    dtype = per_example.working_dtype(groups[0].fisher)
    row_bytes = real_size(groups[0].fisher.params) * dtype.itemsize
    num_rows = min(per_example.BLOCK_ROWS, _MEMORY // max(1, 2 * row_bytes))

    def rows_of(group: per_example.Group, block: Array | int) -> tuple[Params, Array]:
        """The rows of a block, and the place of its first one."""
        size, _ = group.blocks(count, num_rows)
        start, _, rows = group.map(lambda row, units: jax.vmap(row)(units), block, size)
        return jax.tree.map(per_example.flat_rows, rows), start

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
                if sharding is not None:
                    right = jax.tree.map(lambda x: placement.place(x, sharding), right)
                    product = _products(left, right, dtype)
                    matrix = put(matrix, product, block, other_block)
                    return put(matrix, product.T, other_block, block)
                product = tree.replicate(_products(left, right, dtype))
                matrix = jax.lax.dynamic_update_slice(matrix, product, (here, there))
                return jax.lax.dynamic_update_slice(matrix, product.T, (there, here))

            stop = block + 1 if other is group else num_others
            return per_example.loop(stop, add_pair, matrix)

        return per_example.loop(num_blocks, add_rows, matrix)

    def put(matrix: Array, product: Array, block: Any, other_block: Any) -> Array:
        """Fills in a product, of which each device has the rows of its examples."""
        shape = (block_size, 1, num_units) * 2
        product = placement.place(product, sharding, axes)
        product = placement.reshape(product, shape, sharding, axes)
        corner = (0, block, 0, 0, other_block, 0)
        return jax.lax.dynamic_update_slice(matrix, product, corner)

    size = sum(group.size * group.rows_per_example for group in groups)
    sizes = [group.blocks(count, num_rows)[0] for group in groups]
    axes, block_size = placement.axes_of(sharding), sizes[0]
    num_units = groups[0].rows_per_example
    if sharding is not None:
        # A block has examples of every device: example n of a part is in block n mod B.
        num_blocks = groups[0].size // block_size
        matrix = jnp.zeros((block_size, num_blocks, num_units) * 2, dtype)
        matrix = placement.place(matrix, sharding, axes)
        matrix = add_products(groups[0], groups[0], matrix)
        return placement.reshape(matrix, (size, size), sharding, axes), sizes
    matrix = jnp.zeros((size, size), dtype)
    for i, group in enumerate(groups):
        for other in groups[: i + 1]:
            matrix = add_products(group, other, matrix)
    return matrix, sizes


def _products(left: Params, right: Params, dtype: Any) -> Array:
    """Re ⟨rowᵢ, rowⱼ⟩ for all rows of both."""
    total: Any = 0
    parts = (jax.tree.leaves(jax.tree.map(real_parts, rows)) for rows in (left, right))
    for x, y in zip(*parts, strict=True):
        # Over all axes of the parameter: flattened, a sharded one would move.
        axes = range(1, x.ndim)
        total += tree.contract(x, y, axes, axes).astype(dtype)
    return total


# --- From the outer products of dense layers.


def _by_layers(
    fisher: Fisher,
    groups: list[per_example.Group],
    sharding: NamedSharding | None = None,
) -> Array | None:
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
    if sharding is None:
        return _factored_gram(outer, rest, root)
    axes = placement.axes_of(sharding)
    whole = jax.tree.map(lambda x: placement.place(x, sharding), (outer, rest, root))
    rows = jax.shard_map(
        lambda *whole: _factored_gram(
            *whole,
            own=functools.partial(placement.slice_of, axes=axes),
            gather=lambda x: jax.lax.all_gather(x, axes, tiled=True),
        ),
        mesh=sharding.mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(axes),
    )
    return rows(*whole)


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
        backward = read_backward(fisher.pullback, cotangents, fisher.params)
        found = [
            one
            for one in backward.layers
            if not one.in_loop and _is_large(one.num_inputs, one.num_outputs)
        ]
        values = backward.evaluate(
            [Wanted(one.weight, one, lambda values: values) for one in found]
        )
        # A layer that is used at several places of an example is a sum of products.
        used = [len(one.inputs) == group.size for one in values]
        layers[:] = itertools.compress(found, used)
        values = list(itertools.compress(values, used))
        return [one.inputs for one in values], [one.cotangents for one in values]

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
            return ravel_real(unclaimed)[0].astype(dtype)

        return jax.vmap(rest)(units)

    # The mean is subtracted later, if there is one.
    terms = tuple(term._replace(means=()) for term in group.terms)
    whole = dataclasses.replace(group, terms=terms)
    return outer, per_example.flat_rows(whole.map(rest_of, 0, group.size)[2])


def _factored_gram(
    outer: list[tuple[Array, Array]],
    rest: Array,
    root: Array | None,
    own: Callable[[Array], Array] = lambda x: x,
    gather: Callable[[Array], Array] = lambda x: x,
) -> Array:
    """A Aᵀ, `[N·K, N·K]`, of what `_factored_rows` returns; or some of its rows.

    Args:
      outer, rest: the rows of A itself, or of √μ J where F is a covariance: minus their
        mean they are the rows of A, aᵢ = rowᵢ - √μᵢ Σⱼ √μⱼ rowⱼ / Σ μ.
      root: √μ, `[N·K]`, where F is a covariance; else None.
      own: takes those entries of an array along the axis of examples (or rows) whose
        rows of A Aᵀ to compute.
      gather: the way back, from those entries to all.
    """
    if root is None:
        # Over explicit mesh axes too, each device computes the rows of its examples.
        where = tree.first_axis_sharding(outer)
        rest = placement.place(rest, where, placement.axes_of(where))
        gram = tree.replicate(_inner(own(rest), rest))
        products: Any = 0
        for a, delta in outer:
            of_delta = tree.contract(own(delta), delta, (2,), (2,))
            products += _inner(own(a), a)[:, None, :, None] * of_delta
        return gram + tree.replicate(products).reshape(gram.shape)
    total = root @ root
    rest = rest - jnp.outer(root, root @ rest / total)
    gram = _inner(own(rest), rest)
    products = jnp.zeros_like(gram)
    for a, delta in outer:
        a = jnp.repeat(a, delta.shape[1], axis=0)
        delta = delta.reshape(len(a), -1)
        products += _centred_products(a, delta, root, own)
    # These are of rows less √μ c for some c near the mean. With s = √μ, X for them and
    # y = X s / Σμ - s (sᵀ X s) / (2 (Σμ)²), what is left of the mean comes off by
    # (I - s sᵀ/Σμ) X (I - s sᵀ/Σμ) = X - s yᵀ - y sᵀ, where little is left to cancel.
    mean = gather(products @ root / total)
    correction = mean - root * (root @ mean) / (2 * total)
    gram += products - jnp.outer(own(root), correction)
    return gram - jnp.outer(own(correction), root)


def _centred_products(
    a: Array, delta: Array, root: Array, own: Callable[[Array], Array]
) -> Array:
    """⟨rowᵢ - √μᵢ c, rowⱼ - √μⱼ c⟩ of rows aᵢ ⊗ δᵢ, `[M, M]`, for a certain c.

    The mean row may be far longer than the rows' deviations from it, and subtracting it
    from their products would cost digits. c = ā ⊗ δ̄ is most of it, with the weighted
    means ā = Σ μ a / Σ μ and δ̄ = Σ √μ δ / Σ μ. With x = a - ā and y = δ - √μ δ̄,

        a ⊗ δ - √μ ā ⊗ δ̄ = x ⊗ δ + ā ⊗ y,

    where no large terms cancel; and likewise in its products

        ⟨x, x'⟩⟨δ, δ'⟩ + ⟨x, ā⟩⟨δ, y'⟩ + ⟨ā, x'⟩⟨y, δ'⟩ + ⟨ā, ā⟩⟨y, y'⟩.

    Those with δ follow from ⟨y, y'⟩ and q = ⟨y, δ̄⟩ by δ = y + √μ δ̄. The rows i are
    those that `own` takes.
    """
    total = root @ root
    a_mean, delta_mean = root**2 @ a / total, root @ delta / total
    x, y = a - a_mean[None], delta - jnp.outer(root, delta_mean)
    q, along = y @ delta_mean, x @ a_mean
    yy = _inner(own(y), y)
    delta_y = yy + jnp.outer(own(root), q)
    y_delta = yy + jnp.outer(own(q), root)
    square = delta_mean @ delta_mean
    delta_delta = y_delta + jnp.outer(own(root), q + square * root)
    cross = own(along)[:, None] * delta_y + along[None] * y_delta
    return _inner(own(x), x) * delta_delta + cross + (a_mean @ a_mean) * yy


def _inner(rows: Array, others: Array) -> Array:
    return tree.contract(rows, others, (1,), (1,))
