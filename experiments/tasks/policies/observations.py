"""Running mean and variance of observations, and networks that normalise by them.

    w = B / (n + B),   δ = m_B - m
    m <- m + w δ,      v <- (1 - w) v + w v_B + w (1 - w) δ²

merges the B observations of a rollout into the n before it. A network sees (o - m) /
√v, clipped at ±10. The statistics are an argument like the parameters, so that a
rollout and the update on it use the same ones.

References:
  Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing
  sample variances, 1979, equation 2.1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = [
    "Statistics",
    "deviation",
    "merge",
    "no_statistics",
    "normalized",
    "normalizing",
]

PyTree = Any

LIMIT = 10.0
# Lower bound of the variance: avoids division by zero for an entry that never changed.
FLOOR = 1e-8


class Statistics(NamedTuple):
    """Statistics of each entry of the observations so far.

    Attributes:
      number: float32, number of observations.
      mean: has the shape of an observation.
      variance: likewise; divided by their number, not by one less.
    """

    number: jax.Array
    mean: jax.Array
    variance: jax.Array


def no_statistics(shape: tuple[int, ...]) -> Statistics:
    """Statistics of no observations; they leave observations unchanged."""
    return Statistics(jnp.zeros(()), jnp.zeros(shape), jnp.ones(shape))


def merge(statistics: Statistics, observations: jax.Array) -> Statistics:
    """The statistics after including `observations`, `[T, E, ...]`."""
    new = observations.shape[0] * observations.shape[1]
    number = statistics.number + new
    weight = new / number
    shift = jnp.mean(observations, (0, 1)) - statistics.mean
    spread = jnp.var(observations, (0, 1)) - statistics.variance
    return Statistics(
        number=number,
        mean=statistics.mean + weight * shift,
        variance=statistics.variance
        + weight * (spread + (1.0 - weight) * jnp.square(shift)),
    )


def normalized(statistics: Statistics | None, observations: jax.Array) -> jax.Array:
    """What a network sees of `observations`; unchanged if there are no statistics."""
    if statistics is None:
        return observations
    standard = (observations - statistics.mean) / deviation(statistics)
    return jnp.clip(standard, -LIMIT, LIMIT)


def deviation(statistics: Statistics) -> jax.Array:
    """The divisor."""
    return jnp.sqrt(statistics.variance + FLOOR)


def normalizing(network_fn: Callable[[PyTree, PyTree], Any]) -> Callable[..., Any]:
    """Turns `f(params, batch)` into `f((params, statistics), batch)`."""

    def apply_fn(
        params_and_statistics: tuple[PyTree, Statistics | None], batch: PyTree
    ) -> Any:
        params, statistics = params_and_statistics
        observations = normalized(statistics, batch["observations"])
        return network_fn(params, {**batch, "observations": observations})

    return apply_fn
