"""The table of solvers: time of whole steps in gradients, and memory, small to large.

    gradient: 6 N P operations    CG, LSMR: 4/3 of a gradient per step
    dense F: 4/3 P gradients, P³/3    Gram matrix: 2 M² P, M³/3, with M = N K

These costs determine which solver is the cheapest where.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

import ngd_jax as ngd
from experiments.benchmarks.clocks import interleaved_seconds
from experiments.benchmarks.contestants import (
    check_taken,
    count_parameters,
    make_problem,
    natural_step,
    widths_of,
)
from experiments.benchmarks.markdown import Table
from experiments.benchmarks.settings import SolversSettings
from experiments.benchmarks.space import planned_memory

__all__ = [
    "Contestant",
    "Price",
    "Row",
    "cells_of",
    "contestants",
    "estimate_gradients",
    "measure_cell",
    "solver_tables",
]

# A gradient and two or three forward passes for the measured KL.
_AROUND_THE_SOLVE = 2.0
_PRODUCT = 4 / 3


class Contestant(NamedTuple):
    """A solver, and what is known of its cost beforehand.

    Attributes:
      name: heads its column.
      solver: the solver.
      steps: number of products that it takes; None for direct solvers.
      space: "products", "parameters" or "samples": where it works.
    """

    name: str
    solver: ngd.Solver
    steps: int | None
    space: str


class Price(NamedTuple):
    """The cost of a whole step.

    Attributes:
      estimate: expected seconds of one call.
      gradients: CPU time in gradients; None if it was not measured.
      peak: planned bytes.
      num_steps: number of solver steps taken.
    """

    estimate: float
    gradients: float | None = None
    peak: int = 0
    num_steps: int = 0


class Row(NamedTuple):
    """One cell (P, N, K) with its prices.

    Attributes:
      cell: (P, N, K), with the actual P.
      seconds: CPU seconds of a gradient.
      peak: planned bytes of a gradient.
      prices: by contestant; those that do not apply are left out.
      choice: the solver that `Auto` chooses here.
    """

    cell: tuple[int, int, int]
    seconds: float
    peak: int
    prices: dict[str, Price]
    choice: str


def contestants(steps: Sequence[int]) -> list[Contestant]:
    """All solvers with their step budgets."""
    last = max(steps)
    iterative = [
        Contestant(f"CG {count}", ngd.CG(max_steps=count, rtol=0.0), count, "products")
        for count in steps
    ]
    return [
        *iterative,
        Contestant(
            f"LSMR {last}", ngd.LSMR(max_steps=last, rtol=0.0), last, "products"
        ),
        Contestant("Cholesky", ngd.Cholesky(), None, "parameters"),
        Contestant("SampleSpace", ngd.SampleSpace(), None, "samples"),
    ]


def estimate_gradients(contestant: Contestant, cell: Sequence[int]) -> float:
    """The cost of a whole step by operation count, in gradients."""
    num_parameters, examples, outputs = cell
    gradient = 6.0 * examples * num_parameters
    if contestant.space == "products":
        solve = _PRODUCT * (contestant.steps or 0)
    elif contestant.space == "parameters":
        solve = _PRODUCT * num_parameters + num_parameters**3 / 3 / gradient
    else:
        size = examples * outputs
        solve = outputs + (2 * size**2 * num_parameters + size**3 / 3) / gradient
    return _AROUND_THE_SOLVE + solve


def measure_cell(cell: Sequence[int], settings: SolversSettings) -> Row:
    """Times every solver that fits into the budget, for one row."""
    problem = make_problem(widths_of(cell), cell[1])
    cell = (count_parameters(problem), cell[1], cell[2])
    args = (problem.params, problem.batch)
    gradient = jax.jit(jax.value_and_grad(problem.loss_fn)).lower(*args).compile()
    (alone,) = interleaved_seconds([lambda: gradient(*args)], repeats=1)
    prices: dict[str, Price] = {}
    timed: dict[str, Callable[[], Any]] = {}
    for contestant in contestants(settings.steps):
        if contestant.space == "parameters" and cell[0] > settings.cholesky_limit:
            continue
        name, estimate = contestant.name, alone * estimate_gradients(contestant, cell)
        prices[name] = Price(estimate)
        if estimate > settings.budget:
            continue
        step, step_args = natural_step(problem, contestant.solver)
        compiled = jax.jit(step).lower(*step_args).compile()
        info = check_taken(compiled(*step_args)[1])
        prices[name] = prices[name]._replace(
            peak=planned_memory(compiled).peak, num_steps=int(info.solver.num_steps)
        )
        timed[name] = lambda run=compiled, args=step_args: run(*args)
    one, *seconds = interleaved_seconds(
        [lambda: gradient(*args), *timed.values()], repeats=settings.repeats
    )
    for name, taken in zip(timed, seconds, strict=True):
        prices[name] = prices[name]._replace(gradients=taken / one)
    choice = ngd.Auto().choose_for(problem.model_fn, *args, problem.likelihood)
    name = type(choice.solver).__name__
    return Row(cell, one, planned_memory(gradient).peak, prices, name)


def solver_tables(settings: SolversSettings) -> list[Table]:
    """Whole steps by each solver."""
    every = contestants(settings.steps)
    rows = [measure_cell(cell, settings) for cell in settings.cells]
    return [
        Table(
            "Whole steps (gradient, solve, measured KL) in gradients / planned memory",
            ["P", "N", "K", "gradient", *(each.name for each in every), "Auto takes"],
            [cells_of(row, every) for row in rows],
            notes=[
                f"Skipped: a call estimated, by count, above {settings.budget:g} s."
            ],
        )
    ]


def cells_of(row: Row, every: Sequence[Contestant]) -> list[str]:
    """The row for the reader."""
    num_parameters, examples, outputs = row.cell
    cells = [f"{num_parameters:,}", str(examples), str(outputs)]
    cells.append(f"{1e3 * row.seconds:.3g} ms / {_megabytes(row.peak)}")
    for contestant in every:
        price = row.prices.get(contestant.name)
        if price is None:
            cells.append("")
        elif price.gradients is None:
            cells.append(f"skipped: estimated {price.estimate:.0f} s")
        else:
            cell = f"{price.gradients:.3g} / {_megabytes(price.peak)}"
            if contestant.steps not in (None, price.num_steps):
                cell += f" ({price.num_steps} steps)"
            cells.append(cell)
    return [*cells, row.choice]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"
