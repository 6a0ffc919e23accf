"""Rate and momentum from the two-variable model: against dense algebra and CG."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from ngd_jax.contrib.quadratic_model_rate import minimize_quadratic_model
from tests.marks import float64_is_long

SIZE = 6


def _problem(seed, dtype, *, scale=1.0):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(9, SIZE)) * np.logspace(0, -1, SIZE)
    g, d, p = (scale * rng.normal(size=SIZE) for _ in range(3))
    return (jnp.asarray(x, dtype) for x in (root, g, d, p))


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@float64_is_long
@hypothesis.given(seed=st.integers(0, 2**32 - 1), damping=st.floats(0, 10))
def test_it_is_the_minimum_over_the_plane(dtype, scale, seed, damping):
    root, g, d, p = _problem(seed, dtype, scale=scale)
    found, _ = minimize_quadratic_model(lambda v: root @ v, g, d, p, damping)
    root, g, d, p = (np.asarray(x, np.float64) for x in (root, g, d, p))
    curvature = root.T @ root + damping * np.eye(SIZE)
    plane = np.stack([d, p], 1)
    best = plane @ np.linalg.solve(plane.T @ curvature @ plane, plane.T @ g)
    # In the norm that is minimised, where the conditioning of the plane does not show.
    error = np.sqrt((found - best) @ curvature @ (found - best))
    tolerance = 2000 * np.finfo(dtype).eps
    assert error <= tolerance * np.sqrt(best @ curvature @ best) * np.linalg.cond(plane)


@pytest.mark.parametrize("previous", ["none", "zero", "parallel"])
def test_without_a_second_direction_it_is_the_minimum_along_the_first(dtype, previous):
    root, g, d, _ = _problem(0, dtype)
    p = {"none": None, "zero": jnp.zeros_like(d), "parallel": -3 * d}[previous]
    found, _ = minimize_quadratic_model(lambda v: root @ v, g, d, p, 0.1)
    curvature = np.asarray(root.T @ root, np.float64) + 0.1 * np.eye(SIZE)
    d, g = np.asarray(d, np.float64), np.asarray(g, np.float64)
    best = (d @ g) / (d @ curvature @ d) * d
    np.testing.assert_allclose(found, best, rtol=100 * np.finfo(dtype).eps)


def test_a_zero_direction_gives_a_zero_step(dtype):
    root, g, d, _ = _problem(0, dtype)
    zero = jnp.zeros_like(d)
    found, _ = minimize_quadratic_model(lambda v: root @ v, g, zero, zero, 0.0)
    np.testing.assert_array_equal(found, zero)


def _linear_fn(w, batch):
    return batch["x"] @ w


def _preconditioned_cg(matrix, rhs, inverse_diagonal, num_steps):
    """The iterates of the textbook method."""
    x, r, p, previous = np.zeros_like(rhs), rhs, None, None
    iterates = []
    for _ in range(num_steps):
        z = inverse_diagonal * r
        p = z if p is None else z + (r @ z) / previous * p
        previous = r @ z
        step = previous / (p @ matrix @ p)
        x, r = x + step * p, r - step * (matrix @ p)
        iterates.append(x)
    return np.stack(iterates)


def test_on_a_quadratic_it_equals_preconditioned_cg_iterate_by_iterate(x64):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, SIZE)) * np.logspace(0, 1.5, SIZE)
    y = rng.normal(size=40)
    matrix, rhs = x.T @ x / 40, x.T @ y / 40
    inverse_diagonal = 1 / np.diag(matrix)
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}

    def loss_fn(w):
        return jnp.mean((_linear_fn(w, batch) - batch["y"]) ** 2) / 2

    class Diagonal(ngd.Solver):
        def solve(self, fisher, rhs, *, damping, state=()):
            del fisher, damping
            report = ngd.SolverInfo(jnp.int32(0), jnp.float64(0), jnp.int32(0))
            direction = jnp.asarray(inverse_diagonal) * rhs.gradient
            return ngd.Solution(direction, None, report, state)

    tx = ngd.natural_gradient(
        ngd.contrib.QuadraticModelRate(),
        _linear_fn,
        ngd.Gaussian(event_ndims=0),
        damping=0.0,
        solver=Diagonal(),
    )

    @jax.jit
    def step(w, state):
        updates, state = tx.update(jax.grad(loss_fn)(w), state, w, batch=batch)
        return optax.apply_updates(w, updates), state

    w, iterates = jnp.zeros(SIZE), []
    state = tx.init(w)
    for _ in range(SIZE):
        w, state = step(w, state)
        iterates.append(w)
    truth = _preconditioned_cg(matrix, rhs, inverse_diagonal, SIZE)
    np.testing.assert_allclose(np.stack(iterates), truth, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(w, np.linalg.solve(matrix, rhs), rtol=1e-8)
    # The plane matters: by the rate alone this takes longer.
    without = ngd.contrib.QuadraticModelRate(momentum=False)
    tx = ngd.natural_gradient(
        without,
        _linear_fn,
        ngd.Gaussian(event_ndims=0),
        damping=0.0,
        solver=Diagonal(),
    )
    w, state = jnp.zeros(SIZE), tx.init(w)
    for _ in range(SIZE):
        w, state = step.__wrapped__(w, state)
    assert np.abs(w - truth[-1]).max() > 1e-6


def test_a_radius_shortens_the_step_of_the_model():
    batch = {"x": jnp.eye(SIZE)}
    tx = ngd.natural_gradient(
        ngd.contrib.QuadraticModelRate(),
        _linear_fn,
        ngd.Gaussian(event_ndims=0),
        max_kl=1e-3,
        damping=0.0,
    )
    w = jnp.ones(SIZE)
    updates, state = tx.update(w / SIZE, tx.init(w), w, batch=batch)
    assert 0.92e-3 <= state.info.measured_kl <= 1.0001e-3
    assert state.info.step_scale < 1
    # The next step uses the step that was really taken as the last one.
    np.testing.assert_allclose(state.direction, -updates, rtol=1e-5)


def test_momentum_by_hand_and_by_the_model_exclude_each_other():
    with pytest.raises(ValueError, match=r"`momentum` is chosen by .*Rate.*got 0\.9"):
        ngd.natural_gradient(
            ngd.contrib.QuadraticModelRate(), _linear_fn, ngd.Gaussian(), momentum=0.9
        )
