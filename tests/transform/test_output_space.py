"""Gradients in the space of outputs: small damping, remainders, wave functions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from tests import reference
from tests.marks import long_unless
from tests.transform.problems import (
    damped_solve,
    flat,
    grad_fn,
    loss_of_outputs,
    make_problem,
    model_fn,
)

SOLVERS = {
    "sample_space": ngd.SampleSpace(),
    "lsmr": ngd.LSMR(max_steps=80, rtol=1e-13),
}


def _regression(num_examples=8, seed=0):
    """Fewer residuals than parameters, and a loss that is their squared error."""
    rng = np.random.default_rng(seed)
    params = reference.network_params(rng, 1, num_hidden=8, dtype=jnp.float64)
    batch = {
        "x": jnp.asarray(rng.normal(size=(num_examples, 2))),
        "y": jnp.asarray(rng.normal(size=(num_examples, 1))),
    }
    return params, batch


def _squared_error(outputs, batch):
    return jnp.mean(jnp.sum((outputs - batch["y"]) ** 2, axis=-1)) / 2


def _in_pairs(batch, distance):
    """Examples that nearly equal each other: G is nearly singular.

    Round-off of the gradient in the space of parameters is then no longer told from
    what the examples differ by, so that only the coefficients say where to go.
    """

    def pair(x):
        half = len(x) // 2
        return x.at[-half:].set(x[:half] + distance * x[-half:])

    return jax.tree.map(pair, batch)


def _loss_fn(params, batch):
    return _squared_error(model_fn(params, batch), batch)


def _regression_step(solver, *, rate=1.0, **options):
    tx = ngd.natural_gradient(
        rate,
        model_fn,
        ngd.Gaussian(),
        solver=solver,
        loss_fn=_squared_error,
        **options,
    )
    return tx, _update_of(tx)


def _update_of(tx):
    """`tx.update`, compiled once for all gradients, and for all batches of a shape."""
    return jax.jit(lambda g, s, p, b: tx.update(g, s, p, batch=b))


def _dense(model_fn, params, batch, likelihood):
    fisher = jax.jit(lambda p, b: ngd.dense_fisher(model_fn, p, b, likelihood))
    return np.asarray(fisher(params, batch))


def _minimum_norm_fit(params, batch):
    """The shortest d with J d = outputs - y, from the singular values of J."""
    outputs, rows = reference.jacobian(model_fn, params, batch)
    rows = rows.reshape(-1, rows.shape[-1])
    return np.linalg.lstsq(rows, np.ravel(outputs - batch["y"]), rcond=None)[0]


@pytest.mark.parametrize("name", long_unless({"lsmr"}, SOLVERS.keys()))
def test_small_damping_does_not_lose_the_direction(name, x64):
    """λ → 0 is the shortest step that fits the batch; by way of F, 3e-3 is all."""
    params, batch = _regression()
    grads = jax.jit(jax.grad(_loss_fn))(params, batch)
    truth = _minimum_norm_fit(params, batch)
    tx, update = _regression_step(SOLVERS[name], damping=1e-14)
    updates, state = update(grads, tx.init(params), params, batch)
    assert state.info.status == ngd.StepStatus.TAKEN
    error = np.linalg.norm(flat(updates) + truth) / np.linalg.norm(truth)
    assert error < 1e-9


@pytest.mark.long
@pytest.mark.parametrize("name", SOLVERS)
def test_small_damping_does_not_lose_the_momentum(name, x64):
    """λ → 0: of all steps that fit the batch, the nearest to μ times the last one.

    The last direction moves the right-hand side in the space of outputs too: without
    that, SampleSpace is off by 5e-2.
    """
    params, batch = _regression()
    batch = _in_pairs(batch, 1e-3)
    tx, update = _regression_step(SOLVERS[name], rate=0.1, damping=1e-14, momentum=0.8)
    gradient_fn = jax.jit(jax.grad(_loss_fn))
    state, previous = tx.init(params), 0.0
    for _ in range(3):
        outputs, rows = reference.jacobian(model_fn, params, batch)
        rows, residuals = rows[:, 0], np.ravel(outputs - batch["y"])
        start = 0.8 * previous * np.ones(rows.shape[1])
        truth = start + np.linalg.lstsq(rows, residuals - rows @ start, rcond=0)[0]
        updates, state = update(gradient_fn(params, batch), state, params, batch)
        assert state.info.status == ngd.StepStatus.TAKEN
        error = np.linalg.norm(flat(updates) + 0.1 * truth) / np.linalg.norm(truth)
        assert error < 1e-6
        params, previous = optax.apply_updates(params, updates), truth


@pytest.mark.long
@pytest.mark.parametrize("name", SOLVERS)
def test_the_gradient_handed_in_is_what_is_solved_for(name, x64):
    """Weight decay inside of the loss, or a clipped gradient: no part of it is lost."""
    params, batch = _regression()
    decay = lambda p, b: (  # noqa: E731
        _loss_fn(p, b) + 0.01 * sum(jnp.sum(x**2) for x in jax.tree.leaves(p))
    )
    decayed = jax.jit(jax.grad(decay))(params, batch)
    clipped = jax.tree.map(
        lambda g: 0.3 * g, jax.jit(jax.grad(_loss_fn))(params, batch)
    )
    fisher = _dense(model_fn, params, batch, ngd.Gaussian())
    tx, update = _regression_step(SOLVERS[name], damping=1e-3)
    for grads in (decayed, clipped):
        updates, _ = update(grads, tx.init(params), params, batch)
        expected = damped_solve(fisher, flat(grads), 1e-3)
        np.testing.assert_allclose(
            flat(updates), -expected, atol=1e-8 * np.abs(expected).max()
        )


@pytest.mark.long
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("metric", ["identity", "scales"])
def test_momentum_and_metric_keep_their_meaning(name, metric, x64):
    params, batch = _regression()
    scales = jax.tree.map(lambda p: 1 + jnp.abs(p), params)
    damping, diagonal = 1e-6, np.ones(len(flat(params)))
    rule = damping
    if metric == "scales":
        rule, diagonal = ngd.CovariantDamping(damping, scales), flat(scales) ** -2.0
    tx, update = _regression_step(SOLVERS[name], rate=0.1, damping=rule, momentum=0.8)
    gradient_fn = jax.jit(jax.grad(_loss_fn))
    state, previous = tx.init(params), np.zeros(len(diagonal))
    for _ in range(2):
        grads = gradient_fn(params, batch)
        fisher = _dense(model_fn, params, batch, ngd.Gaussian())
        # As a least-squares problem, or this reference would lose it.
        root = np.linalg.cholesky(fisher + damping * np.diag(diagonal)).T
        rhs = flat(grads) + damping * 0.8 * diagonal * previous
        expected = np.linalg.solve(root, np.linalg.solve(root.T, rhs))
        updates, state = update(grads, state, params, batch)
        np.testing.assert_allclose(
            flat(updates), -0.1 * expected, atol=1e-7 * np.abs(expected).max()
        )
        params, previous = optax.apply_updates(params, updates), expected


@pytest.mark.long
@pytest.mark.parametrize("name", SOLVERS)
def test_wave_functions_with_complex_amplitudes(name, x64):
    """Stochastic reconfiguration: the energy gradient as a function of log ψ."""
    rng = np.random.default_rng(2)
    params = reference.network_params(rng, 2, num_hidden=8, dtype=jnp.float64)
    batch = {
        "x": jnp.asarray(rng.normal(size=(9, 2))),
        "energy": jnp.asarray(rng.normal(size=9) + 1j * rng.normal(size=9)),
    }

    def log_psi(params, batch):
        outputs = reference.network(params, batch["x"])
        return jax.lax.complex(outputs[:, 0], outputs[:, 1])

    def energy_fn(outputs, batch):
        centred = batch["energy"] - batch["energy"].mean()
        return 2 * jnp.mean(jnp.real(jnp.conj(centred) * outputs))

    grads_of = jax.jit(jax.grad(lambda p, b: energy_fn(log_psi(p, b), b)))
    grads = grads_of(params, batch)
    fisher = _dense(log_psi, params, batch, ngd.LogAmplitude())
    expected = damped_solve(fisher, flat(grads), 1e-5)

    def make(damping):
        return ngd.natural_gradient(
            0.5,
            log_psi,
            ngd.LogAmplitude(),
            damping=damping,
            solver=SOLVERS[name],
            loss_fn=energy_fn,
        )

    tx = make(1e-5)

    # The coefficients are the gradient, and no rest hides that they are not.
    @jax.jit
    def pull(params, batch):
        linear = ngd.linearize_fisher(log_psi, params, batch, ngd.LogAmplitude())
        cotangents = jnp.conj(jax.grad(energy_fn)(linear.outputs, batch))
        return linear.sqrt_rmatvec(linear.sqrt_solve(cotangents))

    np.testing.assert_allclose(flat(pull(params, batch)), flat(grads), atol=1e-13)
    updates, state = _update_of(tx)(grads, tx.init(params), params, batch)
    assert state.info.status == ngd.StepStatus.TAKEN
    np.testing.assert_allclose(
        flat(updates), -0.5 * expected, atol=1e-8 * np.abs(expected).max()
    )

    # The conjugate matters at λ → 0 where the examples nearly equal each other: without
    # it, SampleSpace is off by a half.
    batch = _in_pairs(batch, 1e-2)
    _, rows = reference.jacobian(log_psi, params, batch)
    centred = rows - rows.mean(0)
    energies = np.asarray(batch["energy"] - batch["energy"].mean())
    matrix = np.concatenate([centred.real, centred.imag])
    rhs = np.concatenate([2 * energies.real, 2 * energies.imag])
    truth = np.linalg.lstsq(matrix, rhs, rcond=1e-13)[0]
    tx = make(1e-14)
    updates, _ = _update_of(tx)(grads_of(params, batch), tx.init(params), params, batch)
    error = np.linalg.norm(flat(updates) + 0.5 * truth) / np.linalg.norm(truth)
    assert error < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("name", SOLVERS)
def test_classification_in_single_precision(name):
    params, batch = make_problem()

    grads = grad_fn(params, batch)
    tx = ngd.natural_gradient(
        1.0,
        model_fn,
        ngd.Categorical(),
        damping=1e-2,
        solver=SOLVERS[name],
        loss_fn=loss_of_outputs,
    )
    updates, _ = _update_of(tx)(grads, tx.init(params), params, batch)
    fisher = _dense(model_fn, params, batch, ngd.Categorical())
    expected = damped_solve(fisher.astype(float), flat(grads), 1e-2)
    np.testing.assert_allclose(
        flat(updates), -expected, atol=1e-4 * np.abs(expected).max()
    )
