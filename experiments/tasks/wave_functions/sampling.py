"""Samples of |ψ|²: exact if all configurations are known, otherwise by Metropolis."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.tasks.wave_functions.chains import SpinChain

__all__ = ["move_chains", "sample_exactly", "start_chains"]

LogPsi = Callable[[jax.Array], jax.Array]


def sample_exactly(
    key: jax.Array, spins: jax.Array, log_psi: jax.Array, num_samples: int
) -> jax.Array:
    """Independent samples of |ψ|², by inverting its distribution function.

    Args:
      key: for the draws.
      spins: all configurations, `[D, L]`.
      log_psi: `[D]`.
      num_samples: N.

    Returns:
      `[N, L]`.
    """
    weights = jnp.exp(2 * (jnp.real(log_psi) - jnp.max(jnp.real(log_psi))))
    heights = jnp.cumsum(weights)
    draws = jax.random.uniform(key, (num_samples,), heights.dtype) * heights[-1]
    # Because of rounding, a draw may lie beyond the last configuration.
    chosen = jnp.searchsorted(heights, draws, side="right")
    return spins[jnp.minimum(chosen, len(spins) - 1)]


def start_chains(chain: SpinChain, key: jax.Array, num_chains: int) -> jax.Array:
    """Random initial configurations, `[C, L]` of ±1."""
    shape = (num_chains, chain.num_spins)
    if not chain.conserves_magnetisation:
        return 2.0 * jax.random.bernoulli(key, shape=shape) - 1.0
    half = jnp.where(jnp.arange(chain.num_spins) % 2, 1.0, -1.0)
    return jax.random.permutation(
        key, jnp.broadcast_to(half, shape), axis=1, independent=True
    )


def move_chains(
    chain: SpinChain,
    log_psi_fn: LogPsi,
    key: jax.Array,
    spins: jax.Array,
    num_moves: int,
) -> tuple[jax.Array, jax.Array]:
    """Takes `num_moves` Metropolis moves in each of the chains.

    A move flips one spin, or exchanges two if Σs is conserved. It is proposed with the
    same probability as its reverse, so it is accepted with probability
    min(1, |ψ(s')/ψ(s)|²).

    Args:
      chain: determines the kind of moves.
      log_psi_fn: maps `[C, L]` to `[C]`.
      key: for proposals and decisions.
      spins: the current configurations, `[C, L]`.
      num_moves: moves per chain.

    Returns:
      The new configurations, and the share of moves that were accepted.
    """
    num_chains, num_spins = spins.shape
    rows = jnp.arange(num_chains)

    def propose(key: jax.Array, spins: jax.Array) -> jax.Array:
        if not chain.conserves_magnetisation:
            site = jax.random.randint(key, (num_chains,), 0, num_spins)
            return spins.at[rows, site].multiply(-1)
        one, other = jax.random.randint(key, (2, num_chains), 0, num_spins)
        exchanged = spins.at[rows, one].set(spins[rows, other])
        return exchanged.at[rows, other].set(spins[rows, one])

    def move(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        spins, log_psi = carry
        proposal_key, decision_key = jax.random.split(key)
        proposed = propose(proposal_key, spins)
        there = jnp.real(log_psi_fn(proposed))
        draws = jax.random.uniform(decision_key, (num_chains,), there.dtype)
        taken = jnp.log(draws) < 2 * (there - log_psi)
        spins = jnp.where(taken[:, None], proposed, spins)
        return (spins, jnp.where(taken, there, log_psi)), jnp.mean(taken)

    start = (spins, jnp.real(log_psi_fn(spins)))
    keys = jax.random.split(key, num_moves)
    (spins, _), taken = jax.lax.scan(move, start, keys)
    return spins, jnp.mean(taken)
