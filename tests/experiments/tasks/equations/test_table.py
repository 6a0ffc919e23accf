"""The peers see the right residuals and Jacobian, and the table is printed."""

import jax
import jax.flatten_util
import numpy as np
import pytest

from experiments.tasks.equations.derivatives import init_network
from experiments.tasks.equations.peers import Equation
from experiments.tasks.equations.problem import Sizes
from experiments.tasks.equations.problems import make_problem
from experiments.tasks.equations.settings import PhysicsConfig
from experiments.tasks.equations.table import Course, TableConfig, measure, render

TASK = PhysicsConfig(
    name="pinn",
    problem="poisson2d",
    precision="float64",
    hidden_sizes=[6],
    initial_scale=1.0,
    interior=25,
    boundary=16,
    layout="grid",
    fresh_points=False,
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


def test_the_jacobian_by_points_is_that_of_all_residuals():
    problem = make_problem("poisson2d")
    points = problem.draw_points(jax.random.key(0), Sizes(9, 8, "grid"))
    params = init_network(jax.random.key(1), (2, 4, 1), 0.5)
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
