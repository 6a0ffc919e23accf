"""What a run tells while it goes and after it: its files, and rows on the screen.

In a run of several processes the first one tells; the report of the others is silent.
"""

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from experiments.config import TrainConfig
from experiments.logs import RunLogs
from experiments.plots import plot_curves
from experiments.run_folder import (
    read_json_lines,
    write_config,
    write_environment,
    write_json,
)
from experiments.screen import Screen

__all__ = ["Report", "SilentReport"]

Row = dict[str, Any]


class SilentReport:
    """Tells nothing; a context manager, as `Report` is.

    Attributes:
      seconds: of training, as last told.
    """

    seconds: float = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def show(self, rows: list[Row], seconds: float) -> None:
        """Tells of the steps of a dispatch, after `seconds` of training in all."""
        del rows
        self.seconds = seconds

    def sync(self) -> None:
        """Makes the files durable, as they must be before a checkpoint."""

    def finish(self, summary: Row | None) -> None:
        """Draws the curves; writes the result of a run that reached its end."""


class Report(SilentReport):
    """Tells of a run in `folder` and on `console`, from after `step` on."""

    def __init__(self, config: TrainConfig, folder: Path, console: Console, step: int):
        self._config = config
        self._folder = folder
        self._console = console
        self._step = step
        self._title = f"{config.task.name}, {config.optimizer.name}, seed {config.seed}"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        differences = write_environment(self._folder)
        write_config(self._config, self._folder)
        screen = Screen(
            self._console,
            title=self._title,
            first_step=self._step,
            last_step=self._config.steps,
            log_every=self._config.log_every,
        )
        self._logs = self._stack.enter_context(RunLogs(self._folder, self._step))
        self._screen = self._stack.enter_context(screen)
        self.seconds = self._logs.seconds
        whence = f"continues after step {self._step}" if self._step else "starts"
        self._screen.say(f"{self._title}: {whence}, in {self._folder}")
        for difference in differences:
            self._screen.say(f"Not the environment of before: {difference}.")
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(exc_type, exc, traceback)

    def show(self, rows: list[Row], seconds: float) -> None:
        """Logs the steps of a dispatch and shows those that are due."""
        for row in rows:
            self._logs.write_step(row)
            self._screen.show_step(row)
        self._screen.show_progress(rows[-1])
        self._logs.write_time(rows[-1]["step"], seconds)
        self.seconds = seconds

    def sync(self) -> None:
        """Makes the logs durable, as they must be before a checkpoint."""
        self._logs.sync()

    def finish(self, summary: Row | None) -> None:
        """Draws the curves; writes the result of a run that reached its end."""
        if summary is not None:
            write_json(self._folder / "result.json", summary)
        records = read_json_lines(self._folder / "metrics.jsonl")
        plot_curves(records, self._folder / "curves.png", self._title)
