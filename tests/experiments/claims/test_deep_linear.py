"""The experiment on deep linear networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from experiments.claims import deep_linear
from tests.experiments.claims.helpers import run


@pytest.mark.slow
def test_damping_is_found_out(monkeypatch):
    monkeypatch.setattr(deep_linear, "_DAMPING", 0.1)
    failed = [c for c in run(deep_linear.DEEP_LINEAR).checks if not c.holds]
    assert len(failed) == 2


def test_another_slope_is_found_out():
    """Gaps of e^(-2t) have the slope -2, and gaps of e^(-t) have not."""
    times = np.arange(301) * 0.02
    gaps = np.exp([-2 * times, -times])
    np.testing.assert_allclose(deep_linear.slope(gaps, 0.02), [-2, -1], rtol=1e-12)


def test_natural_direction_moves_the_product_straight_to_the_best_one():
    with jax.enable_x64(True):
        batch = deep_linear.make_batch(3)
        params = jnp.asarray(np.random.default_rng(4).normal(size=(4, 5, 5)))

        def product(params: jax.Array) -> jax.Array:
            return params[3] @ params[2] @ params[1] @ params[0]

        @jax.jit
        def solve(params: jax.Array) -> tuple[jax.Array, jax.Array]:
            fisher = ngd.linearize_fisher(
                deep_linear.model_fn, params, batch, deep_linear._LIKELIHOOD
            )
            grads = jax.grad(deep_linear.loss_fn)(params, batch)
            direction, _ = deep_linear._SOLVER(fisher, grads, damping=0.0)
            return jax.jvp(product, (params,), (direction,))

        start, motion = map(np.asarray, solve(params))
    best = np.linalg.lstsq(batch["x"], batch["y"], rcond=None)[0].T
    np.testing.assert_allclose(motion, start - best, rtol=1e-5, atol=1e-5)


def test_least_loss_is_that_of_the_normal_equations():
    with jax.enable_x64(True):
        batch = deep_linear.make_batch(5)
        x, y = batch["x"], batch["y"]
        best = np.linalg.solve(x.T @ x, x.T @ y).T
        params = jnp.stack([jnp.asarray(best), *[jnp.eye(5)] * 3])
        loss = deep_linear.loss_fn(params, batch)
    np.testing.assert_allclose(deep_linear.least_loss(batch), loss, rtol=1e-10)
