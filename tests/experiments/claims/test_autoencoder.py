"""The experiment on the deep autoencoder: its figures, and their ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.claims import autoencoder
from tests.experiments.claims.helpers import run


@pytest.mark.long
def test_gradient_descent_in_the_place_of_ours_is_found_out(monkeypatch):
    monkeypatch.setattr(autoencoder, "_natural_gradient", lambda: optax.sgd(0.3))
    failed = [c.name for c in run(autoencoder.AUTOENCODER).checks if not c.holds]
    assert any("error of natural gradient" in name for name in failed)


def test_loss_of_the_mean_image_is_that_of_the_best_constant_output():
    x = jax.random.uniform(jax.random.key(0), (20, 64), maxval=0.9)

    def loss_fn(logits):
        outputs = jnp.broadcast_to(logits, x.shape)
        return autoencoder._output_loss_fn(outputs, x)

    mean = x.mean(0)
    best = jnp.log(mean / (1 - mean))
    np.testing.assert_allclose(
        autoencoder._mean_image_loss(x), loss_fn(best), rtol=1e-5
    )
    assert jnp.abs(jax.grad(loss_fn)(best)).max() < 1e-6


def test_losses_are_those_before_each_step():
    x = jax.random.uniform(jax.random.key(0), (20, 64))
    result = autoencoder._train("SGD", "", optax.sgd(0.0), x, 30)
    assert result.losses.shape == result.seconds.shape == (30,)
    np.testing.assert_allclose(result.losses, result.losses[0], rtol=1e-6)
    assert result.seconds[0] == 0.0
    assert (np.diff(result.seconds) >= 0).all()
