"""Independent Gaussian distributions, of fixed or of learned width.

    N(μ, s²):     H = 1/s²                      for the mean alone,
    N(μ, e²ˡ):    H = diag(e⁻²ˡ, 2)             for mean and log scale l.

Knows nothing of models or of the batch mean.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ngd_jax.likelihoods.checks import (
    batch_shape_of,
    check_dict,
    check_like,
    check_positive,
    check_targets,
    describe,
)
from ngd_jax.likelihoods.independent import IndependentLikelihood
from ngd_jax.likelihoods.numerics import exp_excess, largest_exponent, wide_together
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
        check_positive("scale", self.scale)

    def log_prob(self, outputs: Array, targets: Array) -> Array:
        """−Σ ½ ((y − μ)/s)² + log s + ½ log 2π over the event, in nats.

        Args:
          outputs: Means μ.
          targets: y, of the shape of the means.

        Returns:
          An array of the batch shape.

        Raises:
          TypeError, ValueError: where means or targets do not fit.
        """
        mean, y = self._wide_with_targets(outputs, targets, what="real numbers")
        z = (y - mean) / self.scale
        return -self._sum_event(z * z / 2 + math.log(self.scale) + _HALF_LOG_TWO_PI)

    def kl(self, outputs_p: Array, outputs_q: Array) -> Array:
        """KL(p‖q) = Σ ½ ((μ_q − μ_p)/s)², in nats, of the batch shape.

        Raises:
          TypeError, ValueError: where the means do not fit, or differ in shape.
        """
        mean_p, mean_q = self._wide_pair(outputs_p, outputs_q)
        z = (mean_q - mean_p) / self.scale
        return self._sum_event(z * z / 2)

    def fisher_root(self, outputs: Array) -> Array:
        """1/s everywhere; float32 or wider."""
        return jnp.full_like(wide_together(outputs)[0], 1 / self.scale)

    def sample(self, key: KeyArray, outputs: Array) -> Array:
        """Draws targets, of the shape and dtype of the means."""
        self.batch_shape(outputs)
        (mean,) = wide_together(outputs)
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
        shapes = [
            batch_shape_of(
                self,
                outputs[part],
                self.event_ndims,
                name=f'outputs["{part}"]',
                expected=self._expected,
            )
            for part in ("mean", "log_scale")
        ]
        if outputs["mean"].shape != outputs["log_scale"].shape:
            raise ValueError(
                f"`outputs` of {self!r} must have `mean` and `log_scale` of the same "
                f"shape, got {describe(outputs)}; broadcast the log scale with "
                f"`jnp.broadcast_to(log_scale, mean.shape)` in `model_fn`."
            )
        return shapes[0]

    def log_prob(self, outputs: dict[str, Array], targets: Array) -> Array:
        """−Σ ½ ((y − μ) e⁻ˡ)² + l + ½ log 2π over the event, in nats.

        Args:
          outputs: Means μ and log scales l.
          targets: y, of the shape of the means.

        Returns:
          An array of the batch shape.

        Raises:
          TypeError, ValueError: where outputs or targets do not fit.
        """
        self.batch_shape(outputs)
        check_targets(self, targets, outputs["mean"].shape, what="real numbers")
        mean, log_scale, y = wide_together(
            outputs["mean"], outputs["log_scale"], targets
        )
        z = (y - mean) * _precision_root(log_scale)
        return -self._sum_event(z * z / 2 + log_scale + _HALF_LOG_TWO_PI)

    def kl(self, outputs_p: dict[str, Array], outputs_q: dict[str, Array]) -> Array:
        """KL(p‖q) = Σ r + ½ (e⁻²ʳ − 1) + ½ ((μ_q − μ_p) e^−l_q)², r = l_q − l_p.

        In nats, of the batch shape; accurate relative to the KL itself, exactly 0.0 for
        equal outputs.

        Raises:
          TypeError, ValueError: where the outputs do not fit, or differ in shape.
        """
        self.batch_shape(outputs_p)
        check_like(self, outputs_q, outputs_p, name="outputs_q")
        mean_p, mean_q, log_scale_p, log_scale_q = wide_together(
            outputs_p["mean"],
            outputs_q["mean"],
            outputs_p["log_scale"],
            outputs_q["log_scale"],
        )
        z = (mean_q - mean_p) * _precision_root(log_scale_q)
        width = exp_excess(-2 * (log_scale_q - log_scale_p))
        return self._sum_event((width + z * z) / 2)

    def fisher_root(self, outputs: dict[str, Array]) -> dict[str, Array]:
        """e⁻ˡ for the mean and √2 for the log scale; float32 or wider."""
        (log_scale,) = wide_together(outputs["log_scale"])
        return {
            "mean": _precision_root(log_scale),
            "log_scale": jnp.full_like(log_scale, math.sqrt(2)),
        }

    def sample(self, key: KeyArray, outputs: dict[str, Array]) -> Array:
        """Draws targets, of the shape and dtype of the means."""
        self.batch_shape(outputs)
        mean, log_scale = wide_together(outputs["mean"], outputs["log_scale"])
        # e³ is left for the noise, so that no sample is infinite.
        limit = largest_exponent(outputs["mean"].dtype) - 3
        scale = jnp.exp(jnp.minimum(log_scale, limit))
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return (mean + scale * noise).astype(outputs["mean"].dtype)


def _precision_root(log_scale: Array) -> Array:
    """e⁻ˡ, with a finite square."""
    return jnp.exp(jnp.minimum(-log_scale, largest_exponent(log_scale.dtype) // 2))
