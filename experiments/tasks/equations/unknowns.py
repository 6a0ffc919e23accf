"""Unknown coefficients of an equation, found from noisy values of its solution.

params = {"network": ..., "coefficients": k},    blocks: interior, ..., "data"
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["Unknowns", "observe"]


@dataclasses.dataclass(frozen=True)
class Unknowns:
    """Coefficients to be found, and the values of u that tell them.

    Attributes:
      truth: the coefficients with which the values are made.
      guess: where the search begins.
      num_values: number of observed values, at points that the problem draws.
      noise: standard deviation of their errors, which are Gaussian.
    """

    truth: tuple[float, ...]
    guess: tuple[float, ...]
    num_values: int
    noise: float

    def relative_error(self, coefficients: jax.Array) -> jax.Array:
        """The largest relative error of a coefficient."""
        truth = jnp.asarray(self.truth, coefficients.dtype)
        return jnp.max(jnp.abs(coefficients / truth - 1))


def observe(
    key: jax.Array,
    points: jax.Array,
    solution: Callable[[jax.Array], jax.Array],
    noise: float,
) -> dict[str, jax.Array]:
    """The block "data": u at `points` `[N, d]` with Gaussian errors, from a key."""
    exact = solution(points)
    errors = noise * jax.random.normal(key, exact.shape, exact.dtype)
    return {"data": points, "data_values": exact + errors}
