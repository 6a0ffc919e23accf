"""The experiment on sigmoid and tanh: its figures, and that they can fail."""

import jax
import numpy as np
import optax
import pytest

from experiments.claims import twins
from experiments.claims.invariance import INVARIANCE
from experiments.claims.networks import mlp, mlp_params
from tests.experiments.claims.helpers import run


def failed_figures():
    return [check.name for check in run(INVARIANCE).checks if not check.holds]


@pytest.mark.long
def test_gradient_in_place_of_the_natural_gradient_is_found_out(monkeypatch):
    monkeypatch.setattr(twins, "natural_gradient", lambda _: optax.sgd(0.1))
    failed = " ".join(failed_figures())
    assert "undamped: largest difference" in failed
    assert "in the mapped metric: largest difference" in failed


def test_metric_that_is_not_mapped_is_found_out(monkeypatch):
    monkeypatch.setattr(twins, "tanh_params_of", lambda params: params)
    near, _ = twins.starts(2)
    with jax.enable_x64(True):
        results = twins.drift_of_settings(
            {"mapped": near._replace(damping=1e-3, mapped=True)}
        )
    assert results["mapped"].largest.min() > 1e-6


def test_mapped_parameters_are_the_same_function():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        sigmoid = mlp_params(keys[0], [2, 3, 2])
        sigmoid[0]["b"] = jax.random.normal(keys[1], (3,))
        x = jax.random.normal(keys[2], (7, 2))
        tanh = twins.tanh_params_of(sigmoid)
        outputs = mlp(sigmoid, x, jax.nn.sigmoid)
        np.testing.assert_allclose(mlp(tanh, x), outputs, rtol=1e-14)
        back = twins.sigmoid_params_of(tanh)
        jax.tree.map(np.testing.assert_allclose, back, sigmoid)


def test_condition_number_is_the_largest_on_the_way_and_infinite_at_a_singular_one():
    one, singular = np.diag([1.0, 2.0]), np.diag([1.0, 0.0])
    four, undefined = np.diag([0.5, 2.0]), np.full((2, 2), np.nan)
    ways = np.stack([[one, four], [one, singular], [undefined, one]])
    np.testing.assert_allclose(twins._condition(ways), [4.0, np.inf, np.inf])
