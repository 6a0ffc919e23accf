"""Fits of the value function against least squares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks.policies.settings import ValueConfig
from experiments.tasks.policies.values import explained_variance, make_value_fit


def linear_value(params, batch):
    return batch["observations"] @ params


def config(**changes):
    values = {
        "hidden_sizes": [],
        "method": "adam",
        "learning_rate": 0.05,
        "epochs": 40,
        "minibatch_size": 10,
        "natural_rate": 1.0,
        "natural_steps": 1,
        "max_kl": None,
        "damping": 0.0,
        "max_steps": 10,
    }
    return ValueConfig(**{**values, **changes})


@pytest.fixture
def regression(rng):
    observations = rng.normal(size=(100, 3))
    targets = observations @ [1.0, -2.0, 0.5] + 0.1 * rng.normal(size=100)
    solution = np.linalg.lstsq(observations, targets)[0]
    batch = {"observations": jnp.asarray(observations), "targets": jnp.asarray(targets)}
    return batch, solution


def fit(settings, batch):
    init, fit_fn = make_value_fit(settings, linear_value)
    params = jnp.zeros(3)
    return jax.jit(fit_fn)(params, init(params), batch, jax.random.key(0))[0]


def test_one_natural_step_is_least_squares(x64, regression):
    batch, solution = regression
    settings = config(method="natural_gradient")
    np.testing.assert_allclose(fit(settings, batch), solution, rtol=1e-3)


def test_natural_steps_keep_to_their_radius(x64, regression):
    batch, _ = regression
    settings = config(method="natural_gradient", max_kl=0.1)
    values = linear_value(fit(settings, batch), batch)
    assert 0.09 <= np.mean(values**2) / 2 <= 0.1


def test_adam_comes_close_to_least_squares(x64, regression):
    batch, solution = regression
    np.testing.assert_allclose(fit(config(), batch), solution, atol=0.05)


def test_explained_variance(rng):
    targets = rng.normal(size=50)
    assert explained_variance(targets, targets) == 1
    np.testing.assert_allclose(explained_variance(np.ones(50), targets), 0, atol=1e-6)
    noise = rng.normal(size=50)
    expected = 1 - np.var(noise) / np.var(targets)
    np.testing.assert_allclose(
        explained_variance(targets + noise, targets), expected, rtol=1e-5
    )
