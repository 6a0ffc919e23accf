"""Collocation points that follow the residual, and Halton's sequence.

    p(x) ∝ |r(x)|^k / mean |r|^k + 1

Where the residual is large, points are drawn more often; everywhere else, they still
are. Knows no problem: residuals and candidates are arguments.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import qmc

__all__ = ["follow_residuals", "halton"]


def follow_residuals(
    key: jax.Array,
    candidates: jax.Array,
    residuals: jax.Array,
    count: int,
    power: float = 1.0,
) -> jax.Array:
    """Draws `count` different points of `candidates` with p ∝ |r|^k / mean |r|^k + 1.

    Args:
      key: for the draw.
      candidates: points that cover the region, `[N, d]`; ten times `count` or so.
      residuals: r at the candidates, `[N]`.
      count: number of points to draw, at most N.
      power: k, at least 0; with 0, all candidates are equally likely.

    Returns:
      Points `[count, d]`.

    Raises:
      ValueError: for more points than candidates.

    References:
      Wu, Zhu, Tan, Kartha and Lu, A comprehensive study of non-adaptive and
      residual-based adaptive sampling for physics-informed neural networks, 2023,
      equation 2 (RAD, with c = 1).
    """
    if count > len(candidates):
        raise ValueError(
            f"`count` must be at most the number of candidates, {len(candidates)}, got "
            f"{count}."
        )
    # Relative to the largest: small residuals must not underflow.
    size = jnp.abs(residuals) / jnp.maximum(
        jnp.max(jnp.abs(residuals)), jnp.finfo(residuals.dtype).tiny
    )
    raised = size**power
    mean = jnp.mean(raised)
    density = 1 + raised / jnp.where(mean > 0, mean, 1)
    chosen = jax.random.choice(
        key, len(candidates), (count,), replace=False, p=density / density.sum()
    )
    return candidates[chosen]


def halton(dimension: int, count: int) -> np.ndarray:
    """Points in (0, 1)^d, without the first point of the sequence, which is zero."""
    return qmc.Halton(dimension, scramble=False).random(count + 1)[1:]
