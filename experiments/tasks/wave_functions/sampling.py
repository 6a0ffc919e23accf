"""Samples of |ψ|²: exact if all configurations are known, otherwise by Metropolis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.tasks.wave_functions.hamiltonians import SpinSystem

__all__ = ["move_chains", "sample_exactly", "start_chains"]

LogPsi = Callable[[jax.Array], jax.Array]


def sample_exactly(
    key: jax.Array, counts: jax.Array, log_psi: jax.Array, num_samples: int
) -> jax.Array:
    """Independent samples of |ψ|², by inverting its distribution function.

    Args:
      key: for the draws.
      counts: how many configurations each of those listed stands for, `[D]`.
      log_psi: `[D]`.
      num_samples: N.

    Returns:
      Their numbers in the list, `[N]`.
    """
    weights = jnp.exp(2 * (jnp.real(log_psi) - jnp.max(jnp.real(log_psi)))) * counts
    heights = jnp.cumsum(weights)
    draws = jax.random.uniform(key, (num_samples,), heights.dtype) * heights[-1]
    # Because of rounding, a draw may lie beyond the last configuration.
    chosen = jnp.searchsorted(heights, draws, side="right")
    return jnp.minimum(chosen, len(heights) - 1)


def start_chains(system: SpinSystem, key: jax.Array, num_chains: int) -> jax.Array:
    """Random initial configurations, `[C, L]` of ±1."""
    shape = (num_chains, system.num_spins)
    if not system.conserves_magnetisation:
        return 2.0 * jax.random.bernoulli(key, shape=shape) - 1.0
    half = jnp.where(jnp.arange(system.num_spins) % 2, 1.0, -1.0)
    return jax.random.permutation(
        key, jnp.broadcast_to(half, shape), axis=1, independent=True
    )


def move_chains(
    system: SpinSystem,
    log_psi_fn: LogPsi,
    key: jax.Array,
    spins: jax.Array,
    num_moves: int,
) -> tuple[jax.Array, jax.Array]:
    """Takes `num_moves` Metropolis moves in each of the chains.

    A move flips one spin; or, if Σs is conserved, it exchanges two unequal neighbours,
    of which s has n(s) pairs. From s to s' it is proposed with probability 1 / n(s), so
    it is accepted with probability min(1, |ψ(s')/ψ(s)|² n(s) / n(s')).

    Args:
      system: determines the kind of moves.
      log_psi_fn: maps `[C, L]` to `[C]`.
      key: for proposals and decisions.
      spins: the current configurations, `[C, L]`.
      num_moves: moves per chain.

    Returns:
      The new configurations, and the share of moves that were accepted.
    """
    num_chains, num_spins = spins.shape
    rows = jnp.arange(num_chains)
    one, other = system.sites.bonds(1).T

    def unequal(spins: jax.Array) -> jax.Array:
        return spins[:, one] != spins[:, other]

    def flip(key: jax.Array, spins: jax.Array) -> tuple[jax.Array, Any]:
        site = jax.random.randint(key, (num_chains,), 0, num_spins)
        return spins.at[rows, site].multiply(-1), 0.0

    def exchange(key: jax.Array, spins: jax.Array) -> tuple[jax.Array, Any]:
        places = jnp.cumsum(unequal(spins), axis=1)  # of each pair among the unequal
        count = places[:, -1]
        chosen = jax.random.randint(key, (num_chains,), 0, count)
        bond = jnp.argmax(places > chosen[:, None], axis=1)
        # Unequal spins change places if both change sign.
        ends = jnp.stack([jnp.asarray(one)[bond], jnp.asarray(other)[bond]], axis=1)
        proposed = spins.at[rows[:, None], ends].multiply(-1)
        ratio = count / jnp.sum(unequal(proposed), axis=1)
        return proposed, jnp.log(ratio)

    propose = exchange if system.conserves_magnetisation else flip

    def move(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        spins, log_psi = carry
        proposal_key, decision_key = jax.random.split(key)
        proposed, correction = propose(proposal_key, spins)
        there = jnp.real(log_psi_fn(proposed))
        draws = jax.random.uniform(decision_key, (num_chains,), there.dtype)
        taken = jnp.log(draws) < 2 * (there - log_psi) + correction
        spins = jnp.where(taken[:, None], proposed, spins)
        return (spins, jnp.where(taken, there, log_psi)), jnp.mean(taken)

    start = (spins, jnp.real(log_psi_fn(spins)))
    keys = jax.random.split(key, num_moves)
    (spins, _), taken = jax.lax.scan(move, start, keys)
    return spins, jnp.mean(taken)
