"""The task `pinn` as the program runs it: solved, resumed, drawn, and refused."""

import dataclasses

import jax
import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from experiments.running.config import compose_config, read_config
from experiments.running.loop import run_training
from experiments.running.run_folder import read_json_lines
from experiments.running.settings import ConfigError
from experiments.tasks.equations.learner import PhysicsLearner
from experiments.tasks.equations.problems import PROBLEMS, make_problem
from experiments.tasks.equations.regions import disk

SMALL = (
    "task=pinn",
    "task.hidden_sizes=[8]",
    "task.initial_scale=1.0",
    "task.interior=49",
    "task.boundary=24",
    "task.test_points=100",
    "steps=20",
    "eval_every=20",
)


def read(*overrides):
    return read_config(compose_config([*SMALL, *overrides]))


def error_of(result):
    error = result.metrics["test_l2_error"]
    assert error is not None  # as numbers that are not finite are
    return error


def run(folder, *overrides):
    folder.mkdir(exist_ok=True)
    return run_training(read(*overrides), folder, Console(quiet=True))


@pytest.mark.slow
def test_a_run_lowers_the_loss_and_is_drawn(tmp_path):
    """On so few points that eight units fit them without solving the equation."""
    run(tmp_path / "run", "steps=100")
    records = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["loss"] < 1e-2 * records[0]["loss"]
    for name in ("curves.png", "solution.png"):
        assert (tmp_path / "run" / name).stat().st_size > 10_000


@pytest.mark.long
def test_a_system_is_solved_and_has_a_row_of_pictures_for_each_output(tmp_path):
    overrides = ("problem=pipe_flow", "task.layout=halton", "task.boundary=0")
    result = run(tmp_path / "run", *overrides, "steps=30")
    assert error_of(result) < 1e-3
    shape = matplotlib.image.imread(tmp_path / "run" / "solution.png").shape
    run(tmp_path / "one", "steps=1")
    of_one = matplotlib.image.imread(tmp_path / "one" / "solution.png").shape
    assert shape[:2] == (3 * of_one[0], of_one[1])


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_optimizer_can_be_chosen_for_every_equation(name):
    """A problem's file leaves the optimizer alone: not each has the same settings."""
    for choice in ("optimizer=adam", "optimizer/solver=cholesky"):
        trees = [
            compose_config(["task=pinn", f"problem={problem}", choice])
            for problem in (name, "poisson2d")
        ]
        assert trees[0].optimizer == trees[1].optimizer


FOLLOWED = ("task.layout=halton", "task.redraw_every=5", "task.residual_power=1")


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), FOLLOWED], ids=["fixed", "followed"])
def test_a_run_in_two_parts_comes_to_the_same_bits(overrides, tmp_path):
    whole = run(tmp_path / "whole", *overrides, "steps=16")
    run(tmp_path / "parts", *overrides, "steps=7")
    parts = run(tmp_path / "parts", *overrides, "steps=16")
    for name in ("params", "points"):
        ends = (jax.tree.leaves(getattr(x.state, name)) for x in (whole, parts))
        for a, b in zip(*ends, strict=True):
            np.testing.assert_array_equal(a, b)
    first = PhysicsLearner(read(*overrides)).first_state.points
    is_same = np.array_equal(first["interior"], whole.state.points["interior"])
    assert is_same == (not overrides)


@pytest.mark.slow
def test_an_unknown_coefficient_is_found_as_well_as_the_data_tell_it(tmp_path):
    """Within four standard errors of least squares with the exact u(x, t; k)."""
    tree = compose_config(["task=pinn", "problem=heat1d_inverse", "eval_every=60"])
    result = run_training(read_config(tree), tmp_path, Console(quiet=True))
    x, t = np.asarray(result.state.points["data"]).T
    slope = np.pi**2 * t * np.exp(-(np.pi**2) * t / 4) * np.sin(np.pi * x)
    standard_error = 0.01 / np.sqrt(np.sum(slope**2))
    found = float(result.state.params["coefficients"][0])
    assert abs(found - 0.25) < 4 * standard_error
    assert standard_error < 2e-3
    reported = result.metrics["test_coefficient_error"]
    assert reported is not None
    np.testing.assert_allclose(reported, abs(found / 0.25 - 1), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
def test_the_reference_problem_is_solved_from_every_seed(seed, tmp_path):
    tree = compose_config(["task=pinn", f"seed={seed}", "eval_every=300", "steps=300"])
    result = run_training(read_config(tree), tmp_path, Console(quiet=True))
    assert error_of(result) <= 1e-7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "steps", "error"),
    [
        ("heat1d", 150, 1e-6),
        ("helmholtz2d", 200, 1e-5),
        ("poisson5d", 150, 1e-5),
        ("burgers1d", 100, 1e-4),
        ("laplace_lshape", 100, 1e-2),
        ("allen_cahn", 100, 1e-2),
        ("poisson20d optimizer/solver=damping_search_squared", 100, 5e-4),
        ("pipe_flow optimizer/solver=damping_search_squared", 60, 1e-5),
    ],
)
def test_every_equation_is_solved_as_it_is_configured(problem, steps, error, tmp_path):
    overrides = ["task=pinn", *f"problem={problem}".split(), f"steps={steps}"]
    tree = compose_config([*overrides, f"eval_every={steps}"])
    result = run_training(read_config(tree), tmp_path, Console(quiet=True))
    assert error_of(result) <= error


@pytest.mark.slow
def test_in_float32_the_error_is_that_of_its_round_off(tmp_path):
    overrides = ["task=pinn", "task.precision=float32", "steps=200", "eval_every=200"]
    tree = compose_config(overrides)
    result = run_training(read_config(tree), tmp_path, Console(quiet=True))
    assert error_of(result) <= 2e-6


@pytest.mark.slow
def test_fresh_points_in_five_dimensions(tmp_path):
    overrides = ("problem=poisson5d", "task.layout=random", "task.redraw_every=1")
    result = run(tmp_path / "run", *overrides, "steps=10", "eval_every=10")
    assert error_of(result) < 100


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("task.interior=50",), "`task.interior` must be a square"),
        (("problem=poisson5d", "task.layout=grid"), "`task.layout` must be halton or"),
        (("task.layout=halton", "task.boundary=10"), "`task.boundary` must be a multi"),
        (("task.redraw_every=1",), "`task.redraw_every` must be null"),
        (("task.residual_power=1",), "`task.residual_power` must be 0 without"),
        (
            ("task.causality=1",),
            "`task.causality` must be 0 for task.problem=poisson2d",
        ),
        (("problem=laplace_lshape", "task.layout=grid"), "whose region is no box"),
        (("batch_size=10",), "`batch_size` is about a training set"),
        (("optimizer.learning_rate=null",), "`optimizer.learning_rate` and"),
        (("+optimizer.solver.rcond=1e-8",), "which has .*, slack, factors"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        PhysicsLearner(read(*overrides))


def slivers():
    """A problem in two small disks, far apart in their box."""
    region = disk((-1.0, -1.0), 0.01) | disk((1.0, 1.0), 0.01)
    return dataclasses.replace(make_problem("laplace_lshape"), region=region)


def test_a_region_in_which_too_few_points_are_found_is_refused():
    own = f"task.problem={__name__}:slivers"
    with pytest.raises(ConfigError, match=r"`task.problem=.*slivers` has too few"):
        PhysicsLearner(read("problem=laplace_lshape", own))
