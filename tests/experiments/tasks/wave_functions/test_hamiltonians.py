"""Hamiltonians, local energies and exact energies, against matrices by definition."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg

from experiments.tasks.wave_functions.exact import (
    enumerate_configurations,
    exact_energy,
    exact_variance,
    ground_energy,
    ising_energy,
    listed_energies,
    one_of_each_orbit,
)
from experiments.tasks.wave_functions.hamiltonians import (
    local_energies,
    make_heisenberg,
    make_ising,
    make_square_heisenberg,
    make_square_ising,
)
from tests.marks import long_unless

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


SQUARE_OF_NINE = [
    *((3 * x + y, 3 * x + (y + 1) % 3) for x in range(3) for y in range(3)),
    *((3 * x + y, 3 * ((x + 1) % 3) + y) for x in range(3) for y in range(3)),
]


def exchange_matrix(side, coupling):
    """Σ₁ σ·σ + J2 Σ₂ σ·σ at Σs = 0, by flips of bits, without any rotation."""
    num_spins = side**2
    states = np.array([n for n in range(2**num_spins) if n.bit_count() == side**2 // 2])
    place = np.full(2**num_spins, -1)
    place[states] = np.arange(len(states))
    matrix = scipy.sparse.csr_array((len(states), len(states)))
    for x, y in itertools.product(range(side), repeat=2):
        for dx, dy, j in ((0, 1, 1), (1, 0, 1), (1, 1, coupling), (1, -1, coupling)):
            here, there = side * x + y, side * ((x + dx) % side) + (y + dy) % side
            unequal = (states >> here & 1) != (states >> there & 1)
            matrix += scipy.sparse.diags_array(j * np.where(unequal, -1.0, 1.0))
            rows = np.flatnonzero(unequal)
            columns = place[states[rows] ^ (1 << here | 1 << there)]
            exchange = np.full(len(rows), 2.0 * j)
            matrix += scipy.sparse.csr_array((exchange, (rows, columns)), matrix.shape)
    return matrix


def matrix_of(all_of_them):
    """H as the system gives it, among its configurations."""
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


def test_square_of_ising_spins_is_that_of_the_definition():
    found = matrix_of(enumerate_configurations(make_square_ising(9, 0.7)))
    expected = -0.7 * sum(on_sites(9, {i: "x"}) for i in range(9))
    expected -= sum(on_sites(9, {i: "z", j: "z"}) for i, j in SQUARE_OF_NINE)
    np.testing.assert_allclose(found, expected, atol=1e-13)


def test_frustrated_square_of_16_spins_has_the_published_ground_state():
    """-33.831693 in Pauli matrices: Wu et al., Variational benchmarks, 2024."""
    all_of_them = enumerate_configurations(make_square_heisenberg(16, coupling=0.5))
    assert len(all_of_them.spins) == 12_870
    assert ground_energy(all_of_them) == pytest.approx(-33.831693, abs=6e-7)


def test_square_with_second_neighbours_is_that_of_bits():
    start = np.ones(12_870)
    expected = scipy.sparse.linalg.eigsh(
        exchange_matrix(4, 0.3), k=1, which="SA", v0=start, tol=1e-10
    )[0][0]
    system = make_square_heisenberg(16, coupling=0.3)
    found = ground_energy(enumerate_configurations(system))
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "system",
    [make_ising(6, 1.3), make_heisenberg(6, 0.0)],
    ids=lambda system: system.name,
)
def test_ground_energy_is_the_lowest_eigenvalue(system):
    all_of_them = enumerate_configurations(system)
    full = ising_matrix(6, 1.3) if system.name == "ising" else heisenberg_matrix(6)
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
    with pytest.raises(ValueError, match="takes a square number, got 15"):
        make_square_ising(15)
    with pytest.raises(ValueError, match="got 9 spins and field=0"):
        make_square_heisenberg(9)
    with pytest.raises(ValueError, match="at most 16 spins, got 18"):
        enumerate_configurations(make_ising(18, 1.0))


@pytest.mark.parametrize("is_complex", long_unless([True], [False, True]))
@pytest.mark.parametrize(
    "system",
    [make_ising(4, 0.7), make_heisenberg(4, 0.0)],
    ids=lambda system: system.name,
)
def test_local_and_exact_energies_are_those_of_the_matrix(system, is_complex):
    all_of_them = enumerate_configurations(system)
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
    found = local_energies(system, log_psi_fn, codes, jnp.asarray(log_psi))
    np.testing.assert_allclose(found, applied / psi, rtol=1e-12)
    energy = np.real(np.vdot(psi, applied) / np.vdot(psi, psi))
    found = exact_energy(all_of_them, jnp.asarray(log_psi))
    assert float(found) == pytest.approx(energy, rel=1e-12)
    variance = np.real(np.vdot(applied, applied) / np.vdot(psi, psi)) - energy**2
    found = exact_variance(all_of_them, jnp.asarray(log_psi))
    assert float(found) == pytest.approx(variance, rel=1e-11)


def test_local_energies_in_batches_are_the_same_and_skip_zero_elements():
    system = make_heisenberg(6)
    spins = jnp.asarray(enumerate_configurations(system).spins)
    calls = []

    def log_psi_fn(spins, theta=0.1):
        jax.debug.callback(calls.append, np.array(spins.shape))
        return theta * spins[:, 0] * spins[:, 1] + 0.3j * spins[:, 2]

    def energies(theta, batch_size):
        log_psi = log_psi_fn(spins, theta)
        return local_energies(
            system, lambda s: log_psi_fn(s, theta), spins, log_psi, batch_size
        )

    expected = energies(0.1, None)
    elements = np.asarray(system.connected(spins)[1])
    jax.effects_barrier()
    calls.clear()
    np.testing.assert_allclose(energies(0.1, 7), expected, rtol=1e-14)
    jax.effects_barrier()
    wanted = -(-np.count_nonzero(elements) // 7)
    assert wanted < elements.size // 7
    assert [tuple(shape) for shape in calls[1:]] == [(7, 6)] * wanted

    def mean(batch_size):
        return lambda theta: jnp.mean(jnp.real(energies(theta, batch_size)))

    slopes = [float(jax.grad(mean(size))(0.1)) for size in (None, 7)]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-12)
    assert abs(slopes[0]) > 1e-3


def invariant_log_psi(spins):
    """To translations, reflections and flips of a ring."""
    bonds = spins * jnp.roll(spins, 1, axis=-1)
    further = spins * jnp.roll(spins, 2, axis=-1)
    return (
        0.3 * bonds.sum(-1)
        + 0.2j * (bonds * jnp.roll(bonds, 1, -1)).sum(-1)
        + (0.1 * further.sum(-1) ** 2)
    )


@pytest.mark.parametrize(
    "system",
    [pytest.param(make_ising(6, 0.7), marks=pytest.mark.long), make_heisenberg(6)],
    ids=lambda system: system.name,
)
def test_one_configuration_of_each_orbit_is_enough_for_an_invariant_psi(system):
    every = enumerate_configurations(system)
    ring = system.sites
    images = ring.point_group[:, ring.translations((6,))].reshape(-1, 6)
    few = one_of_each_orbit(every, images, flip=True)
    # Necklaces of two colours, up to reflections and exchange of the colours.
    assert len(few.spins) == {"ising": 8, "heisenberg": 3}[system.name]
    assert few.counts.sum() == len(every.spins)
    whole, part = (invariant_log_psi(jnp.asarray(c.spins)) for c in (every, few))
    for measure in (exact_energy, exact_variance):
        assert float(measure(few, part)) == pytest.approx(float(measure(every, whole)))
    chosen = jnp.array([2, 0, 1, 1])
    spins = jnp.asarray(few.spins)[chosen]
    expected = local_energies(system, invariant_log_psi, spins, part[chosen])
    found = listed_energies(few, part, chosen)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_an_h_without_the_symmetry_keeps_all_configurations():
    ring = make_ising(4, 0.7)
    uneven = dataclasses.replace(ring, diagonal=lambda s: ring.diagonal(s) + s[..., 0])
    every = enumerate_configurations(uneven)
    found = one_of_each_orbit(every, ring.sites.translations((4,)), flip=False)
    assert len(found.spins) == 16
