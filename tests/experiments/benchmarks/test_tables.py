"""The tables of the benchmark: fits and verdicts, and a small run of each."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import solvers
from experiments.benchmarks.curve_fits import curve_fit_tables
from experiments.benchmarks.markdown import Figure, Table
from experiments.benchmarks.settings import (
    TABLES,
    CurveFitsSettings,
    SolversSettings,
)
from experiments.benchmarks.space import planned_memory
from experiments.benchmarks.tables import select, write_tables

SOLVERS = SolversSettings(
    cells=[[300, 8, 1]],
    steps=[2],
    repeats=1,
    budget=60.0,
    cholesky_limit=200,
)


def table(goals=(), rows=(("1", "2"),)):
    return Table("A title", ["a", "b"], rows, goals, ["A note."])


def test_goals_are_judged_with_their_figures():
    goals = [
        Figure("at its goal", 2.0, 2.0),
        Figure("above", 3.0, 2.0),
        Figure("not a number", math.nan, 2.0),
        Figure("no goal", 0.5),
    ]
    markdown = write_tables([table(goals)])
    assert "- at its goal: met, 2 against ≤ 2." in markdown
    assert "- above: MISSED, 3 against ≤ 2." in markdown
    assert "- not a number: MISSED, nan against ≤ 2." in markdown
    assert "- no goal: 0.5." in markdown


def test_tables_are_markdown_below_the_machine():
    first, *rest = write_tables([table()]).splitlines()
    assert jax.__version__ in first
    assert "one thread" in first
    assert "| a | b |\n|---|---|\n| 1 | 2 |" in "\n".join(rest)
    assert rest[-1] == "A note."


def test_all_is_every_table():
    assert tuple(select("all")) == TABLES
    assert tuple(select("price")) == ("price",)


def contestant(space):
    steps = 15 if space == "products" else None
    return solvers.Contestant(space, solvers.ngd.CG(), steps, space)


def test_estimates_count_operations_in_gradients():
    cell = (10_000, 128, 2)
    gradient = 6 * 128 * 10_000
    size = 128 * 2
    around = solvers.estimate_gradients(contestant("products"), cell) - 15 * 4 / 3
    assert around == pytest.approx(2.0)
    gram = 2 + (2 * size**2 * 10_000 + size**3 / 3) / gradient
    dense = 10_000 * 4 / 3 + 10_000**3 / 3 / gradient
    for space, price in (("samples", gram), ("parameters", dense)):
        estimate = solvers.estimate_gradients(contestant(space), cell)
        assert estimate == pytest.approx(around + price)


def test_planned_memory_counts_a_donated_argument_once():
    x = jnp.ones(1000)
    for donated, held in (((), 8000), ((0,), 4000)):
        step = jax.jit(lambda x: x + 1, donate_argnums=donated)
        assert planned_memory(step.lower(x).compile()).held == held


@pytest.mark.slow
def test_table_of_solvers_has_a_price_for_each():
    (found,) = solvers.solver_tables(SOLVERS)
    assert list(found.head[4:-1]) == ["CG 2", "LSMR 2", "Cholesky", "SampleSpace"]
    cells = dict(zip(found.head, found.rows[0], strict=True))
    assert cells.pop("Cholesky") == ""  # too many parameters
    assert all(float(cells[name].split(" / ")[0]) > 0 for name in found.head[4:6])
    assert cells["Auto takes"] in ("CG", "Cholesky")


def test_what_takes_too_long_is_skipped_and_says_so():
    settings = dataclasses.replace(SOLVERS, budget=1e-9)
    row = solvers.measure_cell([300, 8, 1], settings)
    assert all(price.gradients is None for price in row.prices.values())
    cells = solvers.cells_of(row, solvers.contestants(settings.steps))
    assert cells[4].startswith("skipped: estimated 0")


def test_table_of_curve_fits_has_a_row_for_each_start():
    settings = CurveFitsSettings(problems=["DanWood"], repeats=1)
    fits, totals = curve_fit_tables(settings)
    assert [row[:3] for row in fits.rows] == [
        ["DanWood", "lower", start] for start in "12"
    ]
    assert {len(row) for row in fits.rows} == {len(fits.head)}
    assert [row[:2] for row in totals.rows[:2]] == [["ours", "2"], ["MINPACK", "2"]]
    assert min(float(row[3]) for row in fits.rows) > 8
    assert totals.goals[0].is_met
