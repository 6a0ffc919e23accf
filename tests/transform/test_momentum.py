"""Proximal momentum as published: Kaczmarz convergence where plain steps stall."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from tests.marks import long_unless

NUM_ROWS, NUM_PARAMS, BATCH = 24, 30, 3
SOLVERS = {
    "cg": (ngd.CG(40, rtol=1e-12), 0.0),
    "cholesky": (ngd.Cholesky(), 1e-9),
    "sample_space": (ngd.SampleSpace(), 0.0),
}


def _consistent_problem(rng):
    """Unit rows X and right-hand sides y = X w that some w solves exactly."""
    x = rng.normal(size=(NUM_ROWS, NUM_PARAMS))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x, x @ rng.normal(size=NUM_PARAMS)


def _linear_fn(w, batch):
    return batch["x"] @ w


def _run(x, y, solver, damping, momentum, *, rate, num_steps, seed=0):
    """Directions and parameters of steps on random rows."""
    x, y = jnp.asarray(x), jnp.asarray(y)
    tx = ngd.natural_gradient(
        rate,
        _linear_fn,
        ngd.Gaussian(event_ndims=0),
        damping=damping,
        solver=solver,
        momentum=momentum,
    )

    def step(carry, key):
        w, state = carry
        rows = jax.random.choice(key, NUM_ROWS, (BATCH,), replace=False)
        batch = {"x": x[rows], "y": y[rows]}
        loss_fn = lambda w: jnp.mean((_linear_fn(w, batch) - batch["y"]) ** 2) / 2  # noqa: E731
        updates, state = tx.update(jax.grad(loss_fn)(w), state, w, batch=batch)
        return (w + updates, state), (state.direction, w + updates)

    w = jnp.zeros(NUM_PARAMS)
    keys = jax.random.split(jax.random.key(seed), num_steps)
    return jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), keys)[1])()


@pytest.mark.parametrize("solver", long_unless({"cholesky"}, SOLVERS.keys()))
def test_directions_converge_as_block_kaczmarz_where_plain_ones_stall(solver, rng, x64):
    """At fixed parameters d tends to X⁺ (X w - y), linearly: randomised block Kaczmarz.

    Goldshlager, Abrahamsen and Lin 2024, section 3.2, with the rate of Needell and
    Tropp 2014, theorem 1.2: a step on a block projects on its rows, so that the error
    does not grow, and falls on average by 1 - σ²_min(X) / (blocks · β) with β ≤ the
    largest σ² of a block.
    """
    x, y = _consistent_problem(rng)
    truth = np.linalg.lstsq(x, x @ np.zeros(NUM_PARAMS) - y, rcond=None)[0]
    num_steps = 400
    directions, _ = _run(x, y, *SOLVERS[solver], 1.0, rate=0.0, num_steps=num_steps)
    errors = np.linalg.norm(directions - truth, axis=1) / np.linalg.norm(truth)
    assert (errors[1:] <= errors[:-1] * (1 + 1e-6) + 1e-9).all()
    smallest = np.linalg.svd(x, compute_uv=False)[-1]
    rate = 1 - smallest**2 / (NUM_ROWS / BATCH) / BATCH  # β ≤ BATCH for unit rows
    assert errors[-1] <= 10 * rate ** (num_steps / 2) + 1e-6

    # Practically without momentum: just enough that the directions are kept.
    plain, _ = _run(x, y, *SOLVERS[solver], 1e-30, rate=0.0, num_steps=num_steps)
    plain_errors = np.linalg.norm(plain - truth, axis=1) / np.linalg.norm(truth)
    # Each sees three rows of 24: most of the truth is orthogonal to them.
    assert plain_errors.min() > 0.5


@pytest.mark.long
def test_training_is_faster_by_what_the_last_directions_know(rng, x64):
    """A plain step sees one block of rows in eight, with momentum nearly all."""
    x, y = _consistent_problem(rng)
    decades = {}
    for momentum in (0.0, 0.95):
        _, w = _run(x, y, ngd.Cholesky(), 1e-9, momentum, rate=0.02, num_steps=600)
        loss = np.mean((x @ np.asarray(w[-1]) - y) ** 2) / np.mean(y**2)
        decades[momentum] = -np.log10(loss)
    assert 2 * decades[0.0] < decades[0.95] < 8 * decades[0.0]


@pytest.mark.long
def test_momentum_does_not_vanish_with_the_damping(rng, x64):
    """λ → 0: of all directions that fit the batch, the one nearest to μ d_previous."""
    x, y = _consistent_problem(rng)
    for solver, damping in SOLVERS.values():
        directions, _ = _run(x, y, solver, damping, 0.7, rate=0.0, num_steps=2)
        rows = jax.random.split(jax.random.key(0), 2)
        rows = np.asarray(jax.random.choice(rows[1], NUM_ROWS, (BATCH,), replace=False))
        start = 0.7 * np.asarray(directions[0])
        inverse = np.linalg.pinv(x[rows])
        expected = start + inverse @ (-y[rows] - x[rows] @ start)
        np.testing.assert_allclose(directions[1], expected, atol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("rate", [0.5, None])
def test_what_is_remembered_is_what_was_taken(rate, rng, x64):
    """A radius that shortens the step shortens the direction that momentum keeps."""
    x, y = _consistent_problem(rng)
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    w = jnp.zeros(NUM_PARAMS)
    gradient = jnp.asarray(x.T @ (x @ np.zeros(NUM_PARAMS) - y) / NUM_ROWS)
    kept = {}
    for max_kl in (1e-3, 1e9):
        tx = ngd.natural_gradient(
            rate,
            _linear_fn,
            ngd.Gaussian(event_ndims=0),
            max_kl=max_kl,
            damping=1e-3,
            solver=ngd.Cholesky(),
            momentum=0.9,
        )
        updates, state = tx.update(gradient, tx.init(w), w, batch=batch)
        kept[max_kl] = state.direction, updates, state.info.step_scale
    direction, updates, scale = kept[1e-3]
    assert scale < (rate or 1.0)
    np.testing.assert_allclose(updates, -(rate or 1.0) * direction, rtol=1e-10)
    # A radius that does not bind changes nothing, nor does growth towards it.
    whole, _, scale = kept[1e9]
    assert scale >= (rate or 1.0)
    np.testing.assert_allclose(
        np.linalg.lstsq(np.stack([direction]).T, whole)[0] * direction, whole, rtol=1e-8
    )
    assert jnp.linalg.norm(whole) > jnp.linalg.norm(direction)


@pytest.mark.long
def test_steps_that_a_radius_has_cut_do_not_add_up(rng):
    """A small convolution on noisy batches, of which every step is shortened."""
    images = jnp.asarray(rng.normal(size=(256, 6, 6, 1)), jnp.float32)
    labels = jnp.asarray(jnp.sum(images[:, :2], (1, 2, 3)) > 0, jnp.int32)
    params = {
        "kernel": jnp.asarray(rng.normal(size=(3, 3, 1, 4)) / 3, jnp.float32),
        "w": jnp.asarray(rng.normal(size=(64, 2)) / 8, jnp.float32),
    }

    def model_fn(params, batch):
        numbers = ("NHWC", "HWIO", "NHWC")
        hidden = jax.lax.conv_general_dilated(
            batch["x"], params["kernel"], (1, 1), "VALID", dimension_numbers=numbers
        )
        return jnp.tanh(hidden).reshape(len(hidden), -1) @ params["w"]

    tx = ngd.natural_gradient(
        0.3, model_fn, ngd.Categorical(), max_kl=0.05, momentum=0.9, solver=ngd.KFAC()
    )

    def loss_fn(params, batch):
        logits = model_fn(params, batch)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["y"]
        ).mean()

    def step(carry, key):
        params, state = carry
        rows = jax.random.choice(key, 256, (32,), replace=False)
        batch = {"x": images[rows], "y": labels[rows]}
        gradient = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(gradient, state, params, batch=batch)
        whole = {"x": images, "y": labels}
        return (optax.apply_updates(params, updates), state), loss_fn(params, whole)

    keys = jax.random.split(jax.random.key(0), 100)
    losses = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), keys)[1])()
    assert losses[-20:].max() < 0.35


def test_a_refused_solve_is_no_step_along_momentum_alone():
    # SampleSpace refuses the second batch, whose examples the model mixes.
    def mixing_fn(w, batch):
        x = batch["x"] - batch["mixed"] * jnp.mean(batch["x"], axis=0)
        return x @ w

    def loss_fn(w, batch):
        return jnp.sum((mixing_fn(w, batch) - 2) ** 2)

    tx = ngd.natural_gradient(
        1.0,
        mixing_fn,
        ngd.Gaussian(),
        max_kl=1e-2,
        momentum=0.9,
        damping=1e-3,
        solver=ngd.SampleSpace(),
    )
    w = jnp.ones((3, 1))
    x = jax.random.normal(jax.random.key(0), (8, 3)) + 1
    state, statuses = tx.init(w), []
    for mixed in (0.0, 1.0, 0.0):
        batch = {"x": x, "mixed": jnp.asarray(mixed)}
        grads = jax.grad(loss_fn)(w, batch)
        updates, state = tx.update(grads, state, w, batch=batch)
        statuses.append(ngd.StepStatus(int(state.info.status)).name)
        if mixed:
            assert int(state.info.solver.status) == ngd.SolverStatus.NOT_SEPARABLE
            chex.assert_trees_all_equal(updates, jnp.zeros_like(w))
        w = optax.apply_updates(w, updates)
    assert statuses == ["TAKEN", "NO_DIRECTION", "TAKEN"]
