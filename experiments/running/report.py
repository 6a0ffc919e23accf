"""What a run reports while it is running: its files, and rows on the screen.

If a run has several processes, only the first one reports; the others are silent.
"""

import contextlib
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from experiments.running.config import TrainConfig
from experiments.running.logs import RunLogs
from experiments.running.run_folder import write_config, write_environment
from experiments.running.screen import Column, Screen

__all__ = ["Report", "SilentReport"]

Row = dict[str, Any]


class SilentReport(contextlib.ExitStack):
    """Reports nothing; a context manager, as `Report` is.

    Attributes:
      seconds: training time, as last reported.
    """

    seconds: float = 0.0

    def show(self, rows: list[Row], seconds: float) -> None:
        """Reports the steps of a dispatch, after `seconds` of training in all."""
        del rows
        self.seconds = seconds

    def sync(self) -> None:
        """Makes the files durable, as they must be before a checkpoint."""


class Report(SilentReport):
    """Reports on a run in `folder` and on `console`, starting after `step`.

    `notices` are lines to print at the start.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        console: Console,
        step: int,
        title: str,
        columns: tuple[Column, ...],
        notices: list[str],
    ):
        super().__init__()
        self._config, self._folder, self._console = config, folder, console
        self._step, self._title = step, title
        self._columns, self._notices = columns, notices

    def __enter__(self) -> Self:
        notices = self._notices + write_environment(self._folder)
        write_config(self._config, self._folder)
        screen = Screen(
            self._console,
            title=self._title,
            columns=self._columns,
            first_step=self._step,
            last_step=self._config.steps,
            log_every=self._config.log_every,
        )
        self._logs = self.enter_context(RunLogs(self._folder, self._step))
        self._screen = self.enter_context(screen)
        self.seconds = self._logs.seconds
        whence = f"continues after step {self._step}" if self._step else "starts"
        self._screen.say(f"{self._title}: {whence}, in {self._folder}")
        for notice in notices + self._logs.notices:
            self._screen.say(notice)
        return self

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
