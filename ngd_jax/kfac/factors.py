"""The factors of every block on one batch.

    A = E[a aᵀ],    G = E[δ δᵀ];    L = E[γ γᵀ],    R = E[γᵀ γ]

of the inputs a and the cotangents δ of layers, and the gradients γ of other matrices,
for random signs in the space where F is a square. Knows nothing of averages and
inverses.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngd_jax import tree
from ngd_jax.jacobian import linearize
from ngd_jax.kfac.blocks import block_gram
from ngd_jax.kfac.groups import Block, blocks_of, shape_in
from ngd_jax.kfac.state import Long, Pair
from ngd_jax.layers import LayerValues, Wanted, read_backward
from ngd_jax.microbatches import sum_microbatches
from ngd_jax.types import Array, PyTree

__all__ = ["batch_factors", "random_signs", "total"]


def batch_factors(
    fisher: Any, count: Array, max_size: int, max_block: int | None = None
) -> tuple[list[Block], list[Any]]:
    """The blocks, and the factors (or squares) of each on this batch.

    With scales, those of the parameters before scaling. With `max_block`, `Blocks` of
    at most that side in place of whole factors.
    """
    at = fisher if fisher.scales is None else fisher.base
    like = jax.eval_shape(at.metric.sqrt_matvec, at.outputs)
    cotangents = at.sqrt_cotangents(random_signs(count, like))
    leaves = jax.tree.leaves(at.params)
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
                has_bias = block.bias is not None
                of_layer = functools.partial(
                    _layer_sums,
                    has_bias=has_bias,
                    max_size=max_size,
                    max_block=max_block,
                )
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
                samples = samples.reshape(-1, *sides)
                return _gradient_sums(samples, max_size, max_block)

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


def _layer_sums(
    values: LayerValues, has_bias: bool, max_size: int, max_block: int | None
) -> tuple:
    """Σ a aᵀ and Σ δ δᵀ, with 1 appended to a for a bias; and the number of terms."""
    a, delta = values
    number = jnp.asarray(len(a), a.dtype)
    if has_bias:
        a = jnp.pad(a, ((0, 0), (0, 1)), constant_values=1)
    inputs = _gram(a, values.inputs.shape[1], max_size, max_block)
    outputs = _gram(delta, delta.shape[1], max_size, max_block)
    if isinstance(outputs, Long):
        outputs = outputs._replace(mean=jnp.zeros_like(outputs.mean))
    return inputs, outputs, number


def _gradient_sums(matrices: Array, max_size: int, max_block: int | None) -> tuple:
    """Σ γ γᵀ and Σ γᵀ γ of samples `[N, rows, columns]`."""
    _, rows, columns = matrices.shape
    sums = []
    for axis, size in ((1, rows), (2, columns)):
        vectors = jnp.moveaxis(matrices, axis, -1).reshape(-1, size)
        square = _gram(vectors, size, max_size, max_block)
        if isinstance(square, Long):
            square = square._replace(mean=jnp.zeros_like(square.mean))
        elif matrices.size == size:
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


def _gram(rows: Array, size: int, max_size: int, max_block: int | None) -> Any:
    """Σ row rowᵀ; for long rows Σ row² and Σ row.

    Args:
      rows: `[N, size]`, or one longer with the 1 of a bias.
      size: of the side.
      max_size, max_block: as in `Kronecker`.
    """
    if size > max_size:
        return Long(jnp.sum(rows**2, 0), jnp.sum(rows, 0))
    if max_block is not None:
        return block_gram(rows, size, max_block)
    return tree.contract(rows, rows, (0,), (0,))


def total(values: Array) -> Array:
    """The sum of all entries, as products: much faster to compile than a reduction."""
    for _ in range(values.ndim):
        values = jnp.tensordot(jnp.ones(len(values), values.dtype), values, 1)
    return values


def _mean_square(leaf: Array) -> Array:
    """Squares; for complex numbers the mean of both parts, which share one value."""
    leaf = leaf.astype(tree.wide_dtype(leaf))
    if jnp.iscomplexobj(leaf):
        return (jnp.real(leaf) ** 2 + jnp.imag(leaf) ** 2) / 2
    return leaf**2


def random_signs(count: Array, like: PyTree) -> PyTree:
    """±1 from a hash of the position and the batch number.

    Any signs that are independent of the data and of each other will do; this takes one
    kernel, a random number generator many. The hash is the finalizer of MurmurHash3, in
    which every input bit flips every output bit in half of all cases.
    """

    def mixed(bits: Array) -> Array:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ (bits >> shift)) * np.uint32(factor)
        return bits ^ (bits >> 16)

    seed, start = mixed(count.astype(jnp.uint32) + np.uint32(1)), 0
    leaves, structure = jax.tree.flatten(like)
    signs = []
    for leaf in leaves:
        parts = 2 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else 1
        size = parts * math.prod(leaf.shape)
        places = jnp.arange(start, start + size, dtype=jnp.uint32)
        bits = mixed(mixed(places) + seed) & 1
        real = 1 - 2 * bits.astype(jnp.finfo(leaf.dtype).dtype)
        real = real.reshape(parts, *leaf.shape)
        signs.append(jax.lax.complex(*real) if parts == 2 else real[0])
        start += size
    return jax.tree.unflatten(structure, signs)
