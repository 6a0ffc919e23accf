"""Which examples are in the batch of a step: a pure function of the key and the step.

Each epoch is a new permutation of the training set, cut into batches; examples that do
not fill a batch are dropped for that epoch. Since batches depend only on the key and
the step, a resumed run sees the same batches as a run that was never stopped.
"""

from typing import Any, TypeVar

import jax

__all__ = ["epoch_and_position", "epoch_permutation", "take_batch"]

PyTree = Any
Step = TypeVar("Step", int, jax.Array)


def epoch_and_position(
    step: Step, num_examples: int, batch_size: int
) -> tuple[Step, Step]:
    """Returns the epoch of `step`, and the position of its batch in that epoch."""
    batches_per_epoch = num_examples // batch_size
    return step // batches_per_epoch, step % batches_per_epoch


def epoch_permutation(key: jax.Array, epoch: jax.Array, num_examples: int) -> jax.Array:
    """Returns the order `[num_examples]` in which `epoch` visits the examples."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)


def take_batch(
    data: PyTree, permutation: jax.Array, position: jax.Array, batch_size: int
) -> PyTree:
    """Gathers batch number `position` of the epoch with this permutation."""
    indices = jax.lax.dynamic_slice_in_dim(
        permutation, position * batch_size, batch_size
    )
    return jax.tree.map(lambda leaf: leaf[indices], data)
