"""The table of scaling: time of a whole step over N, P and steps of the solver."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import ngd_jax as ngd
from experiments.benchmarks.clocks import interleaved_seconds
from experiments.benchmarks.contestants import (
    check_taken,
    count_parameters,
    make_problem,
    natural_step,
    widths_of,
)
from experiments.benchmarks.markdown import Figure, Table
from experiments.benchmarks.settings import ScalingSettings

__all__ = ["fit_slope", "scaling_tables", "time_steps"]

# 1 is linear scaling; the extra tenth allows for noise and cache misses.
_LARGEST_SLOPE = 1.1


def fit_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent a of y ≈ c xᵃ, by least squares on the logarithms.

    Raises:
      ValueError: there are fewer than two points.
    """
    if len(x) < 2:
        raise ValueError(f"a slope needs two points or more, got {len(x)}.")
    slope, _ = np.polyfit(np.log(x), np.log(y), 1)
    return float(slope)


def time_steps(
    cells: Sequence[Sequence[int]], steps: Sequence[int], *, repeats: int
) -> tuple[list[int], list[float]]:
    """Parameters of each cell [P, N, K], and CPU seconds of a step to the radius.

    Args:
      cells: one for each timing.
      steps: conjugate gradient steps for each timing.
      repeats: turns of each timing.

    Raises:
      RuntimeError: the number of conjugate gradient steps was not that.
    """
    sizes, functions = [], []
    for cell, count in zip(cells, steps, strict=True):
        problem = make_problem(widths_of(cell), cell[1])
        step, args = natural_step(problem, ngd.CG(max_steps=count, rtol=0.0))
        compiled = jax.jit(step).lower(*args).compile()
        taken = int(check_taken(compiled(*args)[1]).solver.num_steps)
        if taken != count:
            raise RuntimeError(f"{taken} CG steps were taken where {count} were timed")
        sizes.append(count_parameters(problem))
        functions.append(_bind(compiled, args))
    return sizes, interleaved_seconds(functions, repeats=repeats)


def _bind(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: function(*args)


def scaling_tables(settings: ScalingSettings) -> list[Table]:
    """One table of three sweeps, with the slope of each."""
    first = (settings.parameters[0], settings.examples[0], settings.steps[0])
    parameters, examples, steps = first
    sweeps = {
        "P": [(number, examples, steps) for number in settings.parameters],
        "N": [(parameters, number, steps) for number in settings.examples],
        "CG steps": [(parameters, examples, number) for number in settings.steps],
    }
    # Sweeps share the measurement where they meet, and all of them take turns.
    points = list(dict.fromkeys(point for sweep in sweeps.values() for point in sweep))
    cells = [(p, n, settings.outputs) for p, n, _ in points]
    sizes, seconds = time_steps(
        cells, [count for *_, count in points], repeats=settings.repeats
    )
    size_of = dict(zip(points, sizes, strict=True))
    seconds_of = dict(zip(points, seconds, strict=True))

    rows, goals = [], []
    for index, (name, sweep) in enumerate(sweeps.items()):
        x = [size_of[point] if name == "P" else point[index] for point in sweep]
        y = [seconds_of[point] for point in sweep]
        rows += [
            [name, f"{number:,}", f"{1e3 * second:.3g}"]
            for number, second in zip(x, y, strict=True)
        ]
        slope = fit_slope(x, y)
        goals.append(Figure(f"slope of time against {name}", slope, _LARGEST_SLOPE))
    fixed = f"P ≈ {parameters:,}, N = {examples}, {steps} CG steps"
    return [
        Table(
            f"A whole step where one number grows and the others stay ({fixed}, "
            f"K = {settings.outputs})",
            ["what grows", "to", "CPU ms"],
            rows,
            goals,
        )
    ]
