"""Functions of a batch, a part of its examples at a time: memory for time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax.likelihoods import Likelihood
from ngd_jax.metric import check_count, leading_size
from ngd_jax.types import Array, Batch, ModelFn, Outputs, Params, PyTree

__all__ = [
    "Chunks",
    "chunks_of",
    "map_microbatches",
    "model_on",
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


def _cut(
    data: Batch, chunks: Chunks
) -> tuple[list[Any], Callable[[list[Any]], Batch], list[Any]]:
    """Leaves as [chunks, microbatch_size, ...], the way back, and the remainder."""
    leaves, structure = jax.tree.flatten(data)
    is_cut = [chunks.cuts(leaf) for leaf in leaves]
    count = chunks.leading // chunks.size
    whole = count * chunks.size

    def rebuild(values: list[Any]) -> Batch:
        rest = iter(values)
        merged = [
            next(rest) if cut else leaf
            for leaf, cut in zip(leaves, is_cut, strict=True)
        ]
        return jax.tree.unflatten(structure, merged)

    chosen = [leaf for leaf, cut in zip(leaves, is_cut, strict=True) if cut]
    stacked = [
        jnp.reshape(leaf[:whole], (count, chunks.size, *jnp.shape(leaf)[1:]))
        for leaf in chosen
    ]
    return stacked, rebuild, [leaf[whole:] for leaf in chosen]


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
    stacked, rebuild, rest = _cut(data, chunks)
    like = jax.eval_shape(lambda c: fn(rebuild(c)), [x[0] for x in stacked])
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def add(total: PyTree, part: list[Array]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, fn(rebuild(part))), None

    total, _ = jax.lax.scan(add, total, stacked)
    if chunks.leading % chunks.size:
        total, _ = add(total, rest)
    return total


def map_microbatches(
    fn: Callable[[Batch], PyTree], data: Batch, chunks: Chunks | None
) -> PyTree:
    """Concatenates fn(microbatch) along the leading axis; fn(data) without chunks."""
    if chunks is None:
        return fn(data)
    stacked, rebuild, rest = _cut(data, chunks)
    mapped = jax.lax.map(lambda part: fn(rebuild(part)), stacked)
    mapped = jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), mapped)
    if chunks.leading % chunks.size:
        last = fn(rebuild(rest))
        mapped = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), mapped, last)
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
    model_fn: ModelFn,
    likelihood: Likelihood,
    batch: Batch,
    microbatch_size: int | None,
) -> Callable[[Params], Outputs]:
    """Params -> model_fn(params, batch), by microbatches."""

    def outputs_at(params: Params) -> Outputs:
        shapes = jax.eval_shape(model_fn, params, batch)
        chunks = chunks_of(likelihood, shapes, batch, microbatch_size)
        return map_microbatches(lambda part: model_fn(params, part), batch, chunks)

    return outputs_at
