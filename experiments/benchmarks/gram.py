"""The table of the time for the Gram matrix, and for the solve after it."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax

import ngd_jax as ngd
from experiments.benchmarks.clocks import interleaved_seconds
from experiments.benchmarks.contestants import (
    Problem,
    count_parameters,
    make_problem,
    widths_of,
)
from experiments.benchmarks.markdown import Figure, Table
from ngd_jax.gram import gram as gram_matrix
from ngd_jax.solvers import sample_space

__all__ = ["GramCost", "gram_table", "measure_gram"]

_BEYOND_THE_GRAM = 4.0


class GramCost(NamedTuple):
    """Where `SampleSpace` spends its time, in gradients.

    Attributes:
      cell: (P, N, K), with the actual P.
      gram: linearising the model and computing the Gram matrix.
      known: the rest, if the gradient in output space is known.
      unknown: the rest, if only the gradient in parameter space is known.
    """

    cell: tuple[int, int, int]
    gram: float
    known: float
    unknown: float


def measure_gram(cell: Sequence[int], *, repeats: int) -> GramCost:
    """Times the Gram matrix alone, and the solve with a given Gram matrix.

    The solve is timed as a program of its own: as a difference of two times, it would
    be lost in their noise.
    """
    problem = make_problem(widths_of(cell), cell[1])
    args = (problem.params, problem.batch)
    gradient = jax.jit(jax.value_and_grad(problem.loss_fn))
    _, rhs = gradient(*args)
    build = jax.jit(lambda *args: gram_matrix(problem.linearize(*args)))
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
    right = ngd.RightHandSide(rhs, coefficients)
    with mock.patch.object(sample_space, "gram", return_value=gram):
        return ngd.solve_scaled(ngd.SampleSpace(), fisher, right, damping=1e-3)[0]


def gram_table(costs: Sequence[GramCost]) -> Table:
    """The costs, and the goal for the first of them."""
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
            ("with `loss_fn`", first.known),
            ("without", first.unknown),
        )
    ]
    return Table(
        "Where SampleSpace spends its time, in gradients",
        ["P", "N", "K", "Gram matrix", "beyond, output gradient", "beyond, without"],
        rows,
        goals,
    )
