"""Variational inference: the conjugate posterior, and the optimum that SciPy finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from experiments.tasks import posteriors
from experiments.tasks.posteriors import Gaussian


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.long
def test_one_step_is_the_posterior_of_linear_regression():
    x, y = posteriors.linear_data(size=4, num_examples=20)
    q, values = posteriors.fit(
        posteriors.log_likelihood_linear, (x, y), rate=1.0, num_steps=1
    )
    precision = np.eye(4) + np.asarray(x.T @ x)
    np.testing.assert_allclose(q.precision, precision, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(q.mean, np.linalg.solve(precision, x.T @ y), rtol=1e-8)
    # The bound is then the evidence itself: y ~ N(0, I + x xᵀ).
    covariance = np.eye(20) + np.asarray(x @ x.T)
    log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]
    evidence = -(y @ np.linalg.solve(covariance, y) + log_det) / 2
    np.testing.assert_allclose(-values[-1], evidence, rtol=1e-10)


@pytest.mark.slow
def test_logistic_regression_ends_where_scipy_ends():
    train, test = posteriors.logistic_data(num_features=3)
    train = jax.tree.map(lambda leaf: leaf[:100], train)
    q, values = posteriors.fit(
        posteriors.log_likelihood_logistic, train, rate=1.0, num_steps=25
    )
    prior = posteriors.start(4)
    rows, columns = np.tril_indices(4)

    # Another parametrisation: mean and root of the covariance, with signs left free.
    @jax.jit
    @jax.value_and_grad
    def loss(theta):
        mean = theta[:4]
        root = jnp.zeros((4, 4)).at[rows, columns].set(theta[4:])
        precision = jnp.linalg.inv(root @ root.T)
        other = Gaussian(precision @ mean, precision[rows, columns])
        return posteriors.free_energy(
            posteriors.log_likelihood_logistic, other, prior, train
        )

    theta = np.concatenate([np.zeros(4), np.eye(4)[rows, columns]])
    best = scipy.optimize.minimize(
        lambda t: jax.tree.map(np.asarray, loss(t)), theta, jac=True, tol=1e-10
    )
    np.testing.assert_allclose(values[-1], best.fun, rtol=1e-9)
    np.testing.assert_allclose(q.mean, best.x[:4], atol=1e-4)
    assert (np.linalg.eigvalsh(q.precision) > 0).all()
    x, y = test
    assert float((jnp.sign(x @ q.mean) == y).mean()) > 0.85
