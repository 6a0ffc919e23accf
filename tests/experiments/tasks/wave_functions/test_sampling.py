"""Samples of |ψ|²: each state as often as it should be."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments.tasks.wave_functions.ansatz import (
    Convolutional,
    Perceptron,
    RestrictedBoltzmann,
    Transformer,
    log_cosh,
)
from experiments.tasks.wave_functions.exact import enumerate_configurations
from experiments.tasks.wave_functions.hamiltonians import (
    make_heisenberg,
    make_ising,
    make_square_heisenberg,
)
from experiments.tasks.wave_functions.sampling import (
    move_chains,
    sample_exactly,
    start_chains,
)
from tests.marks import long_unless

COUPLINGS = np.random.default_rng(0).normal(size=(4, 4)) / 2


def log_psi_fn(spins):
    return jnp.sum((spins @ COUPLINGS) * spins, axis=-1) / 2 + 0.1 * spins[..., 0]


def p_value(system, samples):
    """Of Pearson's χ² between the samples and |ψ|²."""
    spins = enumerate_configurations(system).spins
    p = np.exp(2 * np.asarray(log_psi_fn(spins), float))
    codes = 1 << np.arange(4)
    place = {code: index for index, code in enumerate((spins > 0) @ codes)}
    found = [place[code] for code in (np.asarray(samples) > 0) @ codes]
    counts = np.bincount(found, minlength=len(spins))
    return scipy.stats.chisquare(counts, len(found) * p / p.sum()).pvalue


def test_exact_samples_are_as_often_as_they_should_be():
    system = make_ising(4, 1.0)
    spins = jnp.asarray(enumerate_configurations(system).spins)
    ones = jnp.ones(len(spins))
    chosen = sample_exactly(jax.random.key(0), ones, log_psi_fn(spins), 20_000)
    assert p_value(system, spins[chosen]) > 1e-3


def test_exact_samples_come_in_proportion_to_the_counts():
    counts = jnp.array([1.0, 3.0, 4.0])
    chosen = sample_exactly(jax.random.key(0), counts, jnp.zeros(3), 20_000)
    expected = 20_000 * np.array([1, 3, 4]) / 8
    assert scipy.stats.chisquare(np.bincount(chosen), expected).pvalue > 1e-3


@pytest.mark.parametrize(
    "system",
    [
        make_ising(4, 1.0),
        pytest.param(make_heisenberg(4, 0.0), marks=pytest.mark.long),
        pytest.param(make_square_heisenberg(4), marks=pytest.mark.long),
    ],
    ids=lambda system: system.name,
)
def test_markov_chains_come_to_the_distribution(system):
    """The last positions of very many chains, which are independent."""
    start_key, move_key = jax.random.split(jax.random.key(1))
    start = start_chains(system, start_key, 20_000)
    assert set(np.unique(start)) == {-1.0, 1.0}
    samples, taken = jax.jit(
        lambda key, spins: move_chains(system, log_psi_fn, key, spins, 200)
    )(move_key, start)
    assert 0.05 < float(taken) < 1.0
    assert p_value(system, samples) > 1e-3
    assert p_value(system, start) < 1e-6  # so that the test can fail


@pytest.mark.long
@pytest.mark.parametrize("width", [1, 3, 4, 7])
def test_convolutions_are_those_of_flax(width):
    spins = jnp.asarray(enumerate_configurations(make_ising(5, 1.0)).spins, jnp.float32)
    module = Convolutional((3, 3), width, jnp.float32)
    params = module.init(jax.random.key(0), spins)["params"]
    x = spins[..., None]
    for number in range(2):
        layer = dict(params[f"Dense_{number}"])
        layer["kernel"] = layer["kernel"].reshape(width, -1, 3)
        convolution = nn.Conv(3, (width,), padding="CIRCULAR")
        update = jnp.tanh(convolution.apply({"params": layer}, x))
        x = x + update if number else update
    expected = x.sum(1) @ params["Dense_2"]["kernel"]
    found = module.apply({"params": params}, spins)
    np.testing.assert_allclose(found, expected[:, 0], atol=1e-5)


@pytest.mark.long
def test_gradients_of_single_examples_have_no_grouped_convolutions():
    """Which XLA has no fast code for in float64 on a CPU."""
    module, spins = Convolutional((3,), 3, jnp.float32), jnp.ones((2, 4))
    params = module.init(jax.random.key(0), spins)
    row = jax.grad(lambda params, spins: module.apply(params, spins[None])[0])
    program = jax.jit(jax.vmap(row, (None, 0))).lower(params, spins)
    assert "convolution" not in program.as_text()


@pytest.mark.parametrize("is_complex", long_unless([True], [False, True]))
def test_log_cosh_is_right_where_cosh_overflows(is_complex):
    x = np.array([-800.0, -3.0, -1e-9, 0.0, 0.5, 3.0, 800.0])
    x = x + 0.3j * is_complex if is_complex else x
    with jax.enable_x64(True):
        found = log_cosh(jnp.asarray(x))
        gradient = jax.vmap(jax.grad(log_cosh, holomorphic=is_complex))(jnp.asarray(x))
    middle = slice(1, -1)
    np.testing.assert_allclose(np.exp(found[middle]), np.cosh(x[middle]), rtol=1e-12)
    np.testing.assert_allclose(found[-1].real, 800 - np.log(2), rtol=1e-12)
    np.testing.assert_allclose(gradient, np.tanh(x), rtol=1e-12, atol=1e-15)


@pytest.mark.long
@pytest.mark.parametrize(
    "module",
    [
        RestrictedBoltzmann(5, jnp.float32),
        RestrictedBoltzmann(5, jnp.complex64),
        Perceptron((5, 4), jnp.float32),
        Convolutional((3, 3), 3, jnp.float32),
        Transformer(1, 4, jnp.float32, num_heads=2),
    ],
    ids=["rbm", "complex", "mlp", "cnn", "transformer"],
)
def test_networks_give_a_number_for_each_configuration(module):
    spins = jnp.asarray(enumerate_configurations(make_ising(4, 1.0)).spins, jnp.float32)
    params = module.init(jax.random.key(0), spins[:1])["params"]
    log_psi = module.apply({"params": params}, spins)
    assert log_psi.shape == (16,)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(params)}
    assert kinds == {log_psi.dtype} == {jnp.dtype(module.dtype)}
    assert len(np.unique(np.asarray(log_psi))) > 2
    turned = module.apply({"params": params}, jnp.roll(spins, 1, axis=1))
    is_same = np.allclose(log_psi, turned, atol=1e-6)
    assert is_same == isinstance(module, Convolutional | Transformer)
