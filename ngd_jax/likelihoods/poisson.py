"""Independent Poisson distributions, with log rates as outputs.

    λ = eᶻ,   H = diag(λ).

Knows nothing of models or of the batch mean.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln

from ngd_jax.likelihoods import numerics
from ngd_jax.likelihoods.independent import IndependentLikelihood
from ngd_jax.tree import replicate, widen
from ngd_jax.types import Array, KeyArray

__all__ = ["Poisson"]


@dataclasses.dataclass(frozen=True)
class Poisson(IndependentLikelihood):
    """D independent counts per example, with rates exp(outputs).

    Rates are capped just below the largest finite number, so that no outputs, however
    large, give NaN.

    Args:
      event_ndims: How many trailing axes of the log rates are one example.

    Raises:
      TypeError, ValueError: unless `event_ndims` is an integer, zero or above.

    Example:
      >>> import jax.numpy as jnp
      >>> from ngd_jax.likelihoods import Poisson
      >>> log_rates = jnp.log(jnp.array([[1.0, 4.0]]))
      >>> Poisson().fisher_vp(log_rates, jnp.ones((1, 2)))
      Array([[1., 4.]], dtype=float32)
      >>> Poisson().log_prob(log_rates, jnp.array([[0, 0]])).round(3)
      Array([-5.], dtype=float32)

    References:
      McCullagh and Nelder, "Generalized linear models", 1989, chapter 6 (log link).
    """

    event_ndims: int = 1

    def log_prob(self, outputs: Array, targets: Array) -> Array:
        """Σ y z − eᶻ − log y! over the event, in nats.

        Args:
          outputs: Log rates z.
          targets: Counts y ≥ 0, of any real dtype and the shape of the log rates.

        Returns:
          An array of the batch shape.

        Raises:
          TypeError, ValueError: if log rates or targets do not fit.
        """
        z, y = self._wide_with_targets(outputs, targets, what="counts")
        return self._sum_event(
            numerics.masked_product(y, z) - _rate(z) - gammaln(y + 1)
        )

    def kl(self, outputs_p: Array, outputs_q: Array) -> Array:
        """KL(p‖q) = Σ λ_q − λ_p + λ_p log(λ_p/λ_q), in nats, of the batch shape.

        Accurate relative to the KL itself, exactly 0.0 for equal log rates.

        Raises:
          TypeError, ValueError: if the log rates do not fit, or differ in shape.
        """
        a, b = self._wide_pair(outputs_p, outputs_q)
        terms = numerics.relative_entropy(
            _rate(a), _rate(b), -numerics.difference(a, b)
        )
        return self._sum_event(terms)

    def _root(self, outputs: Array) -> Array:
        """√λ, the standard deviation of each count."""
        return numerics.root_exp(outputs)

    def sample(self, key: KeyArray, outputs: Array) -> Array:
        """Draws counts, of the shape and dtype of the log rates.

        Counts are at most 2³¹ − 1, the largest int32. `key` must be of JAX's default
        (threefry) kind, the only one that `jax.random.poisson` supports.
        """
        self.batch_shape(outputs)
        # `jax.random.poisson` fails for rates on the explicit axes of a mesh.
        counts = jax.random.poisson(key, _rate(replicate(widen(outputs))))
        return counts.astype(outputs.dtype)


def _rate(log_rates: Array) -> Array:
    return jnp.exp(jnp.minimum(log_rates, numerics.largest_exponent(log_rates.dtype)))
