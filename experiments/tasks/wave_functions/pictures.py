"""The curves of a run as one PNG: energy and its error, variance, KL, solver."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.running.plots import (
    CONTRAST,
    DARK,
    LIGHT,
    draw_kl,
    save_figure,
    series,
)

__all__ = ["draw_curves"]

Records = list[dict[str, Any]]


def draw_curves(records: Records, path: Path, title: str, ground: float | None) -> None:
    """Draws a run into `path`.

    Args:
      records: one for each step.
      path: where to save the picture.
      title: a description of the run.
      ground: the exact energy of the ground state per spin, None if unknown.
    """
    figure = Figure(layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    figure.suptitle(title)
    _draw_energy(axes[0, 0], records, ground)
    _draw_error(axes[0, 1], records)
    draw_kl(axes[1, 0], records)
    _draw_residual(axes[1, 1], records)
    save_figure(figure, axes, path, records)


def _draw_energy(axis: Axes, records: Records, ground: float | None) -> None:
    axis.set(title="Energy", ylabel="energy per spin")
    steps, energies = series(records, "loss", is_before=True)
    _, errors = series(records, "loss_standard_error")
    axis.plot(steps, energies, color=LIGHT, label="samples of the step")
    low, high = energies - errors, energies + errors
    axis.fill_between(
        steps, low, high, color=LIGHT, alpha=0.4, label="± standard error"
    )
    if ground is not None:
        axis.axhline(ground, ls="--", color=CONTRAST, label="ground state, exact")
    if energies.size and np.isfinite(energies).any():
        # Cut off the highest tenth, the initial descent, to show the rest in detail.
        low, high = np.nanmin(energies), np.nanpercentile(energies, 90)
        low = low if ground is None else min(low, ground)
        axis.set_ylim(low - 0.1 * (high - low) - 1e-6, high + 0.3 * (high - low) + 1e-6)


def _draw_error(axis: Axes, records: Records) -> None:
    axis.set(title="Distance from the ground state", yscale="log")
    steps, errors = series(records, "test_energy_error")
    if steps.size:
        axis.plot(steps, np.abs(errors), "o-", ms=4, color=DARK, label="relative error")
    steps, variances = series(records, "energy_variance", is_before=True)
    axis.plot(
        steps,
        np.where(variances > 0, variances, np.nan),
        color=LIGHT,
        zorder=1,
        label="variance of the local energies",
    )


def _draw_residual(axis: Axes, records: Records) -> None:
    axis.set(title="Solver", ylabel="relative residual", yscale="log")
    steps, residuals = series(records, "solver_residual")
    if steps.size:
        residuals = np.where(residuals > 0, residuals, np.nan)
        axis.plot(steps, residuals, color=DARK, label="of (S + λI) d = g")
