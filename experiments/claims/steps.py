"""Training steps for the experiments: one compiled scan, and what it records."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.running.optimizers import take_step
from ngd_jax.types import Batch, Params, PyTree

__all__ = ["in_turn", "repeated", "train"]


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


def repeated(batch: Batch, steps: int) -> Batch:
    """The same batch for every step, as `train` takes them."""
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (steps, *leaf.shape)), batch
    )


def in_turn(one: Callable[..., Any], settings: PyTree, *shared: PyTree) -> Any:
    """`one(setting, *shared)` for each of `settings`, stacked; one compiled program.

    Sequentially, not by vmap: on CPU, batched factorisations of jaxlib wait for threads
    of the pool in which they run themselves, and can deadlock if it is small.
    """
    run = jax.jit(
        lambda settings, *shared: jax.lax.map(lambda s: one(s, *shared), settings)
    )
    return jax.tree.map(np.asarray, run(settings, *shared))
