"""Pictures of a solution: the solution itself, its error and its residual."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.running.plots import (
    DARK,
    Records,
    draw_kl,
    save_figure,
    series,
    write_figure,
)
from experiments.tasks.equations.problem import Problem

__all__ = ["draw_curves", "draw_solution"]

PyTree = Any

_SIDE = 121
# The logarithmic scale shows this many decades below the largest value.
_DECADES = 2.0


def draw_curves(records: Records, path: Path, title: str) -> None:
    """Draws loss, L2 error, KL, damping, step length and solver steps of a run."""
    figure = Figure(layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    figure.suptitle(title)
    panels = {
        "loss": (axes[0, 0], "Loss", "half the weighted mean squared residuals"),
        "test_l2_error": (axes[0, 1], "Error", "absolute L2 error"),
        "damping": (axes[0, 2], "Damping", "λ, in units of F"),
        "step_scale": (axes[1, 1], "Length", "step in natural gradients"),
    }
    for name, (axis, heading, label) in panels.items():
        axis.set(title=heading, ylabel=label)
        steps, values = series(records, name, is_before=name == "loss")
        is_positive = values > 0
        if is_positive.any():
            axis.semilogy(steps[is_positive], values[is_positive], ".-", color=DARK)
    draw_kl(axes[1, 0], records)
    axes[1, 2].set(title="Solver", ylabel="steps, or rounds of the search")
    steps, values = series(records, "solver_steps")
    axes[1, 2].plot(steps, values, ".-", color=DARK)
    axes[1, 2].yaxis.set_major_locator(MaxNLocator(integer=True))
    save_figure(figure, axes, path, records)


def draw_solution(problem: Problem, params: PyTree, path: Path, title: str) -> None:
    """Draws u_θ, u_θ - u and the residual, on a grid, into `path`.

    Of a system it draws a row for each output, and the residual of the equation of the
    same number. In more than two dimensions, the grid lies in the plane through the
    centre of the box that the first two inputs span.
    """
    axes = [
        np.linspace(lo, hi, _SIDE)
        for lo, hi in zip(problem.low[:2], problem.high[:2], strict=True)
    ]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    middle = (np.asarray(problem.low) + np.asarray(problem.high)) / 2
    points = np.tile(middle, (len(grid), 1))
    points[:, :2] = grid
    values, exact, residual = jax.jit(functools.partial(_fields, problem))(
        params, jnp.asarray(points)
    )

    count = problem.num_outputs
    figure = Figure(figsize=(13.0, 4.2 * count), layout="constrained")
    panels = figure.subplots(count, 3, squeeze=False)
    plane = ", through the middle" if problem.dimension > 2 else ""
    figure.suptitle(f"{title}{plane}")
    columns = {"solution": values, "error": values - exact, "residual": residual}
    for column, (name, fields) in enumerate(columns.items()):
        for row, field in enumerate(np.asarray(fields).reshape(len(grid), count).T):
            number = f" {row + 1}" if count > 1 else ""
            is_signed_log = name != "solution"
            panel = panels[row, column]
            _draw(panel, axes, field, name + number, is_signed_log=is_signed_log)
    is_in_time = problem.dimension == 2 and problem.is_in_time
    for panel in panels.flat:
        panel.set_xlabel("x" if is_in_time else "x₁")
        panel.set_ylabel("t" if is_in_time else "x₂")
    write_figure(figure, path)


def _fields(
    problem: Problem, params: PyTree, points: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    values = jax.vmap(functools.partial(problem.value, params))(points)
    exact = problem.solution(points)
    batch = {"interior": points}
    for name in problem.weights.keys() - batch.keys():
        batch |= {name: points[:1], f"{name}_values": exact[:1]}
    fields = values, exact, problem.residuals(params, batch)["interior"]
    if problem.region is None:
        return fields
    is_inside = jax.vmap(problem.region.contains)(points)
    return jax.tree.map(lambda x: jnp.where(is_inside, x.T, jnp.nan).T, fields)


def _draw(
    panel: Axes, axes: list[np.ndarray], field: Any, name: str, *, is_signed_log: bool
) -> None:
    field = np.asarray(field, float).reshape(len(axes[0]), len(axes[1])).T
    largest = np.nanmax(np.abs(field), initial=np.finfo(float).tiny)
    norm = None
    if is_signed_log:
        norm = SymLogNorm(largest / 10**_DECADES, vmin=-largest, vmax=largest)
    root_mean_square = np.sqrt(np.nanmean(field**2))
    image = panel.pcolormesh(
        *axes, field, cmap="RdBu_r" if is_signed_log else "viridis", norm=norm
    )
    panel.set_title(
        f"{name}: root mean square {root_mean_square:.1e}" if is_signed_log else name
    )
    assert panel.figure is not None
    ticks = [-largest, -largest / 10, 0, largest / 10, largest]
    bar = panel.figure.colorbar(image, ax=panel, ticks=ticks if is_signed_log else None)
    if is_signed_log:
        bar.ax.set_yticklabels([f"{tick:.0e}" if tick else "0" for tick in ticks])
        bar.ax.minorticks_off()
        linear = largest / 10**_DECADES
        bar.set_label(f"symmetric log scale, linear within ±{linear:.0e}")
