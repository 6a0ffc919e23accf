"""Generalised advantage estimation.

    δ_t = r_t + γ (1 - terminated_t) V(s'_t) - V(s_t)
    A_t = δ_t + γ λ (1 - ended_t) A_{t+1},      ended = terminated or truncated

s' is the state that the action led to. Where an episode was truncated, the value of s'
still counts, since the episode would have continued; advantages never propagate across
the end of an episode, whichever way it ended.
"""

import jax
import jax.numpy as jnp

__all__ = ["generalized_advantages", "normalize"]


def generalized_advantages(
    rewards: jax.Array,
    values: jax.Array,
    next_values: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    *,
    discount: float,
    trace_decay: float,
) -> jax.Array:
    """The advantages A, `[T, E]` as all arrays.

    Args:
      rewards: r.
      values: V(s), of the states that the policy saw.
      next_values: V(s'), of the states that the actions led to, also at the end of an
        episode.
      terminated: whether the episode reached a terminal state.
      truncated: whether the time limit cut the episode off.
      discount: γ.
      trace_decay: λ; 0 bootstraps from V after one step, 1 only at the end of the data.

    References:
      Schulman et al., High-dimensional continuous control using generalized advantage
      estimation, 2016, equation 16; Pardo et al., Time limits in reinforcement
      learning, 2018, section 3.
    """
    errors = rewards + discount * jnp.where(terminated, 0.0, next_values) - values
    decay = jnp.where(terminated | truncated, 0.0, discount * trace_decay)

    def step(later: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple:
        error, decay = now
        advantage = error + decay * later
        return advantage, advantage

    _, advantages = jax.lax.scan(
        step, jnp.zeros_like(errors[0]), (errors, decay), reverse=True
    )
    return advantages


def normalize(advantages: jax.Array) -> jax.Array:
    """Scales to mean 0 and variance 1; zeros if all are equal up to round-off."""
    mean = jnp.mean(advantages)
    scale = jnp.std(advantages)
    # The variance that round-off alone would leave if all were equal.
    floor = 1e-5 * jnp.max(jnp.abs(advantages))
    usable = scale > floor
    return jnp.where(usable, (advantages - mean) / jnp.where(usable, scale, 1.0), 0.0)
