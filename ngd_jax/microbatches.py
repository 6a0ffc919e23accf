"""Functions of a batch, a part of its examples at a time: memory for time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax.likelihoods import Likelihood
from ngd_jax.metric import check_count, leading_size
from ngd_jax.types import Array, ArrayLike, Batch, ModelFn, Outputs, Params, PyTree

__all__ = [
    "Chunks",
    "chunks_of",
    "map_microbatches",
    "model_on",
    "part_of",
    "sum_microbatches",
]


class Chunks(NamedTuple):
    """How a batch is cut into microbatches.

    Attributes:
      leading: the number of examples. Leaves with a leading axis of that length are cut
        along it; all others, typed keys and scalars among them, stay whole.
      size: examples in a microbatch; the last one may be shorter.
    """

    leading: int
    size: int

    def cuts(self, leaf: Any) -> bool:
        """Whether `leaf` is cut."""
        return jnp.shape(leaf)[:1] == (self.leading,)


def part_of(values: ArrayLike, size: int, index: ArrayLike) -> Array:
    """`size` examples, one from each of as many equal parts of an array.

    So every device that has a part of a batch works on every microbatch.
    """
    length, *rest = jnp.shape(values)
    parts = jnp.reshape(values, (size, length // size, *rest))
    return jax.lax.dynamic_index_in_dim(parts, index, 1, keepdims=False)


def _cut(
    data: Batch, chunks: Chunks
) -> tuple[Array, Callable[[Array], Batch], Batch | None]:
    """The indices of microbatches, these by their index, and the remainder or None."""
    count, rest = divmod(chunks.leading, chunks.size)
    whole = count * chunks.size

    def of_cut(fn: Callable[[Any], Any]) -> Batch:
        return jax.tree.map(lambda x: fn(x) if chunks.cuts(x) else x, data)

    def take(index: Array) -> Batch:
        return of_cut(lambda x: part_of(x[:whole] if rest else x, chunks.size, index))

    last = of_cut(lambda leaf: leaf[whole:]) if rest else None
    return jnp.arange(count), take, last


def sum_microbatches(
    fn: Callable[[Batch], PyTree], data: Batch, chunks: Chunks | None
) -> PyTree:
    """Σ fn(microbatch), one microbatch at a time; fn(data) without chunks.

    Args:
      fn: returns a tree of arrays whose shapes do not depend on the microbatch.
      data: the batch, and whatever else belongs to its examples.
      chunks: how to cut it.
    """
    if chunks is None:
        return fn(data)
    indices, take, last = _cut(data, chunks)
    like = jax.eval_shape(lambda index: fn(take(index)), indices[0])
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def add(total: PyTree, index: Array) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, fn(take(index))), None

    total, _ = jax.lax.scan(add, total, indices)
    return total if last is None else jax.tree.map(jnp.add, total, fn(last))


def map_microbatches(
    fn: Callable[[Batch], PyTree], data: Batch, chunks: Chunks | None
) -> PyTree:
    """Concatenates fn(microbatch) along the leading axis; fn(data) without chunks."""
    if chunks is None:
        return fn(data)
    indices, take, last = _cut(data, chunks)
    mapped = jax.lax.map(lambda index: fn(take(index)), indices)

    def in_order(parts: Array) -> Array:
        whole = parts.shape[0] * parts.shape[1]
        return jnp.reshape(jnp.moveaxis(parts, 0, 1), (whole, *parts.shape[2:]))

    mapped = jax.tree.map(in_order, mapped)
    if last is not None:
        mapped = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), mapped, fn(last))
    return mapped


def chunks_of(
    likelihood: Likelihood, outputs: Outputs, batch: Batch, microbatch_size: Any
) -> Chunks | None:
    """How to cut `batch`; None where one microbatch holds all of it.

    Raises:
      ValueError, TypeError: where `microbatch_size` cannot be used.
    """
    leading = leading_size(likelihood, outputs)
    if microbatch_size is None:
        return None
    check_count("microbatch_size", microbatch_size)
    if leading is None:
        raise ValueError(
            "`microbatch_size` needs outputs that share one leading axis of examples."
        )
    chunks = Chunks(leading, microbatch_size)
    if not any(chunks.cuts(leaf) for leaf in jax.tree.leaves(batch)):
        raise ValueError(
            f"`microbatch_size` needs a leaf of `batch` to cut: none has a leading "
            f"axis of length {leading}, the number of examples in the outputs."
        )
    return chunks if microbatch_size < leading else None


def model_on(
    model_fn: ModelFn, likelihood: Likelihood, batch: Batch, microbatch_size: int | None
) -> Callable[[Params], Outputs]:
    """Params -> model_fn(params, batch), by microbatches."""

    def outputs_at(params: Params) -> Outputs:
        shapes = jax.eval_shape(model_fn, params, batch)
        chunks = chunks_of(likelihood, shapes, batch, microbatch_size)
        return map_microbatches(lambda part: model_fn(params, part), batch, chunks)

    return outputs_at
