"""One optimizer with one choice of settings, ready to train: an entry in a race.

    start(seed) -> state    advance(state, num_steps, progress) -> state, last loss

Everything is compiled, and has run once, before the clock starts.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from experiments.benchmarks.space import planned_memory
from experiments.running.optimizers import make_optimizer
from experiments.running.rates import ProgressState, follow_progress
from experiments.tasks import Task, num_examples
from experiments.tasks.supervised.batches import epoch_and_position, epoch_permutation
from experiments.tasks.supervised.training import (
    TrainState,
    init_state,
    make_train_chunk,
)

__all__ = ["Contestant", "OptaxContestant", "Snapshot", "batch_size_of"]

PyTree = Any


class Snapshot(NamedTuple):
    """The part of a state that an evaluation needs.

    Attributes:
      params: parameters of the model.
      model_state: other state of the model.
    """

    params: PyTree
    model_state: PyTree


class OptaxState(NamedTuple):
    """The state of a training run.

    Attributes:
      train: parameters, state of the optimizer and so on.
      epoch: the epoch of the next step.
      permutation: the order of the examples in that epoch. It is kept between
        dispatches: recomputing it for each would count as training time, and penalise
        most the optimizers with long steps, whose dispatches have few of them.
    """

    train: TrainState
    epoch: int
    permutation: jax.Array


class Contestant(Protocol):
    """An optimizer in a race.

    Attributes:
      compile_seconds: CPU seconds until the step was ready to run.
      peak_bytes: memory of a step without the data; None if unknown.
      max_dispatch: largest number of steps in one call of `advance`.
    """

    compile_seconds: float
    max_dispatch: int

    @property
    def peak_bytes(self) -> int | None:
        """See the class docstring."""
        ...

    def start(self, seed: int) -> Any:
        """The state before the first step."""
        ...

    def advance(self, state: Any, num_steps: int, progress: float) -> tuple[Any, float]:
        """Takes steps, and returns the loss of the last one's batch.

        Args:
          state: before the steps.
          num_steps: how many.
          progress: the part of the budget that is spent, for learning rates.
        """
        ...

    def snapshot(self, state: Any) -> Snapshot:
        """The current model."""
        ...


class OptaxContestant:
    """An Optax transformation.

    Args:
      task: the problem.
      optimizer: settings of the transformation.
      data: the training set, on the device.
      batch_size: examples in a batch; None for all.
      max_dispatch: largest number of steps in one dispatch.
      schedule: "constant", or "cosine" for a rate that follows the progress.
    """

    def __init__(
        self,
        task: Task,
        optimizer: Any,
        data: PyTree,
        *,
        batch_size: int | None,
        max_dispatch: int,
        schedule: str,
    ):
        self.max_dispatch = max_dispatch
        self._task, self._data = task, data
        self._size = num_examples(data)
        self._batch_size = batch_size_of(batch_size, data)
        self._permute = jax.jit(epoch_permutation, static_argnums=2)
        make = functools.partial(make_optimizer, task=task)
        self._tx = make(optimizer)
        if schedule == "cosine":
            self._tx = follow_progress(optimizer, make)
        train_chunk = make_train_chunk(
            task,
            self._tx,
            batch_size=self._batch_size,
            steps_per_dispatch=max_dispatch,
            measure_kl=False,
        )
        state = self.start(0)
        start = time.process_time()
        self._advance: Callable[..., Any] = train_chunk.lower(
            state.train, data, jnp.int32(1), state.permutation
        ).compile()
        self.compile_seconds = time.process_time() - start
        data_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(data))
        self.peak_bytes = planned_memory(self._advance).peak - data_bytes  # pyright: ignore[reportArgumentType]
        self.advance(state, 1, 0.0)

    def start(self, seed: int) -> OptaxState:
        """The state before the first step."""
        return self._in_order(init_state(self._task, self._tx, seed))

    def advance(
        self, state: OptaxState, num_steps: int, progress: float
    ) -> tuple[OptaxState, float]:
        """Takes steps, and returns the loss of the last one's batch."""
        train = state.train
        if isinstance(train.opt_state, ProgressState):
            before = train.opt_state.progress
            now = jnp.asarray(progress, before.dtype)
            opt_state = train.opt_state._replace(progress=now)
            train = train._replace(opt_state=opt_state)
        train, records = self._advance(
            train, self._data, jnp.int32(num_steps), state.permutation
        )
        loss = float(jax.block_until_ready(records)["loss"][num_steps - 1])
        return self._in_order(train, state), loss

    def snapshot(self, state: OptaxState) -> Snapshot:
        """The current model."""
        return Snapshot(state.train.params, state.train.model_state)

    def _in_order(
        self, train: TrainState, before: OptaxState | None = None
    ) -> OptaxState:
        epoch, _ = epoch_and_position(int(train.step), self._size, self._batch_size)
        if before is not None and before.epoch == epoch:
            return before._replace(train=train)
        order = self._permute(train.key, jnp.int32(epoch), self._size)
        return OptaxState(train, epoch, jax.block_until_ready(order))


def batch_size_of(batch_size: int | None, data: PyTree) -> int:
    """The number of examples in a batch; all if `batch_size` is None or too large."""
    size = num_examples(data)
    return size if batch_size is None else min(batch_size, size)
