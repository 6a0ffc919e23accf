"""Models known at their own samples up to a constant: energies and wave functions.

With log p̃(x) the outputs at samples x of the model itself, the score of the normalised
model is ∂ log p̃ − E[∂ log p̃], so that the Fisher information is a covariance,

    F = Cov(∂ log p̃) = (1/N) Jᵀ C J,   C = I − 1 1ᵀ/N = B = Bᵀ,

and log Z_q/Z_p = log E_p[exp(log p̃_q − log p̃_p)] comes from the same samples. All axes
of the outputs are examples. Knows nothing of how the samples were drawn.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ngd_jax.likelihoods import numerics
from ngd_jax.likelihoods.base import Likelihood
from ngd_jax.likelihoods.checks import batch_shape_of, message
from ngd_jax.tree import replicate
from ngd_jax.types import Array, KeyArray, Scalar

__all__ = ["LogAmplitude", "LogDensity"]


class _SampledModel(Likelihood):
    """Shared by both: a centred metric, and a KL with an estimated normaliser."""

    centered: ClassVar[bool] = True

    def batch_shape(self, outputs: Array) -> tuple[int, ...]:
        """The whole shape of the outputs: each number is an example.

        Raises:
          TypeError: unless the outputs are an array of a fitting dtype.
          ValueError: unless they have at least one axis.
        """
        expected, kind = self._expected, self._kind
        shape = batch_shape_of(self, outputs, 0, expected=expected, kind=kind)
        if not shape:
            advice = "the mean over samples needs a batch axis: do not `vmap` over them"
            rule = f"be {expected}"
            raise ValueError(message(self, "outputs", rule, outputs, advice))
        return shape

    def log_prob(self, outputs: Array, targets: Array | None = None) -> Array:
        """The log density up to a constant, log p̃ − mean(log p̃), in nats.

        Its gradient is the score of the normalised model, estimated on the batch.

        Args:
          outputs: The logarithms at the samples.
          targets: Integer indices into the flattened batch, of any shape, such as
            `sample` returns; `None` means every sample once.

        Returns:
          An array of the shape of the outputs, or of `targets`. An index outside the
          batch gives NaN.

        Raises:
          TypeError, ValueError: if outputs or targets do not fit.
        """
        self.batch_shape(outputs)
        (values,) = numerics.wide_together(self._log_density(outputs))
        centred = values - jnp.mean(values)
        if targets is None:
            return centred
        if not jnp.issubdtype(getattr(targets, "dtype", jnp.bool_), jnp.integer):
            rule = "be None or an array of integer indices into the batch"
            raise TypeError(message(self, "targets", rule, targets))
        values, index = replicate(centred.reshape(-1)), replicate(targets.reshape(-1))
        picked = numerics.pick(values, index)
        return picked.reshape(targets.shape)

    def log_ratio(self, outputs_p: Array, outputs_q: Array) -> Array:
        """The ratio log p̃_q − log p̃_p at the samples, real, of their shape.

        Raises:
          TypeError, ValueError: if the outputs do not fit, or differ in shape.
        """
        p, q = self._wide_pair(outputs_p, outputs_q)
        return numerics.difference(self._log_density(p), self._log_density(q))

    def kl_from_normaliser(
        self, outputs_p: Array, outputs_q: Array, log_normaliser_ratio: Scalar
    ) -> Array:
        """Per-sample terms of KL(p‖q) ≥ 0, given log Z_q/Z_p.

        With d = `log_ratio` − log Z_q/Z_p = log q − log p, the terms are eᵈ − 1 − d,
        each of them never negative. Their mean under p is KL(p‖q), because E_p[eᵈ] = 1.

        Args:
          outputs_p: Outputs of the model that the samples come from.
          outputs_q: Outputs of the other model at the same samples.
          log_normaliser_ratio: log E_p[exp(log_ratio)] by `numerics.log_mean_exp`,
            with the weights of the mean that the caller then takes of the result.

        Returns:
          An array of the shape of the outputs, in nats.
        """
        ratio = self.log_ratio(outputs_p, outputs_q)
        return numerics.exp_excess(
            ratio - jnp.asarray(log_normaliser_ratio, ratio.dtype)
        )

    def kl(self, outputs_p: Array, outputs_q: Array) -> Array:
        """Terms whose mean is the estimate of KL(p‖q) on the samples, in nats.

        The mean is log mean(eᵟ) − mean(δ) with δ = log p̃_q − log p̃_p, exactly 0.0 for
        equal outputs and never negative. It is the KL between the two models restricted
        to the batch: differences elsewhere do not show.

        Raises:
          TypeError, ValueError: if the outputs do not fit, or differ in shape.
        """
        normaliser = numerics.log_mean_exp(self.log_ratio(outputs_p, outputs_q))
        return self.kl_from_normaliser(outputs_p, outputs_q, normaliser)

    def sample(self, key: KeyArray, outputs: Array) -> Array:
        """Draws indices into the flattened batch, int32, of the shape of the outputs.

        The batch is already a sample of the model; a fresh one is a draw from it with
        replacement (the bootstrap).
        """
        shape = self.batch_shape(outputs)
        size = max(1, outputs.size)
        return jax.random.randint(key, shape, 0, size, dtype=jnp.int32)

    # The density is |exp(outputs)| to this power.
    _power: ClassVar[float] = 1.0
    _kind: ClassVar = jnp.floating
    _expected: ClassVar[str]

    def _log_density(self, outputs: Array) -> Array:
        return self._power * jnp.real(outputs)

    def _fisher_vp(self, outputs: Array, tangents: Array) -> Array:
        """H t = C t = t − mean(t), over the whole batch: a projection, its own root."""
        del outputs
        centred = tangents - jnp.mean(tangents)
        return centred - jnp.mean(centred)  # of a large mean the first leaves round-off

    def _sqrt_fisher_vp(self, outputs: Array, coefficients: Array) -> Array:
        return self._fisher_vp(outputs, coefficients)

    def _sqrt_fisher_solve(self, outputs: Array, cotangents: Array) -> Array:
        return self._fisher_vp(outputs, cotangents)


@dataclasses.dataclass(frozen=True)
class LogDensity(_SampledModel):
    """An unnormalised density: outputs are log p̃(x) at samples x of the model.

    For energy-based models, with log p̃ = −energy. The metric is the covariance of the
    scores over the batch. Do not `vmap` over examples: they share a mean.

    Example:
      >>> import jax.numpy as jnp
      >>> from ngd_jax.likelihoods import LogDensity
      >>> log_density = jnp.array([0.0, -1.0, -2.0])
      >>> LogDensity().fisher_vp(log_density, jnp.array([3.0, 0.0, 0.0]))
      Array([ 2., -1., -1.], dtype=float32)
      >>> LogDensity().kl(log_density, log_density + 5.0)  # only the normaliser differs
      Array([0., 0., 0.], dtype=float32)

    References:
      Amari, Kurata and Nagaoka, "Information geometry of Boltzmann machines", 1992.
    """

    _expected: ClassVar[str] = "an array of log densities, one per sample, [N]"


@dataclasses.dataclass(frozen=True)
class LogAmplitude(_SampledModel):
    """A wave function: outputs are log ψ(x), real or complex, at samples x of |ψ|².

    The metric is Cov(∂ log ψ), the quantum geometric tensor of stochastic
    reconfiguration. `kl`, `log_prob` and `sample` are those of the density |ψ|², whose
    logarithm is 2 Re log ψ. For real ψ the Fisher information of |ψ|² is 4 times the
    metric (`kl_curvature`); for complex ψ it is at most that, since phases do not show
    in |ψ|².

    Tangents may be complex; the pullback to the parameters takes the adjoint.

    Example:
      >>> import jax.numpy as jnp
      >>> from ngd_jax.likelihoods import LogAmplitude
      >>> log_psi = jnp.array([0.0, 1.0 + 0.5j])
      >>> LogAmplitude().fisher_vp(log_psi, jnp.array([2.0, 0.0j]))
      Array([ 1.+0.j, -1.+0.j], dtype=complex64)
      >>> LogAmplitude().log_prob(log_psi)
      Array([-1.,  1.], dtype=float32)

    References:
      Sorella, "Green function Monte Carlo with stochastic reconfiguration", 1998;
      Stokes, Izaac, Killoran and Carleo, "Quantum natural gradient", 2020.
    """

    kl_curvature: ClassVar[float] = 4.0
    _power: ClassVar[float] = 2.0
    _kind: ClassVar = jnp.inexact
    _expected: ClassVar[str] = "an array of log amplitudes, one per sample, [N]"
