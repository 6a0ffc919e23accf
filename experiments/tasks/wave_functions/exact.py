"""Exact results for spins: ground state energies, and the energy of any ψ.

For up to about 16 spins, all configurations fit into memory.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from experiments.tasks.wave_functions.hamiltonians import SpinSystem

__all__ = [
    "MAX_SPINS",
    "Configurations",
    "enumerate_configurations",
    "exact_energy",
    "exact_variance",
    "exact_weights",
    "ground_energy",
    "ising_energy",
    "listed_energies",
    "one_of_each_orbit",
]

MAX_SPINS = 16


@dataclasses.dataclass(frozen=True)
class Configurations:
    """All configurations of a system, and H in that basis.

    Attributes:
      spins: ±1, `[D, L]`.
      diagonal: `[D]`.
      neighbours: indices of the connected configurations, int32, `[D, M]`.
      elements: of H, `[D, M]`.
      counts: how many configurations each stands for, `[D]`; see `one_of_each_orbit`.
    """

    spins: np.ndarray
    diagonal: np.ndarray
    neighbours: np.ndarray
    elements: np.ndarray
    counts: np.ndarray


def enumerate_configurations(system: SpinSystem) -> Configurations:
    """All 2ᴸ configurations, or those with Σs = 0 if H conserves it.

    Raises:
      ValueError: there are too many.
    """
    if system.num_spins > MAX_SPINS:
        raise ValueError(
            f"All configurations are listed for at most {MAX_SPINS} spins, got "
            f"{system.num_spins}."
        )
    both = itertools.product((1.0, -1.0), repeat=system.num_spins)
    spins = np.array(list(both))
    if system.conserves_magnetisation:
        spins = spins[spins.sum(axis=1) == 0]
    place = np.full(2**system.num_spins, -1, np.int32)
    place[_code(spins)] = np.arange(len(spins), dtype=np.int32)
    others, elements = (np.asarray(leaf) for leaf in system.connected(jnp.array(spins)))
    return Configurations(
        spins=spins,
        diagonal=np.asarray(system.diagonal(jnp.asarray(spins))),
        neighbours=place[_code(others)],
        elements=elements,
        counts=np.ones(len(spins)),
    )


def one_of_each_orbit(
    all_of_them: Configurations, images: np.ndarray, *, flip: bool
) -> Configurations:
    """One configuration of each orbit of a group that ψ is invariant to.

    If H is not invariant too, `all_of_them` as it is.

    Args:
      all_of_them: every configuration.
      images: the permutations of the group, `[G, L]`.
      flip: whether it has s → -s as well.
    """
    spins = all_of_them.spins
    codes = np.stack([_code(spins[:, image]) for image in images])
    if flip:
        codes = np.concatenate([codes, 2 ** spins.shape[1] - 1 - codes])
    _, first, orbits, counts = np.unique(
        codes.min(axis=0), return_index=True, return_inverse=True, return_counts=True
    )
    # H is invariant if it maps an arbitrary invariant vector to an invariant one.
    vector = np.random.default_rng(0).normal(size=len(first))[orbits]
    applied = all_of_them.diagonal * vector
    applied += (all_of_them.elements * vector[all_of_them.neighbours]).sum(axis=1)
    if not np.allclose(applied, applied[first][orbits], rtol=1e-9, atol=1e-9):
        return all_of_them
    return Configurations(
        spins=spins[first],
        diagonal=all_of_them.diagonal[first],
        neighbours=orbits[all_of_them.neighbours[first]].astype(np.int32),
        elements=all_of_them.elements[first],
        counts=counts.astype(float),
    )


def listed_energies(
    all_of_them: Configurations, log_psi: jax.Array, chosen: jax.Array | slice
) -> jax.Array:
    """Local energies of the `chosen` configurations, from log ψ of all of them."""
    there = log_psi[jnp.asarray(all_of_them.neighbours)[chosen]]
    ratios = jnp.exp(there - log_psi[chosen][:, None])
    elements = jnp.asarray(all_of_them.elements)[chosen]
    return jnp.asarray(all_of_them.diagonal)[chosen] + (elements * ratios).sum(axis=1)


def exact_weights(counts: jax.Array, log_psi: jax.Array) -> jax.Array:
    """|ψ|² times the counts, with a mean of 1: of every configuration, `[D]`."""
    log_weights = 2 * jnp.real(log_psi) + jnp.log(counts)
    return len(counts) * jax.nn.softmax(log_weights)


def exact_energy(all_of_them: Configurations, log_psi: jax.Array) -> jax.Array:
    """⟨ψ|H|ψ⟩ / ⟨ψ|ψ⟩ without sampling, from log ψ of all configurations."""
    psi, applied = _applied(all_of_them, log_psi)
    return jnp.real(jnp.vdot(psi, all_of_them.counts * applied))


def exact_variance(all_of_them: Configurations, log_psi: jax.Array) -> jax.Array:
    """‖(H - E) ψ‖² / ‖ψ‖², likewise."""
    psi, applied = _applied(all_of_them, log_psi)
    residual = applied - exact_energy(all_of_them, log_psi) * psi
    return jnp.real(jnp.vdot(residual, all_of_them.counts * residual))


def _applied(
    all_of_them: Configurations, log_psi: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """ψ of norm 1, and Hψ."""
    psi = jnp.exp(log_psi - jnp.max(jnp.real(log_psi)))
    psi /= jnp.sqrt(jnp.sum(all_of_them.counts * jnp.abs(psi) ** 2))
    applied = jnp.asarray(all_of_them.diagonal) * psi
    applied += jnp.sum(all_of_them.elements * psi[all_of_them.neighbours], axis=1)
    return psi, applied


def ground_energy(all_of_them: Configurations) -> float:
    """The lowest eigenvalue of H, by the Lanczos method on the sparse matrix."""
    size, per_row = all_of_them.neighbours.shape
    rows = np.repeat(np.arange(size), per_row)
    columns = all_of_them.neighbours.ravel()
    matrix = scipy.sparse.coo_array(
        (all_of_them.elements.ravel(), (rows, columns)), shape=(size, size)
    ).tocsr()
    matrix += scipy.sparse.diags_array(all_of_them.diagonal)
    start = np.random.default_rng(0).uniform(size=size)  # otherwise drawn at random
    values = scipy.sparse.linalg.eigsh(matrix, k=1, which="SA", v0=start)[0]
    return float(values[0])


def ising_energy(num_spins: int, field: float) -> float:
    """The ground state energy of the Ising ring, for an even number of spins.

    E₀ = -Σ_k √(1 + h² - 2h cos k) over k = (2n + 1)π/L, since the ring is a system of
    free fermions whose ground state has an even number of them.

    References:
      Pfeuty, The one-dimensional Ising model with a transverse field, 1970.
    """
    if num_spins % 2:
        raise ValueError(f"`num_spins` must be even, got {num_spins}.")
    k = (2 * np.arange(num_spins) + 1) * math.pi / num_spins
    return -float(np.sum(np.sqrt(1 + field**2 - 2 * field * np.cos(k))))


def _code(spins: np.ndarray) -> np.ndarray:
    """A unique number for each configuration, int64 `[...]`."""
    return (spins < 0).astype(np.int64) @ (1 << np.arange(spins.shape[-1]))
