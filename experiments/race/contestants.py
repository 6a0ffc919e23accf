"""One optimizer with one choice of settings, ready to train: what a race runs.

    start(seed) -> state        advance(state, num_steps) -> state, loss of last batch

Everything is compiled, and has run once, before the clock starts.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from experiments.measure.space import planned_memory
from experiments.optimizers import make_optimizer
from experiments.tasks import Task, num_examples
from experiments.training import TrainState, init_state, make_train_chunk

__all__ = ["Contestant", "OptaxContestant", "Snapshot", "batch_size_of"]

PyTree = Any


class Snapshot(NamedTuple):
    """What an evaluation needs of a state.

    Attributes:
      params: parameters of the model.
      model_state: what else the model carries.
    """

    params: PyTree
    model_state: PyTree


class Contestant(Protocol):
    """An optimizer in a race.

    Attributes:
      compile_seconds: CPU seconds until the step could run.
      peak_bytes: memory of a step without the data; None where it is not known.
      max_dispatch: steps at most in one call of `advance`.
    """

    compile_seconds: float
    max_dispatch: int

    @property
    def peak_bytes(self) -> int | None:
        """As said above."""
        ...

    def start(self, seed: int) -> Any:
        """The state before the first step."""
        ...

    def advance(self, state: Any, num_steps: int) -> tuple[Any, float]:
        """Takes steps, of which the last one's batch had the loss that is returned."""
        ...

    def snapshot(self, state: Any) -> Snapshot:
        """The model as it is."""
        ...


class OptaxContestant:
    """An Optax transformation.

    Args:
      task: the problem.
      optimizer: settings of the transformation.
      data: the training set, on the device.
      batch_size: examples in a batch; None for all.
      max_dispatch: steps at most in one dispatch.
    """

    def __init__(
        self,
        task: Task,
        optimizer: Any,
        data: PyTree,
        *,
        batch_size: int | None,
        max_dispatch: int,
    ):
        self.max_dispatch = max_dispatch
        self._task, self._data = task, data
        self._tx = make_optimizer(optimizer, task)
        train_chunk = make_train_chunk(
            task,
            self._tx,
            batch_size=batch_size_of(batch_size, data),
            steps_per_dispatch=max_dispatch,
            measure_kl=False,
        )
        state = self.start(0)
        start = time.process_time()
        self._advance: Callable[..., Any] = train_chunk.lower(
            state, data, jnp.int32(1)
        ).compile()
        self.compile_seconds = time.process_time() - start
        data_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(data))
        self.peak_bytes = planned_memory(self._advance).peak - data_bytes  # pyright: ignore[reportArgumentType]
        self.advance(state, 1)

    def start(self, seed: int) -> TrainState:
        """The state before the first step."""
        return init_state(self._task, self._tx, seed)

    def advance(self, state: TrainState, num_steps: int) -> tuple[TrainState, float]:
        """Takes steps, of which the last one's batch had the loss that is returned."""
        state, records = self._advance(state, self._data, jnp.int32(num_steps))
        return state, float(jax.block_until_ready(records)["loss"][num_steps - 1])

    def snapshot(self, state: TrainState) -> Snapshot:
        """The model as it is."""
        return Snapshot(state.params, state.model_state)


def batch_size_of(batch_size: int | None, data: PyTree) -> int:
    """The number of examples of a batch: all where `batch_size` is None or more."""
    size = num_examples(data)
    return size if batch_size is None else min(batch_size, size)
