"""Passes over a rollout in minibatches, with a first-order optimizer step on each."""

from collections.abc import Callable
from typing import Any

import jax
import optax

__all__ = ["descend"]

PyTree = Any


def descend(
    tx: optax.GradientTransformation,
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    opt_state: PyTree,
    batch: PyTree,
    key: jax.Array,
    epochs: int,
    minibatch_size: int,
) -> tuple[PyTree, PyTree]:
    """Returns parameters and optimizer state after `epochs` passes.

    Args:
      tx: the optimizer.
      loss_fn: (params, minibatch) -> loss.
      params: where to start.
      opt_state: of `tx`.
      batch: leaves with a common leading axis, a multiple of `minibatch_size`.
      key: for the order, which is drawn anew in each pass.
      epochs: number of passes.
      minibatch_size: examples per step.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    grad_fn = jax.grad(loss_fn)

    def step(carry: tuple[PyTree, PyTree], minibatch: PyTree) -> tuple:
        params, opt_state = carry
        updates, opt_state = tx.update(grad_fn(params, minibatch), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(carry: tuple[PyTree, PyTree], key: jax.Array) -> tuple:
        order = jax.random.permutation(key, size)
        parts = jax.tree.map(
            lambda leaf: leaf[order].reshape(-1, minibatch_size, *leaf.shape[1:]), batch
        )
        return jax.lax.scan(step, carry, parts)

    (params, opt_state), _ = jax.lax.scan(
        epoch, (params, opt_state), jax.random.split(key, epochs)
    )
    return params, opt_state
