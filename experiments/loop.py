"""A whole run: dispatches of steps, evaluations, logs, checkpoints, and a clean stop.

    restore -> [ steps -> evaluate -> logs -> checkpoint ] ... -> result, curves

At a checkpoint the logs are on the disk up to that step, so that killing the process at
any moment loses only steps that a resumed run takes again.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments.checkpoints import Checkpoints
from experiments.config import TrainConfig
from experiments.distributed import any_process, make_mesh, replicated
from experiments.interruption import StopRequest
from experiments.logs import plain_number
from experiments.optimizers import make_optimizer
from experiments.report import Report, SilentReport
from experiments.run_folder import describe_resumption
from experiments.settings import ConfigError
from experiments.streaming import HostBatches, size_in_mib, stream
from experiments.tasks import make_task, num_examples
from experiments.training import (
    TrainState,
    init_state,
    make_evaluate_fn,
    make_train_chunk,
)

__all__ = ["Result", "describe_result", "next_stop", "run_training"]

PyTree = Any
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
      steps: steps taken.
      finished: whether these are all.
      metrics: losses and metrics on the whole training and test sets; empty where the
        run was stopped before its end.
      seconds: of training, over all resumptions, without compiling and evaluating.
      compile_seconds: of compiling the training step, this time.
      state: the training state after the last step.
    """

    steps: int
    finished: bool
    metrics: dict[str, float | int | None]
    seconds: float
    compile_seconds: float
    state: TrainState


def next_stop(step: int, config: TrainConfig) -> int:
    """Returns the step at which Python must look again, after `step`."""
    intervals = (
        config.steps_per_dispatch,
        config.eval_every,
        config.checkpoint_every,
    )
    return min(config.steps, *((step // every + 1) * every for every in intervals))


def run_training(config: TrainConfig, folder: Path, console: Console) -> Result:
    """Trains as `config` says, in `folder`, from its last checkpoint if it has one.

    Raises:
      ConfigError: the configuration does not fit the task or the run in the folder.
    """
    run = _Run(config)
    with StopRequest() as stop, Checkpoints(folder / "checkpoints") as checkpoints:
        state = checkpoints.restore_latest(run.first_state) or run.first_state
        step = int(state.step)
        if step > config.steps:
            raise ConfigError(
                f"`steps` must be at least the {step} steps that the run in {folder} "
                f"has taken, got {config.steps}."
            )
        is_first = jax.process_index() == 0
        report = Report(config, folder, console, step) if is_first else SilentReport()
        with report:
            result = run.train(state, stop, checkpoints, report)
    summary = {
        "steps": result.steps,
        **result.metrics,
        "seconds": round(result.seconds, 3),
        "compile_seconds": round(result.compile_seconds, 3),
    }
    report.finish(summary if result.finished else None)
    return result


def describe_result(result: Result, config: TrainConfig, folder: Path) -> str:
    """Returns the last line of a run: what came out, and where everything is."""
    if not result.finished:
        return (
            f"Stopped after step {result.steps} of {config.steps}; to go on: "
            f"{describe_resumption(folder, config.distributed.num_processes)}"
        )
    values = ", ".join(
        f"{name.replace('_', ' ').replace('train', 'training')} {_format(name, value)}"
        for name, value in result.metrics.items()
        if name == "train_loss" or name.startswith("test_")
    )
    return (
        f"{config.task.name}, {config.optimizer.name}, seed {config.seed}: {values} "
        f"after {result.steps} steps and {result.seconds:.1f} s of training "
        f"(compiled in {result.compile_seconds:.1f} s). All of it is in {folder}"
    )


class _Run:
    """The parts of one run, put together from its configuration."""

    def __init__(self, config: TrainConfig):
        self._config = config
        task = make_task(config.task)
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

    def train(
        self,
        state: TrainState,
        stop: StopRequest,
        checkpoints: Checkpoints,
        report: SilentReport,
    ) -> Result:
        """Takes the steps that are left, until `stop` is requested."""
        config = self._config
        step = saved_step = int(state.step)
        seconds, metrics = report.seconds, {}
        train_chunk, compile_seconds = self._train_chunk, 0.0
        if step < config.steps:
            started = time.perf_counter()
            train_chunk = train_chunk.lower(state, self._like_data(), np.int32(0))
            train_chunk = train_chunk.compile()
            compile_seconds = time.perf_counter() - started
        with self._data_of_dispatches(state) as data_of_dispatches:
            while step < config.steps and not any_process(stop.requested):
                num_steps = next_stop(step, config) - step
                started = time.perf_counter()
                data = next(data_of_dispatches)
                state, records = train_chunk(state, data, np.int32(num_steps))
                records = jax.device_get(records)
                seconds += time.perf_counter() - started
                rows = self._rows(records, step, num_steps)
                step += num_steps
                if step % config.eval_every == 0 or step == config.steps:
                    metrics = self._evaluate_all(state)
                    rows[-1].update(metrics)
                report.show(rows, seconds)
                if step % config.checkpoint_every == 0:
                    _save(state, checkpoints, report)
                    saved_step = step
        if saved_step != step:
            _save(state, checkpoints, report)
        finished = step == config.steps
        if finished and not metrics:
            metrics = self._evaluate_all(state)
        return Result(
            steps=step,
            finished=finished,
            metrics=metrics if finished else {},
            seconds=seconds,
            compile_seconds=compile_seconds,
            state=state,
        )

    def _like_data(self) -> PyTree:
        """What a dispatch is given as data, or its shape."""
        if not self._is_streamed:
            return self._train
        stacked = (self._config.steps_per_dispatch, self._batch_size)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (*stacked, *leaf.shape[1:]), leaf.dtype, sharding=replicated(self._mesh)
            ),
            self._train,
        )

    def _data_of_dispatches(
        self, state: TrainState
    ) -> contextlib.AbstractContextManager[Iterator[PyTree]]:
        """The data of each dispatch from `state` on, one after the other."""
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

    def _rows(self, records: dict[str, Any], step: int, num_steps: int) -> list[Row]:
        radius = getattr(self._config.optimizer, "max_kl", None)
        constants = {} if radius is None else {"max_kl": radius}
        return [
            {
                "step": step + index + 1,
                **{name: plain_number(leaf[index]) for name, leaf in records.items()},
                **constants,
            }
            for index in range(num_steps)
        ]

    def _evaluate_all(self, state: TrainState) -> dict[str, float | int | None]:
        return {
            f"{prefix}_{name}": plain_number(value)
            for prefix in ("train", "test")
            for name, value in sorted(
                self._evaluate(state, self._evaluated[prefix]).items(), reverse=True
            )
        }


def _save(state: TrainState, checkpoints: Checkpoints, report: SilentReport) -> None:
    # In this order: a checkpoint promises that the logs reach up to it.
    report.sync()
    checkpoints.save(state)


def _format(name: str, value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.2%}" if name.endswith("accuracy") else f"{value:.3g}"
