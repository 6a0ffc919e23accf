"""Hamiltonians of spins on lattices, in the form that local energies need.

    (Hψ)(s) = D(s) ψ(s) + Σ_m H(s, s_m) ψ(s_m)

Spins are ±1, `[..., L]`; s_m are the configurations that H connects to s.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.running.build import locate
from experiments.running.settings import ConfigError
from experiments.tasks.wave_functions.lattices import Lattice

__all__ = [
    "HAMILTONIANS",
    "SpinSystem",
    "local_energies",
    "make_heisenberg",
    "make_ising",
    "make_system",
]

LogPsi = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class SpinSystem:
    """A Hamiltonian H of L spins.

    Attributes:
      name: as in the configuration.
      num_spins: L.
      diagonal: D: `[..., L]` to `[...]`.
      connected: maps `[..., L]` to configurations `[..., M, L]` and the elements of H
        `[..., M]` that lead there; an element may be zero.
      conserves_magnetisation: whether H conserves Σs, so that samples have Σs = 0.
      lattice: where the spins are; None for a ring. Networks take their symmetries from
        it, and exchange moves its bonds.
    """

    name: str
    num_spins: int
    diagonal: Callable[[jax.Array], jax.Array]
    connected: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    conserves_magnetisation: bool
    lattice: Lattice | None = None

    @property
    def sites(self) -> Lattice:
        """The lattice, the ring if none was given."""
        return self.lattice or Lattice((self.num_spins,))


def make_ising(num_spins: int, field: float = 1.0) -> SpinSystem:
    """The transverse-field Ising ring: H = -Σ σᶻᵢ σᶻᵢ₊₁ - h Σ σˣᵢ.

    All amplitudes of its ground state are positive.
    """
    return _ising("ising", Lattice((num_spins,)), field)


def make_heisenberg(num_spins: int, field: float = 0.0) -> SpinSystem:
    """The antiferromagnetic Heisenberg ring: H = Σ σᵢ·σᵢ₊₁ + h Σ σᶻᵢ, at Σs = 0.

    Every second spin is rotated by π around z, which preserves the spectrum and makes
    all amplitudes of the ground state positive (Marshall's rule); so L must be even. At
    Σs = 0 the field has no effect, and must be 0.

    Raises:
      ValueError: L is odd, or the field is not 0.
    """
    if num_spins % 2 or field:
        raise ValueError(
            f"The Heisenberg ring takes an even number of spins and field=0, got "
            f"{num_spins} spins and field={field}."
        )
    return _exchange("heisenberg", Lattice((num_spins,)), (1.0,))


def make_square_ising(num_spins: int, field: float = 3.0) -> SpinSystem:
    """The transverse-field Ising model of a periodic square: H = -Σ σᶻᵢ σᶻⱼ - h Σ σˣᵢ.

    The sum is over neighbours. An infinite square is critical near h = 3.044.

    Raises:
      ValueError: `num_spins` is no square.
    """
    return _ising("square_ising", _square(num_spins), field)


def make_square_heisenberg(
    num_spins: int, field: float = 0.0, coupling: float = 0.0
) -> SpinSystem:
    """The J1-J2 model of a periodic square: H = Σ₁ σᵢ·σⱼ + J2 Σ₂ σᵢ·σⱼ, at Σs = 0.

    Σ₁ is over neighbours, Σ₂ over diagonals. One sublattice is rotated by π around z.
    All amplitudes of the ground state are then positive at J2 = 0, and most of their
    weight remains so up to J2 of about 0.5.

    Raises:
      ValueError: `num_spins` is no square of an even number, or the field is not 0.
    """
    lattice = _square(num_spins)
    if num_spins % 2 or field:
        raise ValueError(
            f"The Heisenberg square takes an even number of spins and field=0, got "
            f"{num_spins} spins and field={field}."
        )
    return _exchange("square_heisenberg", lattice, (1.0, coupling))


HAMILTONIANS: dict[str, Callable[..., SpinSystem]] = {
    "ising": make_ising,
    "heisenberg": make_heisenberg,
    "square_ising": make_square_ising,
    "square_heisenberg": make_square_heisenberg,
}


def _square(num_spins: int) -> Lattice:
    side = math.isqrt(num_spins)
    if side**2 != num_spins:
        raise ValueError(f"A square lattice takes a square number, got {num_spins}.")
    return Lattice((side, side))


def _ising(name: str, lattice: Lattice, field: float) -> SpinSystem:
    one, other = lattice.bonds(1).T

    def diagonal(spins: jax.Array) -> jax.Array:
        return -(spins[..., one] * spins[..., other]).sum(-1)

    def connected(spins: jax.Array) -> tuple[jax.Array, jax.Array]:
        flips = 1 - 2 * jnp.eye(lattice.num_sites, dtype=spins.dtype)
        return spins[..., None, :] * flips, jnp.full(spins.shape, -field, spins.dtype)

    return SpinSystem(name, lattice.num_sites, diagonal, connected, False, lattice)


def _exchange(name: str, lattice: Lattice, couplings: tuple[float, ...]) -> SpinSystem:
    """Σ_k J_k Σ σᵢ·σⱼ over k-th neighbours, one sublattice rotated."""
    kept = [(order, j) for order, j in enumerate(couplings, start=1) if j]
    bonds = np.concatenate([lattice.bonds(order) for order, _ in kept])
    counts = [len(lattice.bonds(order)) for order, _ in kept]
    strength = np.repeat([j for _, j in kept], counts)
    one, other = bonds.T
    # σᵢ·σⱼ = sᵢsⱼ, and 1 - sᵢsⱼ towards the state with i and j exchanged; the rotation
    # gives the latter the sign of the pair.
    signs = strength * lattice.sublattice[one] * lattice.sublattice[other]
    order = np.tile(np.arange(lattice.num_sites), (len(bonds), 1))
    row = np.arange(len(bonds))
    order[row, one], order[row, other] = other, one

    def diagonal(spins: jax.Array) -> jax.Array:
        products = spins[..., one] * spins[..., other]
        return (products * strength.astype(spins.dtype)).sum(-1)

    def connected(spins: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Exchanging two equal spins changes nothing.
        products = spins[..., one] * spins[..., other]
        elements = jnp.asarray(signs, spins.dtype) * (1 - products)
        return spins[..., order], elements

    return SpinSystem(name, lattice.num_sites, diagonal, connected, True, lattice)


def make_system(
    hamiltonian: str,
    num_spins: int,
    field: float | None = None,
    coupling: float | None = None,
) -> SpinSystem:
    """Builds the Hamiltonian of that name, or a user's "module:function".

    It is called with `num_spins`, and with `field` and `coupling` if they are not None.

    Raises:
      ConfigError: it refuses these arguments, or its result is not a `SpinSystem`.
    """
    make = HAMILTONIANS.get(hamiltonian) or locate(hamiltonian, "task.hamiltonian")
    arguments = {"field": field, "coupling": coupling}
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        system = make(num_spins, **given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`task.hamiltonian={hamiltonian}`: {error}") from error
    if not isinstance(system, SpinSystem):
        raise ConfigError(
            f"`task.hamiltonian` must name a function that makes a SpinSystem, but "
            f"{hamiltonian} made {type(system).__name__}."
        )
    return system


def local_energies(
    system: SpinSystem,
    log_psi_fn: LogPsi,
    spins: jax.Array,
    log_psi: jax.Array,
    batch_size: int | None = None,
) -> jax.Array:
    """E(s) = (Hψ)(s) / ψ(s) = D(s) + Σ_m H(s, s_m) exp(log ψ(s_m) - log ψ(s)).

    Args:
      system: H.
      log_psi_fn: `[N, L]` to log ψ `[N]`, real or complex.
      spins: `[N, L]`.
      log_psi: log ψ there, `[N]`.
      batch_size: number of s_m for one call of `log_psi_fn`; None for all at once. If
        they take more than one call, those with H(s, s_m) = 0 are skipped.

    Returns:
      `[N]`, of the dtype of log ψ.
    """
    others, elements = system.connected(spins)
    others = others.reshape(-1, system.num_spins)
    if batch_size is None or len(others) <= batch_size:
        there = log_psi_fn(others)
    else:
        matters = elements.ravel() != 0
        there = _where(log_psi_fn, others, matters, batch_size, log_psi.dtype)
    ratios = jnp.exp(there.reshape(elements.shape) - log_psi[:, None])
    return system.diagonal(spins) + jnp.sum(elements * ratios, axis=-1)


def _where(
    log_psi_fn: LogPsi,
    spins: jax.Array,
    matters: jax.Array,
    batch_size: int,
    dtype: Any,
) -> jax.Array:
    """Log ψ of the rows that matter, and 0 for the others, `[N]`."""
    count = len(spins)
    # Those that matter first: whole batches at the end are then empty.
    order = jnp.argsort(~matters)
    rows = jnp.pad(order, (0, -count % batch_size), constant_values=count)

    def evaluate(rows: jax.Array) -> jax.Array:
        return log_psi_fn(spins[jnp.minimum(rows, count - 1)]).astype(dtype)

    def one_batch(start: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        nothing = functools.partial(jnp.zeros_like, dtype=dtype)
        values = jax.lax.cond(start < jnp.sum(matters), evaluate, nothing, rows)
        return start + batch_size, values

    _, values = jax.lax.scan(one_batch, jnp.int32(0), rows.reshape(-1, batch_size))
    # The rows of padding are out of bounds, and dropped.
    found = jnp.zeros(count, dtype).at[rows].set(values.ravel(), mode="drop")
    return jnp.where(matters, found, 0)
