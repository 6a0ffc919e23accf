"""The learner of a `Task`: optimizer steps on batches of a data set."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.running.config import TrainConfig
from experiments.running.distributed import (
    examples_sharding,
    make_mesh,
    replicated,
)
from experiments.running.learner import Advance, Records, Rows
from experiments.running.optimizers import make_optimizer
from experiments.running.plots import plot_curves
from experiments.running.schedule import next_stop
from experiments.running.screen import Column
from experiments.running.settings import ConfigError
from experiments.tasks import Task, num_examples
from experiments.tasks.supervised.streaming import HostBatches, size_in_mib, stream
from experiments.tasks.supervised.training import (
    TrainState,
    init_state,
    make_evaluate_fn,
    make_train_chunk,
)

__all__ = ["SupervisedLearner"]

PyTree = Any


class SupervisedLearner:
    """Trains the model of `task` by the optimizer of `config`; see `Learner`.

    Raises:
      ConfigError: the configuration does not fit the task.
    """

    def __init__(self, config: TrainConfig, task: Task):
        self._config = config
        size = num_examples(task.train)
        batch_size = config.batch_size or size
        if batch_size > size:
            raise ConfigError(
                f"`batch_size` must be at most the {size} training examples of "
                f"{config.task.name}, got {batch_size}."
            )
        tx = make_optimizer(config.optimizer, task)
        mesh = make_mesh()
        self._mesh, self._batch_size = mesh, batch_size
        limit = config.stream_above
        self._is_streamed = limit is not None and size_in_mib(task.train) > limit
        self.train_data = task.train
        self._train, test = task.train, jax.device_put(task.test, replicated(mesh))
        if not self._is_streamed:
            self._train = jax.device_put(task.train, replicated(mesh))
        evaluated = slice(config.eval_train_examples)
        train = jax.tree.map(lambda leaf: leaf[evaluated], self._train)
        self._evaluated = {"train": train, "test": test}
        self._train_chunk = make_train_chunk(
            task,
            tx,
            batch_size=batch_size,
            steps_per_dispatch=config.steps_per_dispatch,
            measure_kl=config.measure_kl,
            mesh=mesh,
            is_streamed=self._is_streamed,
        )
        self._evaluate = make_evaluate_fn(
            task, batch_size=config.eval_batch_size, mesh=mesh
        )
        self.first_state = init_state(task, tx, config.seed, mesh=mesh)
        self._metric = _first_metric(task, self.first_state)
        self.columns = _columns(self._metric)

    @contextlib.contextmanager
    def start(self, state: TrainState) -> Iterator[Advance]:
        """Yields the compiled `advance(state, num_steps)`; starts to fetch batches."""
        train_chunk = self._train_chunk.lower(state, self._like_data(), np.int32(0))
        train_chunk = train_chunk.compile()
        with self._data_of_dispatches(state) as data_of_dispatches:

            def advance(
                state: TrainState, num_steps: int
            ) -> tuple[TrainState, Records]:
                data = next(data_of_dispatches)
                return train_chunk(state, data, np.int32(num_steps))

            yield advance

    def evaluate(self, state: TrainState) -> dict[str, Any]:
        """Returns the loss and metrics on the training set and on the test set."""
        return {
            f"{prefix}_{name}": value
            for prefix in ("train", "test")
            for name, value in sorted(
                self._evaluate(state, self._evaluated[prefix]).items(), reverse=True
            )
        }

    def draw(self, state: TrainState, records: Rows, folder: Path, title: str) -> None:
        """Draws the curves of the run."""
        del state
        plot_curves(records, folder / "curves.png", title, metric=self._metric)

    def _like_data(self) -> PyTree:
        """The data argument of a dispatch, or its shape."""
        if not self._is_streamed:
            return self._train
        stacked = (self._config.steps_per_dispatch, self._batch_size)
        sharding = examples_sharding(self._mesh, self._batch_size, axis=1)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (*stacked, *leaf.shape[1:]), leaf.dtype, sharding=sharding
            ),
            self._train,
        )

    def _data_of_dispatches(
        self, state: TrainState
    ) -> contextlib.AbstractContextManager[Iterator[PyTree]]:
        """Iterates over the data of each dispatch from `state` on."""
        config = self._config
        if not self._is_streamed:
            return contextlib.nullcontext(itertools.repeat(self._train))
        batches = HostBatches(
            self._train,
            state.key,
            batch_size=self._batch_size,
            capacity=config.steps_per_dispatch,
        )

        def plan(step: int) -> Iterator[tuple[int, int]]:
            while step < config.steps:
                end = next_stop(step, config)
                yield step, end - step
                step = end

        return stream(
            batches, plan(int(state.step)), prefetch=config.prefetch, mesh=self._mesh
        )


def _first_metric(task: Task, state: TrainState) -> str | None:
    def metrics(params: PyTree, model_state: PyTree, batch: PyTree) -> PyTree:
        return task.metrics_fn(task.predict(params, model_state, batch), batch)

    example = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), task.test
    )
    names = jax.eval_shape(metrics, state.params, state.model_state, example)
    return next(iter(names), None)


def _columns(metric: str | None) -> tuple[Column, ...]:
    if metric == "accuracy":
        last = Column("test acc", "test_accuracy", ".1%")
    else:
        name = "loss" if metric is None else metric
        last = Column(f"test {name.replace('_', ' ')}", f"test_{name}", ".2e")
    return (Column("train loss", "train_loss", ".2e"), last)
