"""Gradients of the energy against its derivative; directions against NetKet's."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from experiments.tasks.wave_functions.ansatz import RestrictedBoltzmann
from experiments.tasks.wave_functions.energy import (
    energy_batch,
    energy_gradient,
    output_loss,
    reweighted_energy,
)
from experiments.tasks.wave_functions.exact import (
    enumerate_configurations,
    exact_energy,
    exact_weights,
    one_of_each_orbit,
)
from experiments.tasks.wave_functions.hamiltonians import make_ising

# Samples of a restricted Boltzmann machine on the Ising ring of 16 spins, and what
# NetKet 3 makes of them: local energies, the gradient, and directions at a shift of
# 0.01, plain and with momentum 0.8 after an update of a tenth of the plain one.
NETKET = Path(__file__).parents[3] / "data" / "tfim16_rbm.npz"


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def netket():
    return dict(np.load(NETKET))


def model_of(num_hidden, dtype=float):
    module = RestrictedBoltzmann(num_hidden, dtype)
    return lambda params, batch: module.apply({"params": params}, batch["spins"])


def batch_of(netket):
    names = ("visible_bias", "hidden_bias", "kernel")
    params = {name: jnp.asarray(netket[name]) for name in names}
    spins = jnp.asarray(netket["samples"], float)
    return params, energy_batch(make_ising(16, 1.0), model_of(16), params, spins)


def in_netkets_order(tree):
    parts = tree["hidden_bias"], tree["kernel"].ravel(), tree["visible_bias"]
    return np.concatenate([np.asarray(part) for part in parts])


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_amplitudes_local_energies_and_gradient_are_netkets(netket):
    params, batch = batch_of(netket)
    np.testing.assert_allclose(batch["log_psi"], netket["log_psi"], rtol=1e-12)
    np.testing.assert_allclose(batch["energies"], netket["energies"], rtol=1e-12)
    found = in_netkets_order(energy_gradient(model_of(16), params, batch))
    assert relative(found, netket["gradient"]) < 1e-12


@pytest.mark.long
@pytest.mark.parametrize("solver", [ngd.SampleSpace(), ngd.Cholesky()])
def test_directions_are_netkets(netket, solver):
    params, batch = batch_of(netket)
    tx = ngd.scale_by_natural_gradient(
        model_of(16),
        ngd.LogAmplitude(),
        damping=float(netket["damping"]),
        momentum=0.8,
        solver=solver,
        loss_fn=output_loss if solver.uses_coefficients else None,
    )

    @jax.jit
    def run(params, batch):
        grads = energy_gradient(model_of(16), params, batch)
        plain, state = tx.update(grads, tx.init(params), params, batch=batch)
        before = jax.tree.map(lambda leaf: 0.1 * leaf, state.direction)
        state = state._replace(direction=before)
        return plain, tx.update(grads, state, params, batch=batch)[0]

    plain, with_momentum = map(in_netkets_order, run(params, batch))
    assert relative(plain, netket["direction"]) < 1e-8
    assert relative(plain, netket["direction_by_parameters"]) < 1e-8
    assert relative(with_momentum, netket["direction_with_momentum"]) < 1e-8
    assert relative(plain, with_momentum) > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("dtype", [float, complex])
def test_gradient_is_the_derivative_of_the_energy(dtype):
    """On all configurations, where |ψ|² is uniform: that is what the samples say."""
    system = make_ising(4, 0.7)
    all_of_them = enumerate_configurations(system)
    spins = jnp.asarray(all_of_them.spins)
    model_fn = model_of(3, dtype)
    # Purely imaginary parts of log ψ alone: |ψ|² is uniform.
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(4, 3))

    def phases(theta, batch):
        return 1j * jnp.sum(jnp.sin(batch["spins"] @ kernel + theta), axis=-1)

    theta = jnp.asarray(rng.normal(size=3))
    batch = energy_batch(system, phases, theta, spins)
    found = energy_gradient(phases, theta, batch)
    expected = jax.grad(
        lambda theta: exact_energy(all_of_them, phases(theta, {"spins": spins}))
    )(theta)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert float(jnp.linalg.norm(expected)) > 0.1
    # A holomorphic model: the gradient of a product state is known by its derivative.
    params = {
        "visible_bias": jnp.zeros(4, dtype),
        "hidden_bias": jnp.zeros(3, dtype),
        "kernel": jnp.asarray(kernel, dtype),
    }
    if dtype is complex:
        params["kernel"] = 0 * params["kernel"]  # ψ = 1, so that |ψ|² is uniform
        params["visible_bias"] = 1j * jnp.asarray(rng.normal(size=4))
    else:
        params["kernel"] = 0 * params["kernel"]
    batch = energy_batch(system, model_fn, params, spins)
    found, unravel = ravel_pytree(energy_gradient(model_fn, params, batch))

    def energy(parts):
        tree = unravel(parts[0] + (1j * parts[1] if dtype is complex else 0))
        return exact_energy(all_of_them, model_fn(tree, {"spins": spins}))

    flat, _ = ravel_pytree(params)
    by_real, by_imaginary = jax.grad(energy)(jnp.stack([flat.real, flat.imag]))
    np.testing.assert_allclose(found, by_real + 1j * by_imaginary, atol=1e-12)


@pytest.mark.long
def test_reweighted_energy_is_the_energy_of_other_parameters():
    system = make_ising(4, 0.7)
    all_of_them = enumerate_configurations(system)
    spins = jnp.asarray(all_of_them.spins)
    model_fn = model_of(3)
    start = {
        "visible_bias": jnp.zeros(4),
        "hidden_bias": jnp.zeros(3),
        "kernel": jnp.zeros((4, 3)),
    }  # every configuration is as likely
    batch = energy_batch(system, model_fn, start, spins)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), start)
    found = reweighted_energy(system, model_fn, moved, batch)
    expected = exact_energy(all_of_them, model_fn(moved, batch))
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.long
def test_weighted_configurations_have_the_energy_and_gradient_of_any_state():
    system = make_ising(4, 0.7)
    mirrored = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    every = one_of_each_orbit(enumerate_configurations(system), mirrored, flip=True)
    assert len(set(every.counts)) > 1
    spins = jnp.asarray(every.spins)
    weights = np.random.default_rng(1).normal(size=4)
    weights = jnp.asarray(weights + weights[::-1])

    def model_fn(theta, batch):
        field = jnp.abs(batch["spins"] @ weights)[:, None] * theta
        return jnp.sum(jnp.tanh(field), axis=1) + 1j * jnp.sum(jnp.sin(field), axis=1)

    def energy(theta):
        return exact_energy(every, model_fn(theta, {"spins": spins}))

    theta = jnp.asarray([0.3, -0.7, 1.1])
    batch = energy_batch(system, model_fn, theta, spins)
    weighted = exact_weights(jnp.asarray(every.counts), batch["log_psi"])
    batch["weights"] = weighted
    assert float(jnp.mean(weighted)) == pytest.approx(1, rel=1e-12)
    found = jnp.real(jnp.mean(weighted * batch["energies"]))
    assert float(found) == pytest.approx(float(energy(theta)), rel=1e-12)
    gradient = energy_gradient(model_fn, theta, batch)
    np.testing.assert_allclose(gradient, jax.grad(energy)(theta), rtol=1e-10)
    elsewhere = reweighted_energy(system, model_fn, 1.5 * theta, batch)
    assert float(elsewhere) == pytest.approx(float(energy(1.5 * theta)), rel=1e-12)
