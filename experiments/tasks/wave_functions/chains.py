"""Hamiltonians of rings of spins, in the form that local energies need.

    (Hψ)(s) = D(s) ψ(s) + Σ_m H(s, s_m) ψ(s_m)

Spins are ±1, `[..., L]`; s_m are the configurations that H connects to s.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.running.build import locate
from experiments.running.settings import ConfigError

__all__ = [
    "CHAINS",
    "SpinChain",
    "local_energies",
    "make_chain",
    "make_heisenberg",
    "make_ising",
]


@dataclasses.dataclass(frozen=True)
class SpinChain:
    """A Hamiltonian H of L spins on a ring.

    Attributes:
      name: as in the configuration.
      num_spins: L.
      diagonal: D: `[..., L]` to `[...]`.
      connected: maps `[..., L]` to configurations `[..., M, L]` and the elements of H
        `[..., M]` that lead there; an element may be zero.
      conserves_magnetisation: whether H conserves Σs, so that samples have Σs = 0.
    """

    name: str
    num_spins: int
    diagonal: Callable[[jax.Array], jax.Array]
    connected: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    conserves_magnetisation: bool


def make_ising(num_spins: int, field: float = 1.0) -> SpinChain:
    """The transverse-field Ising ring: H = -Σ σᶻᵢ σᶻᵢ₊₁ - h Σ σˣᵢ.

    All amplitudes of its ground state are positive.
    """

    def diagonal(spins: jax.Array) -> jax.Array:
        return -_bonds(spins).sum(-1)

    def connected(spins: jax.Array) -> tuple[jax.Array, jax.Array]:
        flips = 1 - 2 * jnp.eye(num_spins, dtype=spins.dtype)
        return spins[..., None, :] * flips, jnp.full(spins.shape, -field, spins.dtype)

    return SpinChain("ising", num_spins, diagonal, connected, False)


def make_heisenberg(num_spins: int, field: float = 0.0) -> SpinChain:
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

    def diagonal(spins: jax.Array) -> jax.Array:
        return _bonds(spins).sum(-1)

    def connected(spins: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Exchanging two equal neighbours changes nothing.
        site = jnp.arange(num_spins)
        order = jnp.broadcast_to(site, (num_spins, num_spins))
        order = order.at[site, site].set((site + 1) % num_spins)
        order = order.at[site, (site + 1) % num_spins].set(site)
        return spins[..., order], _bonds(spins) - 1

    return SpinChain("heisenberg", num_spins, diagonal, connected, True)


CHAINS: dict[str, Callable[..., SpinChain]] = {
    "ising": make_ising,
    "heisenberg": make_heisenberg,
}


def make_chain(hamiltonian: str, num_spins: int, field: float | None) -> SpinChain:
    """Builds the Hamiltonian of that name, or a user's "module:function".

    Raises:
      ConfigError: it refuses the spins or the field, or is not a `SpinChain`.
    """
    make = CHAINS.get(hamiltonian) or locate(hamiltonian, "task.hamiltonian")
    arguments = {} if field is None else {"field": field}
    try:
        chain = make(num_spins, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`task.hamiltonian={hamiltonian}`: {error}") from error
    if not isinstance(chain, SpinChain):
        raise ConfigError(
            f"`task.hamiltonian` must name a function that makes a SpinChain, but "
            f"{hamiltonian} made {type(chain).__name__}."
        )
    return chain


def local_energies(
    chain: SpinChain,
    log_psi_fn: Callable[[jax.Array], jax.Array],
    spins: jax.Array,
    log_psi: jax.Array,
) -> jax.Array:
    """E(s) = (Hψ)(s) / ψ(s) = D(s) + Σ_m H(s, s_m) exp(log ψ(s_m) - log ψ(s)).

    Args:
      chain: H.
      log_psi_fn: `[N, L]` to log ψ `[N]`, real or complex.
      spins: `[N, L]`.
      log_psi: log ψ there, `[N]`.

    Returns:
      `[N]`, of the dtype of log ψ.
    """
    others, elements = chain.connected(spins)
    there = log_psi_fn(others.reshape(-1, chain.num_spins)).reshape(elements.shape)
    ratios = jnp.exp(there - log_psi[:, None])
    return chain.diagonal(spins) + jnp.sum(elements * ratios, axis=-1)


def _bonds(spins: jax.Array) -> jax.Array:
    """sᵢ sᵢ₊₁ around the ring, `[..., L]`."""
    return spins * jnp.roll(spins, -1, axis=-1)
