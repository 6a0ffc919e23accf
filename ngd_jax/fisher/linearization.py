"""J and its adjoint at the parameters, from one run of the model.

    push(v) = J v          pull(c) = Re-adjoint of J applied to c: Jᵀ c for real models

`linearize` keeps the intermediate values of the forward pass, so that each later
product costs the linear part alone; `by_microbatch` gives up the kept values to bound
memory by one microbatch, and runs the model again in every pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.types import Array, Batch, ModelFn, Outputs, Params, PyTree

__all__ = [
    "Chunks",
    "Linearization",
    "adjoint",
    "forward",
    "linearize",
    "map_microbatches",
    "sum_microbatches",
]


class Linearization(NamedTuple):
    """A model at its parameters, to first order.

    Attributes:
      outputs: model_fn(params, batch).
      push: tangents of the parameters, float32 or wider -> tangents of the outputs.
      pull: cotangents of the outputs -> the adjoint's result, float32 or wider.
    """

    outputs: Outputs
    push: Callable[[PyTree], PyTree]
    pull: Callable[[PyTree], PyTree]


def linearize(model_fn: ModelFn, params: Params, batch: Batch) -> Linearization:
    """Runs the model once; see `Linearization`.

    Parameters narrower than float32 are cast inside of the differentiated function:
    the model computes what it always does, and the vectors that a solver iterates on
    keep float32.
    """

    def wide_model_fn(wide_params: Params) -> Outputs:
        return model_fn(optax.tree.cast_like(wide_params, params), batch)

    wide_params = tree.widen(params)
    outputs, push = jax.linearize(wide_model_fn, wide_params)
    return Linearization(outputs, push, adjoint(push, wide_params))


def adjoint(
    linear_fn: Callable[[PyTree], PyTree], like: PyTree
) -> Callable[[PyTree], PyTree]:
    """The adjoint of a linear function whose arguments are shaped like `like`."""
    transpose = jax.linear_transpose(linear_fn, like)

    def pull(cotangents: PyTree) -> PyTree:
        # JAX transposes; for complex values the adjoint is what makes F Hermitian.
        (gradient,) = transpose(_conj(cotangents))
        return _conj(gradient)

    return pull


def _conj(values: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.conj(x) if jnp.iscomplexobj(x) else x, values)


class Chunks(NamedTuple):
    """How a batch is cut.

    Attributes:
      leading: the number of examples: leaves whose leading axis is as long are cut
        along it; all others, typed keys and scalars among them, stay whole.
      size: examples in a microbatch; the last one may be shorter.
    """

    leading: int
    size: int

    def cuts(self, leaf: Any) -> bool:
        """Whether `leaf` is cut."""
        return jnp.shape(leaf)[:1] == (self.leading,)


def _split(
    batch: Batch, chunks: Chunks
) -> tuple[list[Any], Callable[[list[Any]], Batch], list[Any]]:
    """Leaves as [chunks, microbatch_size, ...], the way back, and the remainder."""
    leaves, structure = jax.tree.flatten(batch)
    split = [chunks.cuts(leaf) for leaf in leaves]
    count = chunks.leading // chunks.size
    whole = count * chunks.size

    def chunk(leaf: Any) -> Any:
        shape = (count, chunks.size, *jnp.shape(leaf)[1:])
        return jnp.reshape(leaf[:whole], shape)

    def rebuild(values: list[Any]) -> Batch:
        remaining = iter(values)
        merged = [
            next(remaining) if is_split else leaf
            for leaf, is_split in zip(leaves, split, strict=True)
        ]
        return jax.tree.unflatten(structure, merged)

    chosen = [leaf for leaf, is_split in zip(leaves, split, strict=True) if is_split]
    return [chunk(x) for x in chosen], rebuild, [x[whole:] for x in chosen]


def sum_microbatches(
    fn: Callable[[Batch], PyTree], data: Batch, chunks: Chunks
) -> PyTree:
    """Σ fn(microbatch), one microbatch at a time.

    Args:
      fn: returns a tree of arrays whose shapes do not depend on the microbatch.
      data: the batch, and whatever else belongs to its examples.
      chunks: how to cut it.
    """
    stacked, rebuild, rest = _split(data, chunks)
    like = jax.eval_shape(lambda c: fn(rebuild(c)), [x[0] for x in stacked])
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def add(total: PyTree, part: list[Array]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, fn(rebuild(part))), None

    total, _ = jax.lax.scan(add, total, stacked)
    if chunks.leading % chunks.size:
        total, _ = add(total, rest)
    return total


def map_microbatches(
    fn: Callable[[Batch], PyTree], data: Batch, chunks: Chunks
) -> PyTree:
    """Concatenates fn(microbatch) along the leading axis; see `sum_microbatches`."""
    stacked, rebuild, rest = _split(data, chunks)
    mapped = jax.lax.map(lambda part: fn(rebuild(part)), stacked)
    mapped = jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), mapped)
    if chunks.leading % chunks.size:
        last = fn(rebuild(rest))
        mapped = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), mapped, last)
    return mapped


def forward(
    model_fn: ModelFn, params: Params, batch: Batch, chunks: Chunks | None
) -> Outputs:
    """model_fn(params, batch), by microbatches where there are any."""
    if chunks is None:
        return model_fn(params, batch)
    return map_microbatches(lambda part: model_fn(params, part), batch, chunks)
