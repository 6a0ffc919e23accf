"""Tests of learning rates that rise and fall."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from experiments.running.config import compose_config, read_config
from experiments.running.optimizers import make_optimizer
from experiments.running.rates import cosine, follow_progress, warmup_cosine
from experiments.tasks.supervised.task import Task

TASK = Task(
    name="line",
    train={"x": np.eye(3, dtype="f4")},
    test={"x": np.eye(3, dtype="f4")},
    init_fn=lambda key: (jnp.zeros((3, 2)), {}),  # noqa: ARG005
    model_fn=lambda w, batch: batch["x"] @ w,
    likelihood=ngd.Gaussian(),
    output_loss_fn=lambda outputs, batch: jnp.mean(outputs),  # noqa: ARG005
)
PARAMS = jnp.ones((3, 2))
GRADIENT = jnp.arange(6.0).reshape(3, 2)


@pytest.mark.parametrize(
    ("progress", "factor"),
    [
        (0.0, 0.01),
        (0.025, 0.5),
        (0.05, 1.0),
        (0.525, 0.505),
        (0.7625, 0.01 + 0.99 * (1 - math.sqrt(0.5)) / 2),
        (1.0, 0.01),
        (1.2, 0.01),  # the last dispatch may overrun the budget
    ],
)
def test_factor_rises_for_a_twentieth_and_falls_along_a_cosine(progress, factor):
    np.testing.assert_allclose(cosine(jnp.float32(progress)), factor, rtol=1e-5)
    schedule = warmup_cosine(3.0, 400)
    np.testing.assert_allclose(schedule(400 * progress), 3 * factor, rtol=1e-5)


def updated(tx, progress=None):
    tx = optax.with_extra_args_support(tx)
    state = tx.init(PARAMS)
    if progress is not None:
        state = state._replace(progress=jnp.float32(progress))
    updates, _ = tx.update(GRADIENT, state, PARAMS, batch=TASK.train)
    return updates


@pytest.mark.parametrize("progress", [0.02, 0.4])
@pytest.mark.parametrize("name", ["sgd", "adam", "natural_gradient"])
def test_an_optimizer_follows_the_progress_that_it_is_told(name, progress):
    settings = dict(compose_config([f"optimizer={name}"]).optimizer)
    make = functools.partial(make_optimizer, task=TASK)
    rate = settings["learning_rate"]
    followed = updated(follow_progress(settings, make), progress)
    factor = float(cosine(jnp.float32(progress)))
    expected = updated(make(settings | {"learning_rate": rate * factor}))
    np.testing.assert_allclose(followed, expected, rtol=1e-5)
    assert jnp.max(jnp.abs(followed)) > 0


def test_a_rate_inside_a_part_is_followed():
    target = "experiments.running.optimizers.without_extra_arguments"
    inner = {"_target_": "optax.sgd", "learning_rate": 0.5}
    settings = {"name": "own", "_target_": target, "transformation": inner}
    make = functools.partial(make_optimizer, task=TASK)
    followed = updated(follow_progress(settings, make), 0.525)
    np.testing.assert_allclose(followed, -0.5 * 0.505 * GRADIENT, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "muon", "natural_gradient"])
def test_training_takes_the_schedule_for_its_number_of_steps(name):
    tree = compose_config(
        [
            f"optimizer={name}",
            "optimizer/learning_rate=cosine",
            "optimizer.learning_rate.peak=0.25",
            "steps=40",
        ]
    )
    settings = read_config(tree).optimizer
    rate = settings["learning_rate"]
    assert (rate["peak"], rate["steps"]) == (0.25, 40)
    make_optimizer(settings, TASK)
