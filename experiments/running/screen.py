"""What a run shows: a row for each step, and a live progress bar on a terminal."""

import os
import sys
from typing import Any, NamedTuple, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.table import Column as TableColumn
from rich.text import Text

import ngd_jax as ngd

__all__ = ["Column", "Screen", "Terminal"]


class Column(NamedTuple):
    """A column of the table of steps.

    Attributes:
      title: its heading.
      name: the name of the value in the record of a step.
      form: format specification.
    """

    title: str
    name: str
    form: str


COLUMNS = (
    Column("step", "step", "d"),
    Column("loss", "loss", ".2e"),
    Column("accuracy", "accuracy", ".1%"),
    Column("KL/nats", "measured_kl", ".2e"),
    Column("radius", "max_kl", ".2e"),
    Column("solver", "solver_steps", "d"),
    Column("search", "linesearch_steps", "d"),
    Column("damping", "damping", ".2e"),
)
MIN_WIDTH = 8
# Short enough for a terminal of 80 columns.
BAR_COLUMNS = (
    Column("loss", "loss", ".1e"),
    Column("acc", "accuracy", ".0%"),
    Column("KL", "measured_kl", ".1e"),
    Column("radius", "max_kl", ".1e"),
    Column("solver", "solver_steps", "d"),
    Column("search", "linesearch_steps", "d"),
)
BAR_WIDTH = 6


class Terminal(Console):
    """A console that falls silent when its reader is gone, as with `| head`."""

    def on_broken_pipe(self) -> None:
        """Ends the output, but not the program as `Console` does."""
        self.quiet = True
        # Covers later prints, and what Python flushes on exit.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


class StepsPerSecond(ProgressColumn):
    """Speed over the last few moments."""

    def render(self, task: Task) -> Text:
        """Returns the speed of `task`."""
        # `finished_speed` includes the time spent compiling.
        speed = task.speed or task.finished_speed
        return Text(f"{speed:.1f} steps/s" if speed else "", no_wrap=True)


class Screen:
    """Shows the steps of a run as they come; a context manager.

    Args:
      console: where to print.
      title: what the run is.
      columns: those after the common ones; they need not be known at every step.
      first_step: steps taken before.
      last_step: total number of steps of the run.
      log_every: steps between rows.
    """

    def __init__(
        self,
        console: Console,
        *,
        title: str,
        columns: tuple[Column, ...],
        first_step: int,
        last_step: int,
        log_every: int,
    ):
        self._console = console
        self._log_every = log_every
        self._last_step = last_step
        self._last_columns = columns
        self._columns: list[Column] = []
        # Without a terminal, only the rows show how far the run is.
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(BAR_WIDTH),
            TextColumn("{task.description}", table_column=TableColumn(no_wrap=True)),
            StepsPerSecond(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            f"{title}: compiling", total=last_step, completed=first_step
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, message: str) -> None:
        """Prints one line that is not about a step."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def show_step(self, record: dict[str, Any]) -> None:
        """Prints the row of a step if one is due, and a heading above the first."""
        if not self._columns:
            own = {column.name for column in self._last_columns}
            common = [c for c in COLUMNS if c.name in record and c.name not in own]
            self._columns = [*common, *self._last_columns]
            titles = (f"{column.title:>{_width(column)}}" for column in self._columns)
            self.say(" ".join(titles))
        step = record["step"]
        if step % self._log_every and step != self._last_step:
            return
        cells = (
            f"{_cell(column, record):>{_width(column)}}" for column in self._columns
        )
        status = record.get("status")
        trouble = f"  {ngd.StepStatus(status).message}" if status else ""
        self.say(" ".join(cells).rstrip() + trouble)

    def show_progress(self, record: dict[str, Any]) -> None:
        """Moves the bar to the step of `record`, and shows its numbers."""
        description = " ".join(
            f"{column.title} {_cell(column, record)}"
            for column in BAR_COLUMNS
            if column.name in record
        )
        self._progress.update(
            self._task, completed=record["step"], description=description
        )


def _width(column: Column) -> int:
    return 5 if column.form == "d" else max(MIN_WIDTH, len(column.title))


def _cell(column: Column, record: dict[str, Any]) -> str:
    if column.name not in record:
        return ""
    value = record[column.name]
    return "nan" if value is None else format(value, column.form)
