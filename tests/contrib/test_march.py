"""MARCH against its formula, solved densely."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from ngd_jax.contrib import march

pytestmark = pytest.mark.usefixtures("x64", "strict_ranks")
LIKELIHOOD = ngd.Gaussian(event_ndims=0)
RATE, DAMPING, MOMENTUM, DECAY = 0.1, 0.3, 0.9, 0.7


def model_fn(params, x):
    return jnp.tanh(x @ params["w"]) @ params["a"]


def batches(num_steps):
    rng = np.random.default_rng(0)
    return [
        (rng.normal(size=(20, 3)), rng.normal(size=20) ** 3) for _ in range(num_steps)
    ]


def start():
    rng = np.random.default_rng(1)
    return {
        "a": jnp.asarray(rng.normal(size=2)),
        "w": jnp.asarray(rng.normal(size=(3, 2))),
    }


def run(tx, num_steps):
    params, state = start(), tx.init(start())

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(lambda p: jnp.mean((model_fn(p, x) - y) ** 2) / 2)(params)
        updates, state = tx.update(grads, state, params, batch=x)
        return optax.apply_updates(params, updates), state

    found = []
    for x, y in batches(num_steps):
        params, state = step(params, state, x, y)
        found.append(params)
    return found, state


@pytest.mark.parametrize("solver", [ngd.Cholesky(), ngd.SampleSpace()])
def test_steps_are_those_of_the_formula(solver):
    found, state = run(
        march(
            RATE,
            model_fn,
            LIKELIHOOD,
            damping=DAMPING,
            momentum=MOMENTUM,
            decay=DECAY,
            solver=solver,
        ),
        4,
    )
    flat, unravel = jax.flatten_util.ravel_pytree(start())
    last, moments = np.zeros(8), np.zeros(8)
    for (x, y), params in zip(batches(4), found, strict=True):
        rows = np.asarray(jax.jacobian(lambda p, x=x: model_fn(unravel(p), x))(flat))
        gradient = rows.T @ (model_fn(unravel(flat), x) - y) / 20
        metric = np.ones(8)
        if moments.any():
            metric = np.sqrt(np.maximum(moments / moments.mean(), 1e-4))
        fisher = rows.T @ rows / 20
        direction = np.linalg.solve(
            fisher + DAMPING * np.diag(metric),
            gradient + DAMPING * MOMENTUM * metric * last,
        )
        moments = DECAY * moments + (direction - last) ** 2
        flat, last = flat - RATE * direction, direction
        expected = jax.flatten_util.ravel_pytree(params)[0]
        np.testing.assert_allclose(flat, expected, rtol=1e-9)
    found = jax.flatten_util.ravel_pytree(state.natural_gradient.direction)[0]
    np.testing.assert_allclose(found, last, rtol=1e-8)
    assert np.ptp(metric) > 0.5


def test_the_first_step_is_that_of_natural_gradient():
    settings = {"damping": DAMPING, "momentum": MOMENTUM, "solver": ngd.Cholesky()}
    ours, _ = run(march(RATE, model_fn, LIKELIHOOD, **settings), 2)
    plain, _ = run(ngd.natural_gradient(RATE, model_fn, LIKELIHOOD, **settings), 2)
    np.testing.assert_allclose(ours[0]["w"], plain[0]["w"], rtol=1e-12)
    assert not np.allclose(ours[1]["w"], plain[1]["w"], rtol=1e-3)


def test_a_refused_step_changes_neither_direction_nor_moments():
    tx = march(RATE, model_fn, LIKELIHOOD, damping=DAMPING, solver=ngd.Cholesky())
    found, state = run(tx, 2)
    bad = jax.tree.map(lambda leaf: jnp.nan * leaf, found[-1])
    x = batches(1)[0][0]
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, batch=x))
    updates, after = update(bad, state, found[-1])
    kept = [(s.moments, s.natural_gradient.direction) for s in (state, after)]
    for before, now in zip(*map(jax.tree.leaves, kept), strict=True):
        assert before.any()
        np.testing.assert_array_equal(before, now)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))


def test_what_march_cannot_do_without_is_named():
    for settings, message in (
        ({"momentum": 0.0}, "`momentum` of march must not be 0"),
        ({"decay": 1.0}, r"`decay` must be in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            march(RATE, model_fn, LIKELIHOOD, **settings)
