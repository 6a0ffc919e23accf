"""Equations and derivatives: exact solutions have no residual, jets are derivatives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import ngd_jax as ngd
from experiments.tasks.equations.derivatives import (
    METHODS,
    Jet,
    forward_operator,
    init_network,
    network,
)
from experiments.tasks.equations.problem import Sizes
from experiments.tasks.equations.problems import PROBLEMS, make_problem
from experiments.tasks.equations.regions import disk
from experiments.tasks.equations.unknowns import Unknowns

NAMES = list(PROBLEMS)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def test_derivatives_in_one_pass_are_those_of_autodiff(rng):
    params = init_network(jax.random.key(0), (3, 5, 4, 1), None)
    x, coefficients = jnp.asarray(rng.normal(size=3)), jnp.asarray([1.0, 0.0, -0.5])

    @jax.jit
    def everything(params, x):
        fn = functools.partial(network, params)
        second = jnp.sum(coefficients * jnp.diagonal(jax.hessian(fn)(x)))
        others = {name: way(fn, x, coefficients) for name, way in METHODS.items()}
        at = forward_operator(params, x, coefficients)
        return at, fn(x), jax.grad(fn)(x), second, others

    at, value, gradient, second, others = everything(params, x)
    np.testing.assert_allclose(at.value, value, rtol=1e-14)
    np.testing.assert_allclose(at.gradient, gradient, rtol=1e-13)
    np.testing.assert_allclose(at.second, second, rtol=1e-12)
    for name, other in others.items():
        np.testing.assert_allclose(other, second, rtol=1e-12, err_msg=name)


def derivatives(fn, x, operator):
    """The value of fn, ∂fn `[d, ...]` and Σᵢ cᵢ ∂ᵢᵢ fn, by autodiff."""
    diagonal = jnp.diagonal(jax.hessian(fn)(x), axis1=-2, axis2=-1)
    return (
        fn(x),
        jnp.moveaxis(jax.jacobian(fn)(x), -1, 0),
        diagonal @ jnp.asarray(operator),
    )


@pytest.mark.parametrize("name", NAMES)
def test_exact_solutions_have_no_residual(name, rng):
    problem = make_problem(name)
    low, high = np.asarray(problem.low), np.asarray(problem.high)
    points = jnp.asarray(rng.uniform(low + 0.1 * (high - low), high, (6, len(low))))

    def solution(x):
        return problem.solution(x[None])[0]

    @jax.jit
    @jax.vmap
    def residual(x):
        value, gradient, second = derivatives(solution, x, problem.operator)
        jet = Jet(value, gradient, second)
        size = jnp.abs(gradient).max() + jnp.abs(second).max() + 1
        known = () if problem.unknowns is None else (problem.unknowns.truth,)
        return problem.equation(x, jet, *known) / size

    np.testing.assert_allclose(residual(points), 0.0, atol=1e-9)


@pytest.mark.parametrize("layout", ["halton", "random"])
@pytest.mark.parametrize("name", [n for n in NAMES if make_problem(n).faces])
def test_points_lie_where_they_should(name, layout):
    problem = make_problem(name)
    points = problem.draw_points(jax.random.key(0), Sizes(50, 240, layout))
    low, high = np.asarray(problem.low), np.asarray(problem.high)
    inside, boundary = np.asarray(points["interior"]), np.asarray(points["boundary"])
    assert inside.shape == (50, problem.dimension)
    assert ((inside > low) & (inside < high)).all()
    assert ((boundary >= low) & (boundary <= high)).all()
    ends = np.stack([boundary == low, boundary == high], -1)
    counts = {face: int(ends[:, face[0], face[1]].sum()) for face in problem.faces}
    assert ends.any(axis=(1, 2)).all()
    assert sum(counts.values()) == 240
    assert max(counts.values()) - min(counts.values()) <= 1
    np.testing.assert_allclose(
        points["boundary_values"], problem.solution(points["boundary"])
    )


@pytest.mark.parametrize("layout", ["grid", "halton", "random"])
def test_a_problem_without_a_boundary_has_points_inside_only(layout):
    problem = make_problem("burgers_periodic")
    points = problem.draw_points(jax.random.key(0), Sizes(49, 0, layout))
    assert {name: x.shape for name, x in points.items()} == {"interior": (49, 2)}
    params = init_network(jax.random.key(1), (3, 4, 1), None)
    residuals = problem.residuals(params, points)
    assert set(residuals) == set(problem.weights)


def test_walls_and_ends_of_the_pipe_hold_for_any_parameters(rng):
    problem = make_problem("pipe_flow")
    params = problem.init(jax.random.key(1), [4], None)
    value = jax.vmap(functools.partial(problem.value, params))
    along, across = rng.uniform(0, 1, 5), rng.uniform(-0.05, 0.05, 5)
    for y in (-0.05, 0.05):
        at_wall = value(np.stack([along, np.full(5, y)], axis=1))
        np.testing.assert_allclose(at_wall[:, :2], 0.0, atol=1e-15)
    for x, pressure in ((0.0, 0.1), (1.0, 0.0)):
        at_end = value(np.stack([np.full(5, x), across], axis=1))
        np.testing.assert_allclose(at_end[:, 2], pressure, atol=1e-15)
    inside = value(np.stack([along, across], axis=1))
    exact = problem.solution(jnp.stack([along, across], axis=1))
    assert (np.abs(inside - exact).max(axis=0) > 0.01).all()


@pytest.mark.parametrize("name", ["burgers_periodic", "burgers1d"])
def test_periods_and_hard_values_hold_for_any_parameters(name, rng):
    problem = make_problem(name)
    params = problem.init(jax.random.key(1), [4], None)
    value = jax.vmap(functools.partial(problem.value, params))
    points = rng.uniform(-1, 1, (5, 2))
    moved = points + np.asarray([2.0, 0.0])
    np.testing.assert_allclose(value(points), value(moved), atol=1e-13)
    start = points * np.asarray([1.0, 0.0])
    expected = -np.sin(np.pi * points[:, 0])
    np.testing.assert_allclose(value(start), expected, rtol=1e-14)
    assert np.abs(value(points) - expected).max() > 0.1
    if name == "burgers1d":
        mirrored = points * np.asarray([-1.0, 1.0])
        np.testing.assert_allclose(value(points), -value(mirrored), rtol=1e-13)


@pytest.mark.parametrize("name", ["burgers_periodic", "pipe_flow"])
def test_jets_of_features_and_hard_values_are_those_of_autodiff(name, rng):
    problem = make_problem(name)
    params = problem.init(jax.random.key(1), [5, 4], None)
    x = jnp.asarray(rng.uniform(-1, 1, 2))

    @jax.jit
    def both(x):
        fn = functools.partial(problem.value, params)
        return problem.jet(params, x), derivatives(fn, x, problem.operator)

    at, expected = both(x)
    for got, value in zip(at, expected, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-11)


def spectral_burgers(viscosity, x, t, num_modes, num_steps):
    """u(x, t) by a Fourier series in space and Runge-Kutta steps in time."""
    k = np.pi * np.arange(num_modes)  # of sin kx: u is odd
    is_kept = np.arange(num_modes) < num_modes * 2 // 3  # no aliases of u²

    def slope(b):
        spectrum = np.concatenate([-1j * b, [0]]) * num_modes
        u = np.fft.irfft(spectrum)
        flux = np.fft.rfft(u**2 / 2)[:-1] * is_kept
        return -viscosity * k**2 * b + k * flux.real / num_modes

    b, h = np.zeros(num_modes), t / num_steps
    b[1] = -1.0
    for _ in range(num_steps):
        k1 = slope(b)
        k2 = slope(b + h / 2 * k1)
        k3 = slope(b + h / 2 * k2)
        b = b + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(b + h * k3))
    return np.sin(np.outer(x, k)) @ b


def test_the_solution_of_burgers_is_that_of_a_spectral_solver():
    x = np.linspace(-1, 1, 41)
    for t in (0.4, 1.0):
        points = jnp.asarray(np.stack([x, np.full_like(x, t)], axis=1))
        exact = make_problem("burgers_periodic").solution(points)
        found = spectral_burgers(0.01, x, t, 320, round(2000 * t))
        np.testing.assert_allclose(exact, found, atol=1e-11)


def test_the_solution_of_allen_cahn_is_that_of_an_implicit_solver():
    """Finite differences in space, to fourth order, and LSODA of SciPy in time."""
    n, times = 801, np.asarray([0.3, 1.0])
    x = np.linspace(0, 1, n)
    shift = 0.001 * (n - 1) ** 2

    def slope(_, u):
        # Even about both ends.
        wide = np.r_[u[2:0:-1], u, u[-2:-4:-1]]
        second = -wide[:-4] + 16 * wide[1:-3] - 30 * u + 16 * wide[3:-1] - wide[4:]
        return shift * second / 12 + 5 * (u - u**3)

    start = np.cos(np.pi * x) * (1 - np.cos(np.pi * x)) / 2
    found = solve_ivp(
        slope,
        (0, 1),
        start,
        t_eval=times,
        method="LSODA",
        rtol=1e-10,
        atol=1e-11,
        lband=2,
        uband=2,
    ).y.T
    for t, expected in zip(times, found, strict=True):
        points = jnp.asarray(np.stack([x, np.full_like(x, t)], axis=1))
        for sign in (1, -1):
            exact = make_problem("allen_cahn").solution(points * jnp.asarray([sign, 1]))
            np.testing.assert_allclose(exact, expected, atol=2e-6)
            assert np.ptp(exact) > 1.4


def test_points_of_a_region_lie_in_it():
    problem = make_problem("laplace_lshape")
    draw = jax.jit(problem.draw_points, static_argnums=1)
    points = draw(jax.random.key(0), Sizes(60, 30, "halton"))
    for name, tolerance in (("interior", 0.0), ("boundary", 1e-9)):
        x, y = np.asarray(points[name]).T
        assert not ((x > tolerance) & (y < -tolerance)).any()
    np.testing.assert_allclose(
        points["boundary_values"], problem.solution(points["boundary"])
    )
    x, y = np.asarray(problem.test_points(900)).T
    assert not ((x > 0) & (y < 0)).any()
    assert len(x) > 550


def test_new_points_follow_the_residual():
    """A residual that is large in a tenth of the box."""
    problem = dataclasses.replace(
        make_problem("heat1d"), equation=lambda x, _: jnp.where(x[0] > 0.9, 1.0, 1e-6)
    )
    params = problem.init(jax.random.key(1), [4], None)
    for layout in ("halton", "random"):
        sizes = Sizes(200, 30, layout)
        points = problem.draw_points(jax.random.key(0), sizes)
        redraw = jax.jit(problem.redraw_points, static_argnums=(3, 4))
        new = redraw(jax.random.key(2), params, points, sizes, 1.0)
        share = [(np.asarray(p["interior"])[:, 0] > 0.9).mean() for p in (points, new)]
        assert share[0] < 0.16
        assert 0.4 < share[1] < 0.6  # 0.55 with replacement


@pytest.mark.parametrize("name", ["allen_cahn", "pipe_flow"])
def test_causal_weights_scale_the_squares_of_the_residuals(name):
    problem = make_problem(name)
    params = problem.init(jax.random.key(1), [4], None)
    points = problem.draw_points(jax.random.key(0), Sizes(50, 0, "halton"))

    @jax.jit
    def both(params):
        weighed = problem.weigh_causally(params, points, 10.0)
        return weighed, [problem.residuals(params, p) for p in (points, weighed)]

    weighed, residuals = both(params)
    weights = np.asarray(weighed["interior_weights"])
    order = np.argsort(points["interior"][:, 1])
    assert (np.diff(weights[order]) <= 0).all()
    assert weights.max() == 1
    assert weights.min() < 0.9
    plain, scaled = (blocks["interior"] for blocks in residuals)
    np.testing.assert_allclose((scaled**2).T, weights * (plain**2).T, rtol=1e-12)


def test_a_system_is_measured_by_the_sum_of_squares_of_its_residuals(rng):
    """The loss, its likelihood, and the points that follow the residual."""
    problem = make_problem("pipe_flow")
    sizes = Sizes(20, 0, "halton")
    points = problem.draw_points(jax.random.key(0), sizes)
    r = {"interior": jnp.asarray(rng.normal(size=(20, 3)))}
    loss = 0.5 * np.mean(np.sum(np.asarray(r["interior"]) ** 2, axis=1))
    np.testing.assert_allclose(problem.loss(r, points), loss, rtol=1e-12)
    zero = jax.tree.map(jnp.zeros_like, r)
    kl = jnp.mean(problem.likelihood.kl(r, zero))
    np.testing.assert_allclose(kl, loss, rtol=1e-12)

    def third_only(x, _):
        return jnp.append(jnp.zeros(2), jnp.where(x[0] > 0.9, 1.0, 1e-6))

    problem = dataclasses.replace(problem, equation=third_only)
    params = problem.init(jax.random.key(1), [4], None)
    sizes = Sizes(200, 0, "halton")
    new = problem.redraw_points(jax.random.key(2), params, points, sizes, 1.0)
    assert 0.4 < (np.asarray(new["interior"])[:, 0] > 0.9).mean() < 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": disk((0.0, 0.0), 1.0)}, "`faces` and `stretch` must be unset"),
        ({"unknowns": Unknowns((1.0,), (1.0,), 1, 0.0)}, '`weights` must have "data"'),
        ({"faces": ()}, '`weights` must not have "boundary"'),
    ],
)
def test_a_problem_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_problem("heat1d"), **changes)


def test_a_grid_has_every_corner_once():
    problem = make_problem("poisson2d")
    points = problem.draw_points(jax.random.key(0), Sizes(784, 116, "grid"))
    assert points["interior"].shape == (784, 2)
    np.testing.assert_allclose(np.unique(points["interior"]), np.arange(1, 29) / 29)
    boundary = np.asarray(points["boundary"])
    assert len(np.unique(boundary.round(12), axis=0)) == 116
    assert (np.isin(boundary, (0.0, 1.0)).any(axis=1)).all()
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert (boundary == corner).all(axis=1).sum() == 1


def test_points_of_a_layer_are_dense_and_count_as_much_as_their_spacing():
    problem = make_problem("burgers1d")
    points = problem.draw_points(jax.random.key(0), Sizes(400, 0, "grid"))
    x = np.unique(np.asarray(points["interior"])[:, 0].round(12))
    wide = np.diff(x)
    np.testing.assert_allclose(x, -x[::-1], atol=1e-12)
    params = problem.init(jax.random.key(1), [4], None)
    even = dataclasses.replace(problem, stretch=0.0)
    ratio = problem.residuals(params, points)["interior"]
    ratio /= even.residuals(params, points)["interior"]
    ratio = np.asarray(ratio).reshape(20, 20)[:, 0]
    # Proportional to the spacing, 1 at the ends of the domain.
    between = wide / np.sqrt(ratio[1:] * ratio[:-1])
    np.testing.assert_allclose(between, between[0], rtol=0.05)
    assert wide.max() > 15 * wide.min()
    assert 0.5 < ratio.max() < 1.0


def test_the_loss_is_that_of_the_likelihood():
    problem = make_problem("poisson2d")
    points = problem.draw_points(jax.random.key(0), Sizes(9, 8, "grid"))
    params = init_network(jax.random.key(1), (2, 4, 1), 0.5)
    residuals = problem.residuals(params, points)
    by_hand = np.mean(np.square(residuals["interior"]))
    by_hand += 4 * np.mean(np.square(residuals["boundary"]))
    np.testing.assert_allclose(problem.loss(residuals, points), by_hand / 2)
    # Where all residuals go to zero, the KL of the step is the loss.
    zero = jax.tree.map(jnp.zeros_like, residuals)
    kl = sum(
        problem.weights[name]
        * jnp.mean(ngd.Gaussian(event_ndims=0).kl(residuals[name], zero[name]))
        for name in problem.weights
    )
    np.testing.assert_allclose(kl, by_hand / 2)
