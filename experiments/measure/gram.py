"""The table of the Gram matrix and the solve beyond it; the constants of `Auto`.

    SampleSpace:  gram_cost M² / N + factor_cost M³ / (18 N P) + solve_cost

in gradients, as in `ngd_jax.solvers.auto`, with M = N K.
"""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import ngd_jax as ngd
from experiments.markdown import Figure, Table
from experiments.measure.clocks import interleaved_seconds
from experiments.measure.contestants import (
    Problem,
    count_parameters,
    make_problem,
    widths_of,
)
from ngd_jax.solvers.sample_space import solve_in_sample_space

__all__ = ["GramCost", "fit_constants", "gram_table", "measure_gram"]

_BEYOND_THE_GRAM = 4.0


class GramCost(NamedTuple):
    """What `SampleSpace` spends where, in gradients.

    Attributes:
      cell: (P, N, K), P as it came out.
      gram: the model linearised and the Gram matrix.
      known: the rest, with the gradient known in output space.
      unknown: the rest, with the gradient in parameter space only.
    """

    cell: tuple[int, int, int]
    gram: float
    known: float
    unknown: float


def measure_gram(cell: Sequence[int], *, repeats: int) -> GramCost:
    """The Gram matrix by itself, and the solve where it is given.

    What is beyond it is timed as a program of its own: as a difference of two times, it
    would be within their noise.
    """
    problem = make_problem(widths_of(cell), cell[1])
    args = (problem.params, problem.batch)
    gradient = jax.jit(jax.value_and_grad(problem.loss_fn))
    _, rhs = gradient(*args)
    build = jax.jit(lambda *args: problem.linearize(*args).gram())
    gram = build(*args)
    known = jax.jit(lambda *rest: _solve(problem, *rest, in_outputs=True))
    unknown = jax.jit(lambda *rest: _solve(problem, *rest, in_outputs=False))
    one, *seconds = interleaved_seconds(
        [
            lambda: gradient(*args),
            lambda: build(*args),
            lambda: known(*args, rhs, gram),
            lambda: unknown(*args, rhs, gram),
        ],
        repeats=repeats,
    )
    size = (count_parameters(problem), cell[1], cell[2])
    return GramCost(size, *(taken / one for taken in seconds))


def _solve(
    problem: Problem, params: Any, batch: Any, rhs: Any, gram: Any, *, in_outputs: bool
) -> Any:
    fisher = problem.linearize(params, batch)
    coefficients = None
    if in_outputs:
        cotangents = jax.grad(problem.output_loss_fn)(fisher.outputs, batch)
        coefficients = fisher.sqrt_solve(cotangents)
    return solve_in_sample_space(
        fisher, gram, rhs, damping=1e-3, coefficients=coefficients
    )


def gram_table(costs: Sequence[GramCost], product_cost: float | None) -> Table:
    """The costs, the goal at the first of them, and the constants fitted to all.

    Args:
      costs: as measured.
      product_cost: gradients of a product in a solve, as measured, or None.
    """
    rows = [
        [
            *(f"{number:,}" for number in cost.cell),
            *(f"{price:.3g}" for price in cost[1:]),
        ]
        for cost in costs
    ]
    first = costs[0]
    place = "P = {:,}, N = {:,}, K = {:,}".format(*first.cell)
    goals = [
        Figure(
            f"SampleSpace beyond the Gram matrix at {place}, {what}, in gradients",
            price,
            _BEYOND_THE_GRAM,
        )
        for what, price in (
            ("with `output_loss_fn`", first.known),
            ("without", first.unknown),
        )
    ]
    constants = fit_constants(costs)
    if product_cost is not None:
        constants = {"product_cost": product_cost, **constants}
    now = ngd.Auto()
    goals += [
        Figure(f"`Auto.{name}` by these tables, {getattr(now, name):.3g} as it is", new)
        for name, new in constants.items()
    ]
    return Table(
        "Where SampleSpace spends its time, in gradients",
        ["P", "N", "K", "Gram matrix", "beyond, output gradient", "beyond, without"],
        rows,
        goals,
    )


def fit_constants(costs: Sequence[GramCost]) -> dict[str, float]:
    """`gram_cost`, `solve_cost` and `factor_cost` of `Auto`.

    The first is a geometric mean; the others are a fit by least squares of relative
    errors, neither below zero, to the solves with a gradient in output space.
    """
    gram = [cost.gram / _count_gram(cost.cell) for cost in costs]
    counts = np.array([_count_factor(cost.cell) for cost in costs])
    prices = np.array([cost.known for cost in costs])
    columns = np.stack([np.ones_like(counts), counts], axis=1) / prices[:, None]
    solve, factor = _fit_non_negative(columns)
    return {
        "gram_cost": statistics.geometric_mean(gram),
        "solve_cost": solve,
        "factor_cost": factor,
    }


def _fit_non_negative(columns: np.ndarray) -> tuple[float, float]:
    """The x ≥ 0 of least ‖columns x - 1‖: where one is negative, the other alone."""
    ones = np.ones(len(columns))
    both = np.linalg.lstsq(columns, ones)[0]
    if len(columns) > 1 and np.all(both >= 0):
        return float(both[0]), float(both[1])
    fits = []
    for index in range(2):
        x = np.zeros(2)
        column = columns[:, index]
        x[index] = column @ ones / (column @ column)
        fits.append((float(np.linalg.norm(columns @ x - ones)), x))
    best = min(fits, key=lambda fit: fit[0])[1]
    return float(best[0]), float(best[1])


def _count_gram(cell: Sequence[int]) -> float:
    _, examples, outputs = cell
    return (examples * outputs) ** 2 / examples


def _count_factor(cell: Sequence[int]) -> float:
    num_parameters, examples, outputs = cell
    return (examples * outputs) ** 3 / (18 * examples * num_parameters)
