"""The peers see the right residuals and Jacobian, and the table is printed."""

import dataclasses

import jax
import jax.flatten_util
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from experiments.running.config import CONFIG_DIR
from experiments.running.settings import ConfigError
from experiments.tasks.equations.derivatives import init_network
from experiments.tasks.equations.peers import (
    OURS_FAST,
    PEERS,
    Equation,
    broyden_update,
    iterate,
)
from experiments.tasks.equations.problem import Sizes
from experiments.tasks.equations.problems import make_problem
from experiments.tasks.equations.settings import PhysicsConfig
from experiments.tasks.equations.table import (
    Course,
    TableConfig,
    measure,
    read_table,
    render,
)

TASK = PhysicsConfig(
    name="pinn",
    problem="poisson2d",
    precision="float64",
    hidden_sizes=[6],
    initial_scale=1.0,
    interior=25,
    boundary=16,
    layout="grid",
    redraw_every=None,
    residual_power=0.0,
    causality=0.0,
    test_points=100,
)
CONFIG = TableConfig(
    task=TASK,
    seeds=1,
    seconds=[0.02, 1.5],
    target=1.0,
    iterations=[5, 100],
    sketch_size=None,
    peers=["Levenberg-Marquardt", "BFGS, dense (SciPy)"],
    output="",
)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("problem", ["burgers_periodic", "poisson2d"])
def test_the_settings_of_a_problem_are_those_of_its_table(problem):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        tree = compose("physics_table", [f"problem={problem}", "sketch_size=700"])
    config = read_table(tree)
    assert config.task.problem == problem
    assert config.sketch_size == 700


def test_the_squared_search_is_that_of_the_programs():
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        given = compose("optimizer/solver/damping_search_squared").optimizer.solver
    ours = {"_target_": given["_target_"], **PEERS[OURS_FAST].keywords}
    assert ours == {**given, "factors": tuple(given.factors)}


def test_the_update_of_broyden_is_a_secant_and_that_of_bfgs_if_it_is_exact(rng):
    root = rng.normal(size=(5, 5))
    inverse, s = root @ root.T + np.eye(5), rng.normal(size=5)
    across = np.linalg.solve(inverse, s)
    for scale in (0.3, 1.0, 4.0):
        y = scale * across + 0.1 * rng.normal(size=5)
        new = broyden_update(inverse, s, y, s @ across)
        np.testing.assert_allclose(new @ y, s, rtol=1e-10)
        np.testing.assert_allclose(new, new.T, rtol=1e-10)
        assert np.linalg.eigvalsh(new)[0] > 0
    # With s B s = y s neither scale nor family differs from BFGS.
    other = rng.normal(size=5)
    y = across + other - (other @ s) / (s @ s) * s
    shift = np.eye(5) - np.outer(s, y) / (y @ s)
    expected = shift @ inverse @ shift.T + np.outer(s, s) / (y @ s)
    found = broyden_update(inverse, s, y, s @ across)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize(("name", "width"), [("poisson2d", 4), ("helmholtz2d", 96)])
def test_self_scaled_broyden_lowers_the_loss(name, width):
    # The second is so steep that θ - ∇f, and all that a line search tries from there,
    # are too far away.
    problem = make_problem(name)
    points = problem.draw_points(jax.random.key(0), Sizes(9, 8, "grid"))
    params = init_network(jax.random.key(1), (2, width, 1), 0.5)
    equation = Equation(problem, points, params)
    path = iterate("SSBroyden, dense", 40)(equation)
    before, after = (
        equation.loss(jax.flatten_util.ravel_pytree(next(path))[0]) for _ in range(2)
    )
    assert after < 0.1 * before


@pytest.mark.parametrize(("name", "boundary"), [("poisson2d", 8), ("pipe_flow", 0)])
def test_the_jacobian_by_points_is_that_of_all_residuals(name, boundary):
    problem = make_problem(name)
    points = problem.draw_points(jax.random.key(0), Sizes(9, boundary, "grid"))
    params = problem.init(jax.random.key(1), [4], 0.5)
    equation = Equation(problem, points, params)
    theta = jax.flatten_util.ravel_pytree(params)[0]

    @jax.jit
    def both(theta):
        whole = jax.jacobian(equation.residuals)(theta)
        return equation.jacobian(theta), whole, equation.loss(theta)

    by_points, whole, loss = both(theta)
    np.testing.assert_allclose(by_points, whole, rtol=1e-10, atol=1e-12)
    expected = 2 * problem.loss(problem.residuals(params, points), points)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


@pytest.mark.parametrize("change", [{"redraw_every": 5}, {"causality": 1.0}])
def test_a_loss_that_changes_on_the_way_is_refused(change):
    task = dataclasses.replace(TASK, **change)
    with pytest.raises(ConfigError, match=r"`task.redraw_every` must be null and"):
        measure(dataclasses.replace(CONFIG, task=task))


def test_the_table_tells_errors_and_times():
    courses = [
        Course([0, 5, 10], [0.0, 1.0, 2.0], [4.0, 2.0, 0.5]),
        Course([0, 5, 10], [0.0, 1.0, 2.0], [4.0, 3.0, 1.5]),
    ]
    last = render(CONFIG, {"A": courses}).splitlines()[-1].split(" | ")
    assert last == [
        "| A",
        "2.5e+00 [2e+00..3e+00]",
        "",
        "4.0e+00 [4e+00..4e+00]",
        "2.5e+00 [2e+00..3e+00]",
        "200",
        "2 [2..2], 1 of 2 |",
    ]


@pytest.mark.slow
def test_peers_lower_the_error():
    courses = measure(CONFIG, say=lambda _: None)
    for name, (course,) in courses.items():
        assert course.errors[-1] < course.errors[0], name
        assert course.seconds == sorted(course.seconds)
