"""Unknown coefficients: their error, and the noise of the data."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.equations.problem import Sizes
from experiments.tasks.equations.problems import make_problem
from experiments.tasks.equations.unknowns import Unknowns, observe


def test_the_error_is_that_of_the_worst_coefficient():
    unknowns = Unknowns((2.0, -4.0), (1.0, 1.0), 10, 0.0)
    found = unknowns.relative_error(jnp.asarray([2.1, -4.1]))
    np.testing.assert_allclose(found, 0.05, rtol=1e-5)


def test_values_have_errors_of_the_given_size():
    points = jnp.linspace(0, 1, 4000)[:, None]
    data = observe(jax.random.key(0), points, lambda x: x[:, 0], 0.1)
    errors = data["data_values"] - points[:, 0]
    np.testing.assert_allclose(errors.std(), 0.1, rtol=0.05)
    np.testing.assert_allclose(errors.mean(), 0.0, atol=0.01)


def test_new_points_keep_the_data():
    problem = make_problem("heat1d_inverse")
    sizes = Sizes(30, 0, "random")
    points = problem.draw_points(jax.random.key(0), sizes)
    params = problem.init(jax.random.key(1), [4], None)
    redraw = jax.jit(problem.redraw_points, static_argnums=(3, 4))
    for power in (0.0, 1.0):
        new = redraw(jax.random.key(2), params, points, sizes, power)
        for name in ("data", "data_values"):
            np.testing.assert_array_equal(new[name], points[name])
        assert new["interior"].shape == points["interior"].shape
        assert not np.isclose(new["interior"], points["interior"]).any()


def test_the_coefficient_is_a_parameter_of_the_residuals():
    problem = make_problem("heat1d_inverse")
    points = problem.draw_points(jax.random.key(0), Sizes(9, 0, "random"))
    params = problem.init(jax.random.key(1), [4], None)
    other = params | {"coefficients": params["coefficients"] + 1}

    @jax.jit
    def everything(params, other):
        second = jax.vmap(lambda x: problem.jet(params, x).second)(points["interior"])
        return (
            problem.residuals(params, points),
            problem.residuals(other, points),
            second,
        )

    a, b, second = everything(params, other)
    np.testing.assert_array_equal(a["data"], b["data"])
    change = a["interior"] - b["interior"]
    np.testing.assert_allclose(change, second, rtol=1e-3, atol=1e-5)
