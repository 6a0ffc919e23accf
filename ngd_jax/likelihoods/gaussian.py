"""Independent Gaussian distributions, of fixed or of learned width.

    N(μ, s²):     H = 1/s²                      for the mean alone,
    N(μ, e²ˡ):    H = diag(e⁻²ˡ, 2)             for mean and log scale l.

Knows nothing of models or of the batch mean.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ngd_jax.likelihoods import numerics
from ngd_jax.likelihoods.checks import check_dict, check_number, check_targets, message
from ngd_jax.likelihoods.independent import IndependentLikelihood
from ngd_jax.types import Array, KeyArray, Outputs

__all__ = ["DiagonalGaussian", "Gaussian"]

_HALF_LOG_TWO_PI = math.log(2 * math.pi) / 2


@dataclasses.dataclass(frozen=True)
class Gaussian(IndependentLikelihood):
    """D independent real targets per example, N(outputs, scale²).

    Squared error is its negative log-likelihood: −log p = ½ Σ ((y − μ)/scale)² + const,
    so that natural gradient is Gauss-Newton.

    Args:
      scale: The standard deviation, one positive number.
      event_ndims: How many trailing axes of the means are one example; 0 for scalar
        regression with outputs of shape [N].

    Raises:
      TypeError, ValueError: unless `scale` is a positive finite Python number and
        `event_ndims` an integer, zero or above.

    Example:
      >>> import jax.numpy as jnp
      >>> from ngd_jax.likelihoods import Gaussian
      >>> Gaussian(scale=0.5).kl(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 0.0]]))
      Array([2.], dtype=float32)
      >>> Gaussian(scale=0.5).fisher_vp(jnp.zeros((1, 2)), jnp.ones((1, 2)))
      Array([[4., 4.]], dtype=float32)

    References:
      Martens, "New insights and perspectives on the natural gradient method", 2020,
      section 9 (Gauss-Newton as natural gradient).
    """

    scale: float = 1.0
    event_ndims: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_number("scale", self.scale, is_positive=True)

    def log_prob(self, outputs: Array, targets: Array) -> Array:
        """−Σ ½ ((y − μ)/s)² + log s + ½ log 2π over the event, in nats.

        Args:
          outputs: Means μ.
          targets: y, of the shape of the means.

        Returns:
          An array of the batch shape.

        Raises:
          TypeError, ValueError: if means or targets do not fit.
        """
        mean, y = self._wide_with_targets(outputs, targets, what="real numbers")
        z = (y - mean) / self.scale
        return -self._sum_event(z * z / 2 + math.log(self.scale) + _HALF_LOG_TWO_PI)

    def kl(self, outputs_p: Array, outputs_q: Array) -> Array:
        """KL(p‖q) = Σ ½ ((μ_q − μ_p)/s)², in nats, of the batch shape.

        Raises:
          TypeError, ValueError: if the means do not fit, or differ in shape.
        """
        mean_p, mean_q = self._wide_pair(outputs_p, outputs_q)
        z = (mean_q - mean_p) / self.scale
        return self._sum_event(z * z / 2)

    def _root(self, outputs: Array) -> Array:
        """1/s everywhere."""
        return jnp.full_like(outputs, 1 / self.scale)

    def sample(self, key: KeyArray, outputs: Array) -> Array:
        """Draws targets, of the shape and dtype of the means."""
        self.batch_shape(outputs)
        (mean,) = numerics.wide_together(outputs)
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return (mean + self.scale * noise).astype(outputs.dtype)


@dataclasses.dataclass(frozen=True)
class DiagonalGaussian(IndependentLikelihood):
    """D independent real targets per example, with mean and width both learned.

    The outputs are a dict, `{"mean": μ, "log_scale": l}`, both of the same shape, for
    N(μ, e²ˡ): heteroscedastic regression, policies with continuous actions. For a width
    that all examples share, let `model_fn` broadcast it to the shape of the mean.

    Args:
      event_ndims: How many trailing axes are one example.

    Raises:
      TypeError, ValueError: unless `event_ndims` is an integer, zero or above.

    Example:
      >>> import jax.numpy as jnp
      >>> from ngd_jax.likelihoods import DiagonalGaussian
      >>> outputs = {"mean": jnp.zeros((1, 2)), "log_scale": jnp.zeros((1, 2))}
      >>> DiagonalGaussian().log_prob(outputs, jnp.zeros((1, 2)))
      Array([-1.837877], dtype=float32)
      >>> DiagonalGaussian().fisher_vp(outputs, outputs)["log_scale"]
      Array([[0., 0.]], dtype=float32)

    References:
      Amari, "Natural gradient works efficiently in learning", 1998, section 3 (the
      Fisher information of the normal distribution).
    """

    event_ndims: int = 1

    def batch_shape(self, outputs: Outputs) -> tuple[int, ...]:
        """All axes of the means but the last `event_ndims`.

        Raises:
          TypeError: unless the outputs are a dict of real floating point arrays.
          ValueError: unless its keys are `mean` and `log_scale`, of one shape.
        """
        check_dict(self, outputs, ("mean", "log_scale"), name="outputs")
        shape = self._batch_shape_of(outputs["mean"], name='outputs["mean"]')
        self._batch_shape_of(outputs["log_scale"], name='outputs["log_scale"]')
        if outputs["mean"].shape != outputs["log_scale"].shape:
            rule = "have `mean` and `log_scale` of the same shape"
            advice = "in `model_fn` use `jnp.broadcast_to(log_scale, mean.shape)`"
            raise ValueError(message(self, "outputs", rule, outputs, advice))
        return shape

    def log_prob(self, outputs: dict[str, Array], targets: Array) -> Array:
        """−Σ ½ ((y − μ) e⁻ˡ)² + l + ½ log 2π over the event, in nats.

        Args:
          outputs: Means μ and log scales l.
          targets: y, of the shape of the means.

        Returns:
          An array of the batch shape.

        Raises:
          TypeError, ValueError: if outputs or targets do not fit.
        """
        self.batch_shape(outputs)
        check_targets(self, targets, outputs["mean"].shape, what="real numbers")
        mean, log_scale = outputs["mean"], outputs["log_scale"]
        mean, log_scale, y = numerics.wide_together(mean, log_scale, targets)
        z = (y - mean) * numerics.root_exp(-2 * log_scale)
        return -self._sum_event(z * z / 2 + log_scale + _HALF_LOG_TWO_PI)

    def kl(self, outputs_p: dict[str, Array], outputs_q: dict[str, Array]) -> Array:
        """KL(p‖q) = Σ r + ½ (e⁻²ʳ − 1) + ½ ((μ_q − μ_p) e^−l_q)², r = l_q − l_p.

        In nats, of the batch shape; accurate relative to the KL itself, exactly 0.0 for
        equal outputs.

        Raises:
          TypeError, ValueError: if the outputs do not fit, or differ in shape.
        """
        p, q = self._wide_pair(outputs_p, outputs_q)
        z = (q["mean"] - p["mean"]) * numerics.root_exp(-2 * q["log_scale"])
        width = numerics.exp_excess(-2 * (q["log_scale"] - p["log_scale"]))
        return self._sum_event((width + z * z) / 2)

    def _root(self, outputs: dict[str, Array]) -> dict[str, Array]:
        """e⁻ˡ for the mean and √2 for the log scale."""
        log_scale = outputs["log_scale"]
        return {
            "mean": numerics.root_exp(-2 * log_scale),
            "log_scale": jnp.full_like(log_scale, math.sqrt(2)),
        }

    def sample(self, key: KeyArray, outputs: dict[str, Array]) -> Array:
        """Draws targets, of the shape and dtype of the means."""
        self.batch_shape(outputs)
        mean, log_scale = numerics.wide_together(outputs["mean"], outputs["log_scale"])
        # Leave a factor of e³ for the noise, so that no sample is infinite.
        limit = numerics.largest_exponent(outputs["mean"].dtype) - 3
        scale = jnp.exp(jnp.minimum(log_scale, limit))
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return (mean + scale * noise).astype(outputs["mean"].dtype)
