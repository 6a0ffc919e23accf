"""The categorical distribution over K classes, with logits as outputs.

    p = softmax(z),   H = diag(p) − p pᵀ = B Bᵀ,   B = diag(√p) − p √pᵀ.

A logit of −∞ excludes its class. Knows nothing of models or of the batch mean.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ngd_jax.likelihoods.base import Likelihood
from ngd_jax.likelihoods.checks import (
    batch_shape_of,
    check_like,
    check_targets,
    describe,
)
from ngd_jax.likelihoods.numerics import (
    difference,
    divided,
    floored,
    masked_product,
    relative_entropy,
    wide_together,
)
from ngd_jax.types import Array, KeyArray

__all__ = ["Categorical"]

_EXPECTED = "logits of shape [..., K] with at least one class"


@dataclasses.dataclass(frozen=True)
class Categorical(Likelihood):
    """One of K classes, with probabilities softmax(outputs) over the last axis.

    All axes before the last are the batch: every token of a sequence is an example.
    A logit of −∞ excludes its class, from the metric and the samples too. To leave out
    an example (padding), give it any valid label and the weight 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from ngd_jax.likelihoods import Categorical
      >>> logits = jnp.zeros((3, 4))
      >>> Categorical().batch_shape(logits)
      (3,)
      >>> Categorical().log_prob(logits, jnp.array([0, 3, 1]))
      Array([-1.3862944, -1.3862944, -1.3862944], dtype=float32)
      >>> Categorical().fisher_vp(logits[0], jnp.array([1.0, 0.0, 0.0, 0.0]))
      Array([ 0.1875, -0.0625, -0.0625, -0.0625], dtype=float32)

    References:
      Schraudolph, "Fast curvature matrix-vector products for second-order gradient
      descent", 2002, section 3 (matching loss functions).
    """

    def batch_shape(self, outputs: Array) -> tuple[int, ...]:
        """All axes of the logits but the last.

        Raises:
          TypeError: unless the logits are a real floating point array.
          ValueError: unless they have a last axis with at least one class.
        """
        shape = batch_shape_of(self, outputs, 1, name="outputs", expected=_EXPECTED)
        if outputs.shape[-1] == 0:
            raise ValueError(
                f"`outputs` of {self!r} must be {_EXPECTED}, got {describe(outputs)}."
            )
        return shape

    def log_prob(self, outputs: Array, targets: Array) -> Array:
        """Log-probability z_y − log Σ eᶻ, or Σ y log p for soft targets y; in nats.

        Args:
          outputs: Logits [..., K].
          targets: Integer labels of the batch shape [...], or a distribution over the
            classes (one-hot or soft) of the shape of the logits.

        Returns:
          An array of the batch shape. A label outside of 0 ... K−1 gives NaN, in the
          gradient as well.

        Raises:
          TypeError: for labels that are not integers.
          ValueError: for targets of any other shape.

        Example:
          >>> import jax.numpy as jnp
          >>> from ngd_jax.likelihoods import Categorical
          >>> Categorical().log_prob(jnp.zeros((2, 2)), jnp.array([1, -1]))
          Array([-0.6931472,        nan], dtype=float32)
        """
        shape = self.batch_shape(outputs)
        labels = "integer labels or probabilities"
        if getattr(targets, "shape", None) == shape:
            if not jnp.issubdtype(targets.dtype, jnp.integer):
                raise TypeError(
                    f"`targets` of {self!r} must be {labels}, got {describe(targets)}; "
                    f"convert labels with `.astype(jnp.int32)`."
                )
            return _pick(jax.nn.log_softmax(wide_together(outputs)[0]), targets)
        if len(getattr(targets, "shape", outputs.shape)) != len(outputs.shape):
            raise ValueError(
                f"`targets` of {self!r} must be integer labels of shape {shape} or "
                f"probabilities of shape {tuple(outputs.shape)}, got "
                f"{describe(targets)}."
            )
        check_targets(self, targets, outputs.shape, what=labels)
        logits, probabilities = wide_together(outputs, targets)
        log_p = jax.nn.log_softmax(logits)
        return jnp.sum(masked_product(probabilities, log_p), axis=-1)

    def kl(self, outputs_p: Array, outputs_q: Array) -> Array:
        """KL(p‖q) = Σ p (log p − log q), in nats, of the batch shape.

        Accurate to a few roundings relative to the KL itself, however small it is, and
        exactly 0.0 for equal logits. +∞ where q excludes a class that p does not.

        Raises:
          TypeError, ValueError: where the logits do not fit, or differ in shape.

        Example:
          >>> import jax.numpy as jnp
          >>> from ngd_jax.likelihoods import Categorical
          >>> float(Categorical().kl(jnp.array([0.0, 1e4]), jnp.array([0.0, -1e4])))
          10000.0
        """
        self.batch_shape(outputs_p)
        check_like(self, outputs_q, outputs_p, name="outputs_q")
        a, b = wide_together(outputs_p, outputs_q)
        lost = jnp.isneginf(b) & ~jnp.isneginf(a)
        delta, a, b = difference(a, b), floored(a), floored(b)

        top = jax.lax.stop_gradient(jnp.max(a, axis=-1, keepdims=True))
        log_sum = jnp.log(jnp.sum(jnp.exp(a - top), axis=-1, keepdims=True))
        p = jnp.exp(a - top - log_sum)

        # log q = log p + e − log Σ p eᵉ, where e = delta − c and c is the mean of delta
        # under p. The sum is then 1 + O(e²), which expm1 and log1p keep to the last
        # digit. Classes that grow much enter as their mass r = p eᵉ instead, and if one
        # would overflow, eᵐ is taken out of the sum.
        centre = jnp.sum(p * delta, axis=-1, keepdims=True)
        shift = delta - centre
        log_r = b - top - log_sum - centre
        m = jax.lax.stop_gradient(jnp.max(log_r, axis=-1, keepdims=True))
        m = jnp.where(m > 1, m, 0)
        growth = jnp.where(
            (shift <= 1) & (m == 0),
            p * jnp.expm1(jnp.minimum(shift, 1)),
            jnp.exp(log_r - m) - p,
        )
        log_total = m + jnp.log1p(jnp.sum(growth, axis=-1, keepdims=True))
        terms = relative_entropy(p, jnp.exp(log_r - log_total), log_total - shift)
        return jnp.sum(jnp.where(lost, jnp.inf, terms), axis=-1)

    def fisher_vp(self, outputs: Array, tangents: Array) -> Array:
        """H t = p ∘ (t − pᵀt), per example, in the dtype of `tangents`.

        Raises:
          TypeError, ValueError: where the logits or the tangents do not fit.
        """
        logits, t = self._wide_pair(outputs, tangents, name="tangents")
        p = jax.nn.softmax(logits)
        products = p * (t - jnp.sum(p * t, axis=-1, keepdims=True))
        return products.astype(tangents.dtype)

    def sqrt_fisher_vp(self, outputs: Array, coefficients: Array) -> Array:
        """B u = √p ∘ u − p (√pᵀ u), per example, in the dtype of `coefficients`.

        Raises:
          TypeError, ValueError: where the logits or the coefficients do not fit.
        """
        logits, u = self._wide_pair(outputs, coefficients, name="coefficients")
        # Half the logarithm, not the root of p: finite gradients where p underflows.
        root = jnp.exp(jax.nn.log_softmax(logits) / 2)
        products = root * (u - root * jnp.sum(root * u, axis=-1, keepdims=True))
        return products.astype(coefficients.dtype)

    def sqrt_fisher_tvp(self, outputs: Array, tangents: Array) -> Array:
        """Bᵀ t = √p ∘ (t − pᵀt), per example, in the dtype of `tangents`.

        Raises:
          TypeError, ValueError: where the logits or the tangents do not fit.
        """
        logits, t = self._wide_pair(outputs, tangents, name="tangents")
        root = jnp.exp(jax.nn.log_softmax(logits) / 2)
        products = root * (t - jnp.sum(root * root * t, axis=-1, keepdims=True))
        return products.astype(tangents.dtype)

    def sqrt_fisher_solve(self, outputs: Array, cotangents: Array) -> Array:
        """The coefficients u = q − √p ⟨√p, q⟩, q = c/√p, with B u = c where Σc = 0.

        The gradients of all losses that do not change when a number is added to all
        logits sum to zero. A class of probability zero gets no coefficient.

        Raises:
          TypeError, ValueError: where the logits or the cotangents do not fit.
        """
        logits, c = self._wide_pair(outputs, cotangents, name="cotangents")
        root = jnp.exp(jax.nn.log_softmax(logits) / 2)
        quotient = divided(c, root)
        return quotient - root * jnp.sum(root * quotient, axis=-1, keepdims=True)

    def sample(self, key: KeyArray, outputs: Array) -> Array:
        """Draws one label per example: int32, of the batch shape."""
        self.batch_shape(outputs)
        labels = jax.random.categorical(key, wide_together(outputs)[0])
        return labels.astype(jnp.int32)

    def _wide_pair(self, outputs: Array, vector: Array, *, name: str):
        self.batch_shape(outputs)
        check_like(self, vector, outputs, name=name)
        return wide_together(outputs, vector)


def _pick(log_p: Array, labels: Array) -> Array:
    if labels.dtype.itemsize < 4:  # so that K itself can be compared with
        labels = labels.astype(jnp.int32)
    num_classes = log_p.shape[-1]
    index = jnp.clip(labels, 0, num_classes - 1)[..., None]
    picked = jnp.take_along_axis(log_p, index, axis=-1)[..., 0]
    # A factor, not a `where`: the gradient of a wrong label must not look right either.
    valid = (labels >= 0) & (labels < num_classes)
    return picked * jnp.where(valid, 1, jnp.nan).astype(log_p.dtype)
