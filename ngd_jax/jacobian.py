"""A model to first order: J v and its adjoint Jᵀ c, from one run of the model."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.types import Batch, ModelFn, Outputs, Params, PyTree

__all__ = ["Linearization", "adjoint", "linearize"]


class Linearization(NamedTuple):
    """A model at its parameters, to first order.

    Attributes:
      outputs: model_fn(params, batch).
      push: v -> J v, from trees like the parameters, float32 or wider.
      pull: c -> Jᵀ c, the adjoint for ⟨a, b⟩ = Re Σ conj(a) b, float32 or wider.
    """

    outputs: Outputs
    push: Callable[[PyTree], PyTree]
    pull: Callable[[PyTree], PyTree]


def linearize(model_fn: ModelFn, params: Params, batch: Batch) -> Linearization:
    """Runs the model once; see `Linearization`.

    Parameters narrower than float32 are cast inside the differentiated function: the
    model computes what it always does, and the vectors that a solver iterates on keep
    float32.
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
        # JAX transposes; for complex values the adjoint is what makes F symmetric.
        (gradient,) = transpose(_conj(cotangents))
        return _conj(gradient)

    return pull


def _conj(values: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.conj(x) if jnp.iscomplexobj(x) else x, values)
