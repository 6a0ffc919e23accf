"""Weights of residuals that respect causality: early times first.

w(x, t) = exp(-ε Σ_{slices before that of t} mean r²)
"""

import jax
import jax.numpy as jnp

__all__ = ["causal_weights"]


def causal_weights(
    times: jax.Array, residuals: jax.Array, causality: float, num_slices: int = 32
) -> jax.Array:
    """A weight in (0, 1] for each residual: small until all earlier ones are small.

    The weights are constants of a step: no gradient passes through them.

    Args:
      times: t of each residual, `[N]`.
      residuals: r, `[N]`.
      causality: ε, in units of 1 / r²; at 0, all weights are 1.
      num_slices: of the time from its first to its last value, all of one length.

    Returns:
      Weights `[N]`.

    References:
      Wang, Sankaran and Perdikaris, Respecting causality is all you need for training
      physics-informed neural networks, 2022, equation 3.8.
    """
    first, last = jnp.min(times), jnp.max(times)
    part = (times - first) / jnp.where(last > first, last - first, 1)
    slices = jnp.minimum((part * num_slices).astype(jnp.int32), num_slices - 1)
    counts = jnp.zeros(num_slices, residuals.dtype).at[slices].add(1)
    squares = jnp.zeros(num_slices, residuals.dtype).at[slices].add(residuals**2)
    means = squares / jnp.maximum(counts, 1)
    before = jnp.cumsum(means) - means
    # As a difference it may fall below zero by round-off.
    return jax.lax.stop_gradient(jnp.exp(-causality * jnp.maximum(before, 0))[slices])
