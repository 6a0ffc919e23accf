"""The tables of the benchmark: fits and verdicts, and a small run of each."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import precision, solvers
from experiments.benchmarks.contestants import cast_problem, make_problem
from experiments.benchmarks.curve_fits import curve_fit_tables
from experiments.benchmarks.gram import GramCost, gram_table
from experiments.benchmarks.markdown import Figure, Table
from experiments.benchmarks.memory import (
    allowance,
    memory_tables,
    plan_step,
    seen_bytes,
)
from experiments.benchmarks.scaling import fit_slope, scaling_tables
from experiments.benchmarks.settings import (
    TABLES,
    CurveFitsSettings,
    MemorySettings,
    PrecisionSettings,
    ScalingSettings,
    SolversSettings,
)
from experiments.benchmarks.space import Memory, planned_memory, resident_bytes
from experiments.benchmarks.tables import select, write_tables

SOLVERS = SolversSettings(
    cells=[[300, 8, 1]],
    gram_cells=[[300, 8, 1]],
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
    assert tuple(select("memory")) == ("memory",)


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.5])
def test_slope_is_the_exponent(slope):
    x = np.array([1.0, 3.0, 10.0, 100.0])
    assert fit_slope(x, 7 * x**slope) == pytest.approx(slope, abs=1e-12)


def test_slope_of_a_constant_beside_a_line_is_below_one():
    x = np.array([10.0, 20.0, 40.0])
    assert 0 < fit_slope(x, 30 + x) < 1


def test_slope_of_one_point_is_refused():
    with pytest.raises(ValueError, match="two points or more, got 1"):
        fit_slope([1.0], [1.0])


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


def test_the_goal_is_the_solve_beyond_the_gram_matrix():
    table = gram_table([GramCost((100_000, 512, 1), 170.0, 3.0, 5.0)])
    met, missed = table.goals
    assert met.is_met
    assert not missed.is_met


def test_allowance_is_three_gradients_and_five_vectors():
    assert allowance(Memory(held=70, temporary=30), 8) == 3 * 100 + 5 * 8


def test_planned_memory_counts_a_donated_argument_once():
    x = jnp.ones(1000)
    for donated, held in (((), 8000), ((0,), 4000)):
        step = jax.jit(lambda x: x + 1, donate_argnums=donated)
        assert planned_memory(step.lower(x).compile()).held == held


def test_plan_of_plain_descent_holds_parameters_and_batch():
    problem = make_problem((4, 5, 3), batch_size=6)
    held = sum(x.nbytes for x in jax.tree.leaves((problem.params, problem.batch)))
    plan = plan_step(problem, None)
    assert held <= plan.held <= held + 256


@pytest.mark.slow
def test_a_fresh_process_grows_by_what_a_step_takes():
    cell = [300_000, 8, 1]
    seen = resident_bytes(seen_bytes.__module__, seen_bytes.__name__, [cell, 2])
    # At least residual, direction and product; at most a few times the plan.
    assert 3 * 4 * 300_000 <= seen <= 50 * 4 * 300_000


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dense_system_is_the_float64_definition(dtype):
    problem = make_problem((4, 5, 3), batch_size=6)
    eps = float(jnp.finfo(dtype).eps)
    dense, gradient = precision.dense_system(cast_problem(problem, dtype))
    with jax.enable_x64(True):
        exact = precision.dense_system(cast_problem(problem, "float64"))
    assert dense.dtype == gradient.dtype == np.float64
    assert precision.relative_error(dense, exact[0]) < 30 * eps
    assert precision.relative_error(gradient, exact[1]) < 30 * eps


@pytest.mark.slow
def test_table_of_solvers_has_a_price_for_each():
    found, gram = solvers.solver_tables(SOLVERS)
    assert list(found.head[4:-1]) == ["CG 2", "LSMR 2", "Cholesky", "SampleSpace"]
    cells = dict(zip(found.head, found.rows[0], strict=True))
    assert cells.pop("Cholesky") == ""  # too many parameters
    assert all(float(cells[name].split(" / ")[0]) > 0 for name in found.head[4:6])
    assert cells["Auto takes"] in ("CG", "Cholesky")
    assert len(gram.rows) == 1


def test_what_takes_too_long_is_skipped_and_says_so():
    settings = dataclasses.replace(SOLVERS, budget=1e-9)
    row = solvers.measure_cell([300, 8, 1], settings)
    assert all(price.gradients is None for price in row.prices.values())
    cells = solvers.cells_of(row, solvers.contestants(settings.steps))
    assert cells[4].startswith("skipped: estimated 0")


def test_tables_of_memory_judge_the_goal():
    settings = MemorySettings(
        cells=[[300, 8, 1]],
        cg_steps=2,
        block_sizes=[4],
        gram_limit=8,
        resident_cells=[],
    )
    plan, resident = memory_tables(settings)
    assert plan.goals[0].goal == 1.0
    assert plan.goals[0].value == pytest.approx(float(plan.rows[0][6]), abs=0.01)
    assert len(plan.rows[0]) == len(plan.head)
    assert list(resident.rows) == []


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


@pytest.mark.slow
def test_table_of_scaling_has_a_slope_for_each_sweep():
    settings = ScalingSettings(
        examples=[8, 16], parameters=[300, 600], steps=[2, 4], outputs=1, repeats=1
    )
    (found,) = scaling_tables(settings)
    assert [row[0] for row in found.rows] == 2 * ["P"] + 2 * ["N"] + 2 * ["CG steps"]
    assert found.rows[0][2] == found.rows[2][2] == found.rows[4][2]  # the same point
    assert [goal.goal for goal in found.goals] == [1.1] * 3


def precision_errors(*dtypes):
    settings = PrecisionSettings(
        cells=[[60, 8, 1]], dtypes=list(dtypes), dampings=[0.1, 1.0], max_steps=40
    )
    (found,) = precision.precision_tables(settings)
    assert len(found.rows) == len(dtypes) * 4 * 2
    return {
        dtype: [float(row[3]) for row in found.rows if row[0] == dtype]
        for dtype in dtypes
    }


@pytest.mark.slow
def test_table_of_precision_has_a_row_for_each_solver_and_damping():
    assert max(precision_errors("float32")["float32"]) < 1e-3


@pytest.mark.slow
def test_table_of_precision_orders_the_dtypes():
    errors = precision_errors("bfloat16", "float32", "float64")
    assert max(errors["float64"]) < 1e-9
    assert max(errors["float32"]) < 1e-3
    assert max(errors["float32"]) < min(errors["bfloat16"]) < 1


def test_least_squares_truth_is_that_of_the_squared_system():
    rng = np.random.default_rng(0)
    root, coefficients = rng.normal(size=(5, 8)), rng.normal(size=5)
    found = precision.solve_least_squares(root, coefficients, 0.1)
    squared = root.T @ root + 0.1 * np.eye(8)
    np.testing.assert_allclose(squared @ found, root.T @ coefficients, rtol=1e-10)


def test_least_squares_system_is_the_root_of_the_dense_one():
    problem = make_problem((4, 5, 3), batch_size=6)
    with jax.enable_x64(True):
        exact = cast_problem(problem, "float64")
        root, coefficients = precision.least_squares_system(exact)
        dense, gradient = precision.dense_system(exact)
    np.testing.assert_allclose(root.T @ root, dense, atol=1e-14)
    np.testing.assert_allclose(root.T @ coefficients, gradient, atol=1e-14)
