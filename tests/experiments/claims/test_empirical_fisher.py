"""The experiment on the empirical Fisher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.claims import empirical_fisher
from tests.experiments.claims.helpers import run


@pytest.mark.long
def test_the_exact_fisher_in_its_place_is_found_out(monkeypatch):
    monkeypatch.setattr(empirical_fisher, "_OTHER_KIND", "exact")
    checks = run(empirical_fisher.EMPIRICAL_FISHER).checks
    failed = [check.name for check in checks if not check.holds]
    assert "empirical step" in failed[0]
    assert all("smallest cosine" in name for name in failed[1:])
    assert len(failed) == len(checks) - 2


@pytest.mark.parametrize("times", [1.0, 2.0])
def test_steps_equal_those_of_written_out_matrices(times):
    rng = np.random.default_rng(0)
    x, y, theta = rng.normal(size=(30, 3)), rng.normal(size=30), rng.normal(size=3)
    residuals = times * (x @ theta - y)
    gradient = x.T @ residuals / 30
    natural = np.linalg.solve(x.T @ x / 30, gradient)
    empirical = np.linalg.solve((x.T * residuals**2) @ x / 30, gradient)
    cosine = natural @ empirical / np.linalg.norm(natural) / np.linalg.norm(empirical)
    with jax.enable_x64(True):
        batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
        steps = empirical_fisher.steps_everywhere(
            jnp.asarray(theta)[None], jnp.array([times]), batch, "empirical"
        )
    np.testing.assert_allclose(steps.natural[0], natural, rtol=1e-10)
    np.testing.assert_allclose(steps.empirical[0], empirical, rtol=1e-10)
    np.testing.assert_allclose(steps.cosine[0], cosine, rtol=1e-10)


def test_least_squares_in_raw_units_has_no_gradient():
    for data in empirical_fisher.tabular_data():
        gradient = data.x.T @ (data.x @ data.best - data.y)
        scale = np.abs(data.x.T) @ np.abs(data.y)
        assert np.abs(gradient / scale).max() < 1e-10
