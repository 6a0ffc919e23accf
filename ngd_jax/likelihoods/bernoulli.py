"""Independent Bernoulli distributions, with logits as outputs.

    p = σ(z),   H = diag(p (1 − p)).

Knows nothing of models or of the batch mean.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ngd_jax.likelihoods import numerics
from ngd_jax.likelihoods.independent import IndependentLikelihood
from ngd_jax.types import Array, KeyArray

__all__ = ["Bernoulli"]


@dataclasses.dataclass(frozen=True)
class Bernoulli(IndependentLikelihood):
    """D independent yes-or-no events per example, with probabilities σ(outputs).

    Args:
      event_ndims: How many trailing axes of the logits are one example: 1 for [..., D],
        3 for images, 0 where every logit is its own example.

    Raises:
      TypeError, ValueError: unless `event_ndims` is an integer, zero or above.

    Example:
      >>> import jax.numpy as jnp
      >>> from ngd_jax.likelihoods import Bernoulli
      >>> logits = jnp.array([[0.0, 0.0], [4.0, -4.0]])
      >>> Bernoulli().log_prob(logits, jnp.array([[1, 0], [1, 0]]))
      Array([-1.3862944 , -0.03629986], dtype=float32)
      >>> Bernoulli(event_ndims=0).batch_shape(logits)
      (2, 2)

    References:
      Schraudolph, "Fast curvature matrix-vector products for second-order gradient
      descent", 2002, section 3.
    """

    event_ndims: int = 1

    def log_prob(self, outputs: Array, targets: Array) -> Array:
        """Σ y log p + (1 − y) log(1 − p) over the event, in nats.

        Args:
          outputs: Logits.
          targets: 0 and 1, or probabilities between them; of the shape of the logits.

        Returns:
          An array of the batch shape.

        Raises:
          TypeError, ValueError: if logits or targets do not fit.
        """
        z, y = self._wide_with_targets(
            outputs, targets, what="zeros and ones, or probabilities,"
        )
        yes = numerics.masked_product(y, jax.nn.log_sigmoid(z))
        no = numerics.masked_product(1 - y, jax.nn.log_sigmoid(-z))
        return self._sum_event(yes + no)

    def kl(self, outputs_p: Array, outputs_q: Array) -> Array:
        """KL(p‖q) = Σ p log(p/q) + (1 − p) log((1 − p)/(1 − q)), in nats.

        Accurate relative to the KL itself, exactly 0.0 for equal logits; of the batch
        shape.

        Raises:
          TypeError, ValueError: if the logits do not fit, or differ in shape.
        """
        a, b = self._wide_pair(outputs_p, outputs_q)
        limit = jnp.finfo(a.dtype).max / 4
        a, b = jnp.clip(a, -limit, limit), jnp.clip(b, -limit, limit)
        # Where p > 1/2, swap yes and no, so that p is the smaller probability and
        # log(1 − p) − log(1 − q) = log(1 + p (eᵈ − 1)) loses no digits.
        sign = jnp.where(a > 0, -1, 1).astype(a.dtype)
        a, delta = sign * a, sign * (b - a)
        b = sign * b
        p = jax.nn.sigmoid(a)
        close = delta <= 1
        log_ratio_no = jnp.where(
            close,
            jnp.log1p(p * jnp.expm1(jnp.where(close, delta, 0))),
            jax.nn.softplus(b) - jax.nn.softplus(a),
        )
        yes = numerics.relative_entropy(p, jax.nn.sigmoid(b), log_ratio_no - delta)
        no = numerics.relative_entropy(
            jax.nn.sigmoid(-a), jax.nn.sigmoid(-b), log_ratio_no
        )
        return self._sum_event(yes + no)

    def _root(self, outputs: Array) -> Array:
        """√(p (1 − p)), the standard deviation of each event."""
        log_variance = jax.nn.log_sigmoid(outputs) + jax.nn.log_sigmoid(-outputs)
        return numerics.root_exp(log_variance)

    def sample(self, key: KeyArray, outputs: Array) -> Array:
        """Draws zeros and ones, of the shape and dtype of the logits."""
        self.batch_shape(outputs)
        p = jax.nn.sigmoid(numerics.wide_together(outputs)[0])
        return jax.random.bernoulli(key, p).astype(outputs.dtype)
