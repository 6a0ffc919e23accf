"""Training steps for the experiments: one compiled scan, and what it records."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from experiments.running.optimizers import take_step
from ngd_jax.types import Batch, Params, PyTree

__all__ = ["train"]


def train(
    tx: optax.GradientTransformation,
    loss_fn: Callable[[Params, Batch], jax.Array],
    params: Params,
    batches: Batch,
    observe: Callable[[Params, Params, PyTree, Batch], Any],
) -> tuple[Params, Any]:
    """Takes a step on each of `batches`, in one compiled `lax.scan`.

    Args:
      tx: any Optax transformation, including the natural gradient.
      loss_fn: (params, batch) -> the mean loss.
      params: where to start.
      batches: the batch of each step, stacked along a leading axis.
      observe: (params before, params after, optimizer state after, batch) -> what to
        record of the step, a tree of arrays.

    Returns:
      the parameters after the last step, and the records, stacked.
    """
    tx = optax.with_extra_args_support(tx)

    def step(carry: Any, batch: Batch) -> tuple[Any, Any]:
        params, state = carry
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        moved, state, _ = take_step(tx, loss_fn, params, state, batch, value, grads)
        return (moved, state), observe(params, moved, state, batch)

    # Pass arrays as arguments: the compiler would fold constants.
    @jax.jit
    def run(params: Params, batches: Batch) -> Any:
        return jax.lax.scan(step, (params, tx.init(params)), batches)

    (params, _), kept = run(params, batches)
    return params, kept
