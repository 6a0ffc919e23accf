"""A whole run: dispatches of steps, evaluations, logs, checkpoints, and a clean stop.

    restore -> [ steps -> evaluate -> logs -> checkpoint ] ... -> result, curves

When a checkpoint is saved, the logs up to that step are on the disk, so killing the
process at any moment only loses steps that a resumed run takes again.
"""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import ngd_jax as ngd
from experiments.running.checkpoints import Checkpoints
from experiments.running.config import TrainConfig
from experiments.running.distributed import any_process
from experiments.running.interruption import StopRequest
from experiments.running.learner import Learner, Rows, State
from experiments.running.logs import plain_number
from experiments.running.report import Report, SilentReport
from experiments.running.run_folder import (
    describe_resumption,
    locked,
    read_json_lines,
    write_json,
)
from experiments.running.schedule import next_stop
from experiments.running.settings import ConfigError
from experiments.tasks.learners import make_learner
from experiments.tasks.supervised.task import find_non_finite

__all__ = ["Result", "describe_result", "run_training"]


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a run.

    Attributes:
      steps: steps taken.
      finished: whether these are all steps of the run.
      metrics: results of the last evaluation; empty if the run was stopped before its
        end.
      seconds: training time over all resumptions, without compiling and evaluating.
      compile_seconds: time to compile the training step, this time.
      state: the learner's state after the last step.
      failure: why nothing was learned, if so.
    """

    steps: int
    finished: bool
    metrics: dict[str, float | int | None]
    seconds: float
    compile_seconds: float
    state: Any
    failure: str | None = None


def run_training(config: TrainConfig, folder: Path, console: Console) -> Result:
    """Trains as `config` says, in `folder`, from the last checkpoint if there is one.

    Raises:
      ConfigError: the configuration does not fit the task or the run in the folder.
    """
    precision = getattr(config.task, "precision", "float32")
    with contextlib.ExitStack() as stack:
        # For this thread only.
        stack.enter_context(jax.enable_x64(precision == "float64"))
        learner = make_learner(config)
        if jax.process_index() == 0:
            stack.enter_context(locked(folder))
        stop = stack.enter_context(StopRequest())
        return _run(learner, config, folder, console, stop)


def _run(
    learner: Learner,
    config: TrainConfig,
    folder: Path,
    console: Console,
    stop: StopRequest,
) -> Result:
    title = _title(config)
    is_first = jax.process_index() == 0
    checkpoints = Checkpoints(folder / "checkpoints")
    first_state = learner.first_state
    state = checkpoints.restore_latest(first_state) or first_state
    step = int(state.step)
    if step > config.steps:
        raise ConfigError(
            f"`steps` must be at least the {step} steps that the run in {folder} "
            f"has taken, got {config.steps}."
        )
    if jax.process_count() == 1:  # several processes end together, between steps
        stop.last_line = _describe_stop(step, config, folder)
    report = SilentReport()
    if is_first:
        notices, columns = checkpoints.notices, learner.columns
        report = Report(config, folder, console, step, title, columns, notices)
    with report:
        result = _train(learner, config, state, stop, checkpoints, report)
    summary = {
        "steps": result.steps,
        **result.metrics,
        "seconds": round(result.seconds, 3),
        "compile_seconds": round(result.compile_seconds, 3),
    }
    if is_first:
        if result.finished:
            write_json(folder / "result.json", summary)
        records = read_json_lines(folder / "metrics.jsonl")
        timings = read_json_lines(folder / "timings.jsonl")
        times = {timing["step"]: timing for timing in timings}
        records = [times.get(record["step"], {}) | record for record in records]
        learner.draw(result.state, records, folder, title)
        if result.finished:
            failure = _find_failure(learner, records, result.metrics)
            result = dataclasses.replace(result, failure=failure)
    return result


def describe_result(result: Result, config: TrainConfig, folder: Path) -> str:
    """Returns the last line of a run: its results, and where everything is."""
    if not result.finished:
        return _describe_stop(result.steps, config, folder)
    values = ", ".join(
        f"{name.replace('_', ' ').replace('train', 'training')} {_format(name, value)}"
        for name, value in result.metrics.items()
        if name == "train_loss" or name.startswith("test_")
    )
    return (
        f"{_title(config)}: {values} after {result.steps} steps and "
        f"{result.seconds:.1f} s of training (compiled in {result.compile_seconds:.1f} "
        f"s). Everything is in {folder}"
    )


def _title(config: TrainConfig) -> str:
    # "trpo" is both a task and an optimizer.
    names = dict.fromkeys((config.task.name, config.optimizer["name"]))
    return f"{', '.join(names)}, seed {config.seed}"


def _describe_stop(step: int, config: TrainConfig, folder: Path) -> str:
    return (
        f"Stopped after step {step} of {config.steps}; to go on: "
        f"{describe_resumption(folder, config.distributed.num_processes)}"
    )


def _find_failure(
    learner: Learner, records: Rows, metrics: dict[str, Any]
) -> str | None:
    """Returns why nothing was learned; None if something was, or if nobody knows."""
    statuses = [record.get("status") for record in records]
    is_stuck = bool(statuses) and not any(
        status is None or ngd.StepStatus(status).is_taken for status in statuses
    )
    if not is_stuck and metrics.get("train_loss", 0.0) is not None:
        return None
    cause = find_non_finite(learner.train_data)
    if is_stuck:
        cause = cause or ngd.StepStatus(statuses[-1]).message.removesuffix(".")
        return f"No step was taken: {cause}."
    return cause and f"The loss is not finite: {cause}."


def _train(
    learner: Learner,
    config: TrainConfig,
    state: State,
    stop: StopRequest,
    checkpoints: Checkpoints,
    report: SilentReport,
) -> Result:
    """Takes the remaining steps, until `stop` is requested."""
    step = saved_step = int(state.step)
    seconds, metrics, compile_seconds = report.seconds, {}, 0.0
    if step < config.steps:
        started = time.perf_counter()
        with learner.start(state) as advance:
            compile_seconds = time.perf_counter() - started
            stop.last_line = None
            while step < config.steps and not any_process(stop.requested):
                num_steps = next_stop(step, config) - step
                started = time.perf_counter()
                state, records = advance(state, num_steps)
                records = jax.device_get(records)
                seconds += time.perf_counter() - started
                rows = _rows(records, config, step, num_steps)
                step += num_steps
                if step % config.eval_every == 0 or step == config.steps:
                    metrics = _evaluate(learner, state)
                    rows[-1].update(metrics)
                report.show(rows, seconds)
                if step % config.checkpoint_every == 0:
                    _save(state, checkpoints, report)
                    saved_step = step
    if saved_step != step:
        _save(state, checkpoints, report)
    finished = step == config.steps
    if finished and not metrics:
        metrics = _evaluate(learner, state)
    return Result(
        steps=step,
        finished=finished,
        metrics=metrics if finished else {},
        seconds=seconds,
        compile_seconds=compile_seconds,
        state=state,
    )


def _rows(
    records: dict[str, Any], config: TrainConfig, step: int, num_steps: int
) -> Rows:
    radius = config.optimizer.get("max_kl")
    constants = {"max_kl": radius} if isinstance(radius, int | float) else {}
    rows = [
        {
            "step": step + index + 1,
            **constants,
            **{name: plain_number(leaf[index]) for name, leaf in records.items()},
        }
        for index in range(num_steps)
    ]
    for row in rows:
        if row.get("solver_status") == ngd.SolverStatus.UNCHECKED:
            del row["solver_residual"]  # KFAC does not compute it
    return rows


def _evaluate(learner: Learner, state: State) -> dict[str, float | int | None]:
    values = learner.evaluate(state)
    return {name: plain_number(value) for name, value in values.items()}


def _save(state: State, checkpoints: Checkpoints, report: SilentReport) -> None:
    # In this order: a checkpoint promises that the logs reach up to it.
    report.sync()
    checkpoints.save(state)


def _format(name: str, value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.2%}" if name.endswith("accuracy") else f"{value:.3g}"
