"""The results of a sweep: a table and a picture of its runs.

Runs that differ only in the seed belong to one setting, whose figures are the median
over seeds, with the lowest and the highest.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich import box
from rich.table import Table

from experiments.running.plots import add_legend, series, write_figure
from experiments.running.run_folder import read_json_lines, shorten
from experiments.running.screen import Terminal

__all__ = ["Run", "SweepReport", "draw_sweep", "label_runs", "sweep_table"]

# The best setting has the lowest or the highest median of the first of these metrics
# that the runs have.
GOALS: dict[str, Callable[[Iterable[float]], float]] = {
    "test_return": max,
    "test_l2_error": min,
    "test_energy": min,
    "train_loss": min,
}
SEED = "seed"
MAX_LABEL = 30  # longer labels are wrapped


class Run(NamedTuple):
    """One run of a sweep.

    Attributes:
      overrides: those of its command line, `{name: value}`.
      folder: its run folder.
    """

    overrides: dict[str, str]
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        """Its final figures; empty if it has not finished."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / "result.json").read_text())
        return {}


class SweepReport(Callback):
    """Collects the runs of a sweep and reports on them at the end."""

    def __init__(self) -> None:
        self._runs: list[Run] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Records a run."""
        del config
        assert job_return.hydra_cfg is not None
        words = [word.partition("=") for word in job_return.overrides or ()]
        overrides = {name.lstrip("+~"): value for name, _, value in words}
        folder = Path(job_return.hydra_cfg.hydra.runtime.output_dir)
        self._runs.append(Run(overrides, folder))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Prints the table and draws the picture."""
        del config
        groups = label_runs(self._runs)
        folder = self._runs[0].folder.parent
        if (table := sweep_table(groups)) is None:
            return
        # A file has as much room as needed, a terminal only its own width.
        width = None if sys.stdout.isatty() else 200
        console = Terminal(width=width, soft_wrap=True, highlight=False, markup=False)
        console.print(table)
        path = folder / "sweep.png"
        draw_sweep(groups, path)
        console.print(f"The losses of all runs are in {shorten(path)}")


def label_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """Groups runs by their overrides other than the seed; labels tell them apart."""
    names = dict.fromkeys(name for run in runs for name in run.overrides)
    varied = [
        name
        for name in names
        if name != SEED and len({run.overrides.get(name) for run in runs}) > 1
    ]
    ends = [name.rpartition(".")[2] for name in varied]
    short = ends if len(set(ends)) == len(ends) else varied
    groups: dict[str, list[Run]] = {}
    for run in runs:
        values = [run.overrides.get(name, "-") for name in varied]
        words = [f"{name}={value}" for name, value in zip(short, values, strict=True)]
        groups.setdefault(" ".join(words) or "all runs", []).append(run)
    return groups


def sweep_table(groups: dict[str, list[Run]]) -> Table | None:
    """The figures of each setting over its seeds, with the best setting marked.

    Returns None if no run has finished.
    """
    results = {
        label: [run.result for run in runs if run.result]
        for label, runs in groups.items()
    }
    found = [result for some in results.values() for result in some]
    names = [
        name
        for name in dict.fromkeys(name for result in found for name in result)
        if name.startswith(("train_", "test_"))
    ]
    if not names:
        return None
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    table.add_column("setting", no_wrap=len(max(groups, key=len)) < MAX_LABEL)
    table.add_column("finished", no_wrap=True)
    for name in names:
        table.add_column(name.replace("_", " "), overflow="fold")
    goal = next((name for name in GOALS if name in names), None)
    best = None if goal is None else _best(results, goal)
    if goal is not None and best is not None:
        table.caption = "* lowest" if GOALS[goal] is min else "* highest"
        table.caption += f" median of {goal.replace('_', ' ')}"
    for label, runs in groups.items():
        cells = [_cell(_values(results[label], name)) for name in names]
        mark = " *" if label == best else ""
        table.add_row(label + mark, f"{len(results[label])} of {len(runs)}", *cells)
    return table


def _best(results: dict[str, list[dict[str, Any]]], goal: str) -> str | None:
    values = {label: _values(some, goal) for label, some in results.items()}
    medians = {label: float(np.median(some)) for label, some in values.items() if some}
    if not medians:
        return None
    target = GOALS[goal](medians.values())
    return next(label for label, median in medians.items() if median == target)


def draw_sweep(groups: dict[str, list[Run]], path: Path) -> None:
    """Draws the loss of each setting over steps: its median and range over seeds."""
    height = 4.5 + 0.2 * len(groups)  # at most one legend line per group
    figure = Figure(figsize=(7.5, height), layout="constrained")
    axis = figure.subplots()
    lowest = np.inf
    for label, runs in groups.items():
        curves = [_loss_of(run) for run in runs]
        curves = [curve for curve in curves if curve[0].size]
        if not curves:
            continue
        steps = max((curve[0] for curve in curves), key=len)
        losses = np.full((len(curves), len(steps)), np.nan)
        for row, (_, values) in zip(losses, curves, strict=True):
            row[: len(values)] = values
        known = np.isfinite(losses).any(axis=0)  # none after all runs have diverged
        if not known.any():
            continue
        steps, losses = steps[known], losses[:, known]
        low, middle, high = np.nanpercentile(losses, [0, 50, 100], axis=0)
        (line,) = axis.plot(steps, middle, label=f"{label} ({len(curves)})")
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
        lowest = min(lowest, float(np.nanmin(low)))
    axis.set(xlabel="step", ylabel="loss of the batch (nats)")
    axis.set_yscale("log" if lowest > 0.0 else "linear")
    axis.grid(visible=True, alpha=0.3)
    add_legend(axis, title="median and range over seeds")
    write_figure(figure, path)


def _loss_of(run: Run) -> tuple[np.ndarray, np.ndarray]:
    path = run.folder / "metrics.jsonl"
    return series(read_json_lines(path) if path.exists() else [], "loss")


def _values(results: list[dict[str, Any]], name: str) -> list[float]:
    """The figure of every run; empty if one has none, or if none is finite."""
    values = [result.get(name) for result in results]
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []


def _cell(values: list[float]) -> str:
    if not values:
        return "not finite"
    text = f"{np.median(values):.3g}"
    low, high = min(values), max(values)
    return text if low == high else f"{text}\n{low:.3g}..{high:.3g}"
