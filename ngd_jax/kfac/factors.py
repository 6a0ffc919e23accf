"""The factors of every block on one batch.

    A = E[a aᵀ],    G = E[δ δᵀ];    L = E[γ γᵀ],    R = E[γᵀ γ]

of the inputs a and the cotangents δ of layers, and the gradients γ of other matrices,
for random signs in the space where F is a square. Knows nothing of averages and
inverses.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.coordinates import random_signs
from ngd_jax.jacobian import linearize
from ngd_jax.kfac.blocks import block_gram
from ngd_jax.kfac.groups import Block, blocks_of, shape_in
from ngd_jax.kfac.state import Long, Pair
from ngd_jax.layers import LayerValues, Wanted, read_backward
from ngd_jax.microbatches import sum_microbatches
from ngd_jax.per_example import coefficient_shapes
from ngd_jax.types import Array, PyTree

__all__ = ["batch_factors"]


def batch_factors(
    fisher: Any, count: Array, max_size: int, max_block: int | None = None
) -> tuple[list[Block], list[Any]]:
    """The blocks, and the factors (or squares) of each on this batch.

    With scales, those of the parameters before scaling. With `max_block`, `Blocks` of
    at most that side in place of whole factors.
    """
    at = fisher if fisher.scales is None else fisher.base
    cotangents = at.sqrt_cotangents(random_signs(coefficient_shapes(at), count))
    leaves = jax.tree.leaves(at.params)
    gram = functools.partial(_gram, max_size=max_size, max_block=max_block)
    blocks: list[Block] = []

    def on_part(data: PyTree) -> Any:
        batch, cotangents = data
        pull = at.pullback
        if at.chunks is not None:
            pull = linearize(at.model_fn, at.params, batch).pull
        backward = read_backward(pull, cotangents, at.params)
        blocks[:] = blocks_of(backward.layers, backward.stacked, at.params, max_size)
        num_examples = max(
            (len(x) for x in jax.tree.leaves(cotangents) if x.ndim), default=1
        )

        def wanted(block: Block) -> Wanted:
            if block.layer is not None:
                of_layer = functools.partial(_layer_sums, gram, block.bias is not None)
                return Wanted(block.weight, block.layer, of_layer)
            shape, room = jnp.shape(leaves[block.weight]), block.room
            # The squares of a vector may come from every layer of a stack too.
            is_stacked = block.weight in backward.stacked and (
                room.is_stack or room.split is None
            )
            shape = shape[1:] if is_stacked else shape

            def of_gradient(gradient: Array) -> tuple:
                samples = _samples(gradient, shape, num_examples)
                if room.split is None:
                    return (jnp.sum(_mean_square(samples), 0).reshape(-1),)
                sides = shape_in(room, jnp.shape(leaves[block.weight]))
                return _gradient_sums(gram, samples.reshape(-1, *sides))

            return Wanted(block.weight, None, of_gradient, is_stacked, keep_terms=True)

        return backward.evaluate(list(map(wanted, blocks)))

    sums = sum_microbatches(on_part, (at.batch, cotangents), at.chunks)
    return blocks, [
        _factors(block, one) for block, one in zip(blocks, sums, strict=True)
    ]


def _samples(gradient: Array, shape: tuple[int, ...], num_examples: int) -> Array:
    """A gradient per example, `[N, *shape]`, if it has such terms; else `[1, ...]`.

    The terms from the positions of one example are not independent, and are summed.
    """
    if gradient.ndim == len(shape):
        return gradient[None]
    if len(gradient) % num_examples:
        return jnp.sum(gradient, 0, keepdims=True)
    return jnp.sum(gradient.reshape(num_examples, -1, *shape), 1)


def _layer_sums(gram: Callable, has_bias: bool, values: LayerValues) -> tuple:
    """Σ a aᵀ and Σ δ δᵀ, with 1 appended to a for a bias; and the number of terms."""
    a, delta = values
    number, size = jnp.asarray(len(a), a.dtype), a.shape[1]
    if has_bias:
        a = jnp.pad(a, ((0, 0), (0, 1)), constant_values=1)
    return gram(a, size, has_mean=True), gram(delta, delta.shape[1]), number


def _gradient_sums(gram: Callable, matrices: Array) -> tuple:
    """Σ γ γᵀ and Σ γᵀ γ of samples `[N, rows, columns]`."""
    sums = []
    for axis in (1, 2):
        size = matrices.shape[axis]
        square = gram(jnp.moveaxis(matrices, axis, -1).reshape(-1, size), size)
        if matrices.size == size and not isinstance(square, Long):
            # A single vector gives only the squares of its entries.
            square = jax.tree.map(
                lambda x: x * jnp.eye(x.shape[-1], dtype=x.dtype), square
            )
        sums.append(square)
    return tuple(sums)


def _factors(block: Block, sums: tuple) -> Any:
    """Means over the batch: of rows and of columns, or of squares."""
    if block.room.split is None:
        return sums[0] if block.room.is_stack else sums[0].reshape(-1)
    if block.layer is None:
        return Pair(*sums)
    inputs, outputs, number = sums
    inputs = jax.tree.map(lambda x: x / number.reshape(-1, *[1] * (x.ndim - 1)), inputs)
    return Pair(outputs, inputs) if block.is_turned else Pair(inputs, outputs)


def _gram(
    rows: Array,
    size: int,
    *,
    max_size: int,
    max_block: int | None,
    has_mean: bool = False,
) -> Any:
    """Σ row rowᵀ; for long rows Σ row², and Σ row or zeros.

    Args:
      rows: `[N, size]`, or one longer with the 1 of a bias.
      size: of the side.
      max_size, max_block: as in `Kronecker`.
      has_mean: whether the mean of long rows counts.
    """
    if size > max_size:
        square = jnp.sum(rows**2, 0)
        return Long(square, jnp.sum(rows, 0) if has_mean else jnp.zeros_like(square))
    if max_block is not None:
        return block_gram(rows, size, max_block)
    return tree.contract(rows, rows, (0,), (0,))


def _mean_square(leaf: Array) -> Array:
    """Squares; for complex numbers the mean of both parts, which share one value."""
    leaf = leaf.astype(tree.wide_dtype(leaf))
    if jnp.iscomplexobj(leaf):
        return (jnp.real(leaf) ** 2 + jnp.imag(leaf) ** 2) / 2
    return leaf**2
