"""The curves of a run as one PNG: loss, a metric, KL and radius, solver steps."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = [
    "CONTRAST",
    "DARK",
    "LIGHT",
    "draw_kl",
    "plot_curves",
    "save_figure",
    "series",
]

Records = list[dict[str, Any]]

LIGHT, DARK, CONTRAST = "#9ecae1", "#08519c", "#d94801"
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
      path: of the picture.
      title: what the run is.
      metric: which value is drawn beside the loss, of batches and of the sets.
    """
    figure = Figure(figsize=(11.0, 7.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    figure.suptitle(title)
    _draw_loss(axes[0, 0], records)
    _draw_metric(axes[0, 1], records, metric)
    draw_kl(axes[1, 0], records)
    _draw_solver(axes[1, 1], records)
    save_figure(figure, axes, path)


def save_figure(figure: Figure, axes: np.ndarray, path: Path) -> None:
    """Gives all panels a grid and legends, the last row the step, and writes `path`."""
    for axis in axes.flat:
        axis.grid(visible=True, which="major", alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("step")
    # Written aside and renamed: a kill must not leave half a picture.
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, dpi=120, format="png")
    draft.replace(path)


def _draw_loss(axis: Axes, records: Records) -> None:
    axis.set(title="Loss", ylabel="mean loss per example (nats)")
    is_positive = _draw_sets(axis, records, "loss")
    # A density may be above one, and its loss then is below zero.
    axis.set_yscale("log" if is_positive else "linear")


def _draw_metric(axis: Axes, records: Records, metric: str | None) -> None:
    if metric is None:
        axis.set_title("Metric")
        _write_across(axis, "no metric in this task")
        return
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
    """Draws `name` of batches and of both sets; returns whether all is positive."""
    is_positive = True
    for form, style, color, label in SETS:
        steps, values = series(records, form.format(name))
        axis.plot(steps, scale * values, style, ms=4, color=color, label=label)
        is_positive &= not np.any(values <= 0.0)
    return is_positive


def draw_kl(axis: Axes, records: Records) -> None:
    """Draws the KL of each step, measured and as the model has it, and the radius."""
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
    else:
        axis.set(title="Solver")
        _write_across(axis, "no inner solver")
    steps, damping = series(records, "damping")
    if steps.size:
        twin = axis.twinx()
        twin.plot(steps, _positive(damping), ":", color=CONTRAST)
        twin.set_yscale("log")
        twin.set_ylabel("damping (dotted)", color=CONTRAST)


def _write_across(axis: Axes, text: str) -> None:
    axis.set_yticks([])
    axis.text(0.5, 0.5, text, ha="center", transform=axis.transAxes)


def series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps at which `name` is known, and its values, NaN where null."""
    known = [record for record in records if name in record]
    values = [np.nan if record[name] is None else record[name] for record in known]
    return np.array([record["step"] for record in known]), np.array(values, float)


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0.0, values, np.nan)
