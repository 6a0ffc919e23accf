"""The curves of a run as one PNG: loss, a metric, KL and radius, solver steps.

All curves are drawn over steps, from 0 on; the axis above shows the seconds of
training. A panel with nothing to show, or with only constant curves, is left out.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.running.run_folder import write_atomically

__all__ = [
    "CONTRAST",
    "DARK",
    "LIGHT",
    "add_legend",
    "draw_kl",
    "plot_curves",
    "save_figure",
    "series",
    "write_figure",
]

Records = list[dict[str, Any]]

LIGHT, DARK, CONTRAST = "#9ecae1", "#08519c", "#d94801"
FONT_SIZE = 8.5  # points, in legends
SETS = (
    ("{}", "-", LIGHT, "batch, before the step"),
    ("train_{}", "o-", DARK, "training set"),
    ("test_{}", "s-", CONTRAST, "test set"),
)


def plot_curves(
    records: Records, path: Path, title: str, *, metric: str | None = "accuracy"
) -> None:
    """Draws the records of a run (the lines of `metrics.jsonl`) into `path`.

    Args:
      records: one for each step.
      path: where to save the picture.
      title: a description of the run.
      metric: the value drawn beside the loss, for batches and for both sets.
    """
    figure = Figure(layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    figure.suptitle(title)
    _draw_loss(axes[0, 0], records)
    if metric is not None:
        _draw_metric(axes[0, 1], records, metric)
    draw_kl(axes[1, 0], records)
    _draw_solver(axes[1, 1], records)
    save_figure(figure, axes, path, records)


def save_figure(
    figure: Figure,
    axes: np.ndarray,
    path: Path,
    records: Records,
    *,
    label: str = "step",
    scale: float = 1.0,
) -> None:
    """Writes `path` with the panels that have something to show, grids and legends.

    Args:
      figure: the picture.
      axes: its panels, over `scale` times the step.
      path: where to save the picture.
      records: as for `plot_curves`; `seconds` is the training time so far.
      label: label of the step axis.
      scale: scale of the step axis.
    """
    shown = [axis for axis in axes.flat if _has_shape(_panel(axis))] or [axes.flat[0]]
    for axis in axes.flat:
        for part in _panel(axis) if axis not in shown else ():
            part.remove()
    columns = 2 if len(shown) in (2, 4) else min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure.set_size_inches(5.5 * columns, 4.0 * rows)
    grid = figure.add_gridspec(rows, columns)
    steps, seconds = series(records, "seconds")
    for number, axis in enumerate(shown):
        for part in _panel(axis):
            part.set_subplotspec(grid[number])
        axis.grid(visible=True, which="major", alpha=0.3)
        axis.tick_params(labelbottom=True)
        axis.set_xlabel(label)
        add_legend(axis)
        axis.set_xlim(left=0.0)
        if steps.size:
            _add_seconds(axis, scale * steps, seconds)
    write_figure(figure, path)


def add_legend(axis: Axes, *, title: str | None = None) -> None:
    """Puts the legend, if there is one, below the axis, where it covers no curve.

    Call it after setting the label of the axis.
    """
    labels = axis.get_legend_handles_labels()[1]
    figure, grid, whole = axis.figure, axis.get_gridspec(), axis.get_tightbbox()
    assert figure is not None
    assert grid is not None
    assert whole is not None
    # Height of ticks and label below the axis, in points.
    below = (axis.get_window_extent().y0 - whole.y0) * 72 / figure.dpi
    room = 0.85 * figure.bbox.width / grid.ncols
    for columns in range(min(3, len(labels)), 0, -1):
        legend = axis.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            borderaxespad=below / FONT_SIZE + 0.2,  # in units of the font size
            ncols=columns,
            frameon=False,
            fontsize=FONT_SIZE,
            title=title,
        )
        if legend.get_window_extent().width <= room:
            break


def write_figure(figure: Figure, path: Path) -> None:
    """Writes `path` completely or not at all."""
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    write_atomically(path, content.getvalue())


def _panel(axis: Axes) -> list[Axes]:
    """Returns `axis` and its twin, if it has one."""
    place = axis.get_subplotspec()
    return [part for part in axis.figure.axes if part.get_subplotspec() == place]


def _has_shape(panel: list[Axes]) -> bool:
    """Whether any curve of the panel is not constant."""
    curves = [line.get_ydata() for axis in panel for line in axis.get_lines()]
    finite = [values[np.isfinite(values)] for values in map(np.asarray, curves)]
    return any(values.size and np.ptp(values) > 0.0 for values in finite)


def _add_seconds(axis: Axes, places: np.ndarray, seconds: np.ndarray) -> None:
    low, high = axis.get_xlim()
    ticks = [tick for tick in axis.get_xticks() if low <= tick <= min(high, places[-1])]
    times = np.interp(ticks, [0.0, *places], [0.0, *seconds])
    top = axis.secondary_xaxis("top")
    labels = [f"{time:.3g}" if time < 1e3 else f"{time:,.0f}" for time in times]
    top.set_xticks(ticks, labels=labels, fontsize="small")
    top.set_xlabel("seconds of training", fontsize="small")


def _draw_loss(axis: Axes, records: Records) -> None:
    axis.set(title="Loss", ylabel="mean loss per example (nats)")
    is_positive = _draw_sets(axis, records, "loss")
    # A probability density may exceed one, and its loss is then below zero.
    axis.set_yscale("log" if is_positive else "linear")


def _draw_metric(axis: Axes, records: Records, metric: str) -> None:
    name = metric.replace("_", " ")
    axis.set(title=name.capitalize(), ylabel=name)
    if metric != "accuracy":
        _draw_sets(axis, records, metric)
        return
    axis.set_ylabel("accuracy (%)")
    _draw_sets(axis, records, metric, scale=100.0)
    _, tested = series(records, "test_accuracy")
    if tested.size:
        # The interesting part is near the top.
        axis.set_ylim(max(0.0, 100.0 * np.nanmin(tested) - 10.0), 101.0)


def _draw_sets(axis: Axes, records: Records, name: str, scale: float = 1.0) -> bool:
    """Draws `name` for batches and both sets; returns whether all are positive."""
    is_positive = True
    for form, style, color, label in SETS:
        steps, values = series(records, form.format(name), is_before=form == "{}")
        if steps.size:
            axis.plot(steps, scale * values, style, ms=4, color=color, label=label)
        is_positive &= not np.any(values <= 0.0)
    return is_positive


def draw_kl(axis: Axes, records: Records) -> None:
    """Draws the KL of each step, measured and predicted, and the radius."""
    axis.set(title="KL of the step", ylabel="mean KL per example (nats)", yscale="log")
    steps, measured = series(records, "measured_kl")
    axis.plot(steps, _positive(measured), ".-", ms=4, color=DARK, label="measured")
    steps, predicted = series(records, "predicted_kl")
    if steps.size:
        axis.plot(
            steps, _positive(predicted), color=LIGHT, zorder=1, label="quadratic model"
        )
    steps, radius = series(records, "max_kl")
    if steps.size:
        axis.plot(steps, radius, "--", color=CONTRAST, label="radius (max_kl)")


def _draw_solver(axis: Axes, records: Records) -> None:
    for name, title, label in (
        ("solver_steps", "Solver", "conjugate-gradient steps"),
        ("linesearch_steps", "Line search", "line-search steps"),
    ):
        steps, values = series(records, name)
        if steps.size:
            axis.set(title=title, ylabel=label)
            axis.step(steps, values, where="mid", color=DARK, label=label)
            axis.set_ylim(0.0, 1.25 * max(1.0, np.nanmax(values)))
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
            break
    steps, damping = series(records, "damping")
    if steps.size:
        twin = axis.twinx()
        twin.plot(steps, _positive(damping), ":", color=CONTRAST)
        twin.set_yscale("log")
        twin.set_ylabel("damping (dotted)", color=CONTRAST)


def series(
    records: Records, name: str, *, is_before: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps after which `name` is known, and its values, NaN for null.

    With `is_before` the values belong to the parameters before their step, so the first
    step is 0.
    """
    known = [record for record in records if name in record]
    values = [np.nan if record[name] is None else record[name] for record in known]
    steps = np.array([record["step"] for record in known], int)
    return steps - int(is_before), np.array(values, float)


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0.0, values, np.nan)
