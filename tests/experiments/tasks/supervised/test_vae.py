"""The variational autoencoder: its loss, its noise, its metric."""

import jax
import jax.numpy as jnp
import numpy as np

import ngd_jax as ngd
from experiments.tasks import make_task
from tests.experiments.tasks.supervised.small_tasks import configure, first_batch


def test_loss_is_the_negative_elbo_of_the_stored_noise(data_dir):
    task = make_task(configure("vae", data_dir).task)
    params, _ = task.init_fn(jax.random.key(0))
    batch = first_batch(task)
    outputs = task.model_fn(params, batch)
    code = jax.tree.map(np.asarray, outputs["code"])
    mean, log_scale = code["mean"], code["log_scale"]
    x = np.asarray(batch["x"]) / 255
    p = 1 / (1 + np.exp(-np.asarray(outputs["pixels"], float)))
    pixels = -np.sum(x * np.log(p) + (1 - x) * np.log(1 - p), 1)
    kl = np.sum((np.exp(2 * log_scale) + mean**2 - 1) / 2 - log_scale, 1)
    np.testing.assert_allclose(
        task.loss_fn(params, batch), np.mean(pixels + kl), rtol=1e-5
    )
    metrics = task.metrics_fn(outputs, batch)
    np.testing.assert_allclose(metrics["code_kl"], np.mean(kl), rtol=1e-4)


def test_every_step_draws_noise_of_its_own(data_dir):
    task = make_task(configure("vae", data_dir).task)
    batch = first_batch(task)
    drawn = [task.draw_fn(jax.random.key(k), batch)["noise"] for k in (0, 1)]
    assert drawn[0].shape == batch["noise"].shape
    assert not np.allclose(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], batch["noise"])


def test_a_radius_holds_for_code_and_pixels_together(data_dir):
    task = make_task(configure("vae", data_dir).task)
    params, _ = task.init_fn(jax.random.key(0))
    batch = first_batch(task)
    before = task.model_fn(params, batch)
    code = jax.tree.map(lambda leaf: leaf + 0.1, before["code"])
    moved = task.likelihood.kl(before, {**before, "code": code})
    np.testing.assert_allclose(
        moved, ngd.DiagonalGaussian().kl(before["code"], code), rtol=1e-5
    )
    assert jnp.all(moved > 0)
