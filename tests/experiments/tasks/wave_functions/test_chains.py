"""Hamiltonians, local energies and exact energies, against matrices by definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks.wave_functions.chains import (
    local_energies,
    make_heisenberg,
    make_ising,
)
from experiments.tasks.wave_functions.exact import (
    enumerate_configurations,
    exact_energy,
    ground_energy,
    ising_energy,
)

PAULI = {
    "x": np.array([[0.0, 1.0], [1.0, 0.0]]),
    "y": np.array([[0.0, -1.0j], [1.0j, 0.0]]),
    "z": np.diag([1.0, -1.0]),
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def on_sites(num_spins, matrices):
    """The product of Pauli matrices at the given sites, as a matrix of all spins."""
    factors = [
        PAULI[matrices[i]] if i in matrices else np.eye(2) for i in range(num_spins)
    ]
    return functools.reduce(np.kron, factors)


def bonds(num_spins, direction):
    return sum(
        on_sites(num_spins, {i: direction, (i + 1) % num_spins: direction})
        for i in range(num_spins)
    )


def ising_matrix(num_spins, field):
    fields = sum(on_sites(num_spins, {i: "x"}) for i in range(num_spins))
    return -bonds(num_spins, "z") - field * fields


def heisenberg_matrix(num_spins):
    return np.real(sum(bonds(num_spins, direction) for direction in "xyz"))


def matrix_of(all_of_them):
    """H as the chain gives it, among its configurations."""
    size = len(all_of_them.spins)
    matrix = np.diag(all_of_them.diagonal)
    for m in range(all_of_them.neighbours.shape[1]):
        matrix[np.arange(size), all_of_them.neighbours[:, m]] += all_of_them.elements[
            :, m
        ]
    return matrix


def test_ising_ring_is_that_of_the_definition():
    found = matrix_of(enumerate_configurations(make_ising(4, 0.7)))
    np.testing.assert_allclose(found, ising_matrix(4, 0.7), atol=1e-14)


def test_heisenberg_ring_is_that_of_the_definition_with_every_second_spin_turned():
    all_of_them = enumerate_configurations(make_heisenberg(6, 0.0))
    found = matrix_of(all_of_them)
    place = (all_of_them.spins < 0).astype(int) @ (1 << np.arange(5, -1, -1))
    signs = np.prod(np.where(np.arange(6) % 2, all_of_them.spins, 1.0), axis=1)
    expected = heisenberg_matrix(6)[np.ix_(place, place)] * np.outer(signs, signs)
    np.testing.assert_allclose(found, expected, atol=1e-14)
    assert len(place) == 20
    off_diagonal = found - np.diag(np.diag(found))
    assert off_diagonal.max() <= 0


@pytest.mark.parametrize(
    "chain", [make_ising(6, 1.3), make_heisenberg(6, 0.0)], ids=lambda chain: chain.name
)
def test_ground_energy_is_the_lowest_eigenvalue(chain):
    all_of_them = enumerate_configurations(chain)
    full = ising_matrix(6, 1.3) if chain.name == "ising" else heisenberg_matrix(6)
    expected = np.linalg.eigvalsh(full)[0]
    assert ground_energy(all_of_them) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("field", [0.5, 1.0, 1.7])
def test_free_fermions_have_the_energy_of_the_ring(field):
    expected = np.linalg.eigvalsh(ising_matrix(8, field))[0]
    assert ising_energy(8, field) == pytest.approx(expected, rel=1e-12)


def test_rings_that_are_not_known_are_errors():
    with pytest.raises(ValueError, match="`num_spins` must be even, got 5"):
        ising_energy(5, 1.0)
    with pytest.raises(ValueError, match="got 5 spins and field=0"):
        make_heisenberg(5, 0)
    with pytest.raises(ValueError, match="at most 16 spins, got 18"):
        enumerate_configurations(make_ising(18, 1.0))


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(
    "chain", [make_ising(4, 0.7), make_heisenberg(4, 0.0)], ids=lambda chain: chain.name
)
def test_local_and_exact_energies_are_those_of_the_matrix(chain, is_complex):
    all_of_them = enumerate_configurations(chain)
    rng = np.random.default_rng(0)
    log_psi = rng.normal(size=len(all_of_them.spins)) + 0j
    log_psi += 1j * rng.normal(size=len(log_psi)) * is_complex
    log_psi = log_psi if is_complex else log_psi.real
    codes = jnp.asarray(all_of_them.spins)

    def log_psi_fn(spins):
        index = jnp.argmax(jnp.all(spins[:, None] == codes[None], axis=-1), axis=1)
        return jnp.asarray(log_psi)[index]

    psi = np.exp(log_psi)
    applied = matrix_of(all_of_them) @ psi
    found = local_energies(chain, log_psi_fn, codes, jnp.asarray(log_psi))
    np.testing.assert_allclose(found, applied / psi, rtol=1e-12)
    energy = np.real(np.vdot(psi, applied) / np.vdot(psi, psi))
    found = exact_energy(all_of_them, jnp.asarray(log_psi))
    assert float(found) == pytest.approx(energy, rel=1e-12)
