"""The categorical distribution over K classes, with logits as outputs.

    p = softmax(z),   H = diag(p) − p pᵀ = B Bᵀ,   B = diag(√p) − p √pᵀ.

A logit of −∞ excludes its class. Knows nothing of models or of the batch mean.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ngd_jax.likelihoods import numerics
from ngd_jax.likelihoods.base import Likelihood
from ngd_jax.likelihoods.checks import batch_shape_of, check_targets, message
from ngd_jax.types import Array, KeyArray

__all__ = ["Categorical"]

# One class has probability 1 whatever its logit, so that its metric is zero.
_EXPECTED = "an array of logits [..., K] of two or more classes"


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
          ValueError: unless they have a last axis with at least two classes.
        """
        shape = batch_shape_of(self, outputs, 1, name="outputs", expected=_EXPECTED)
        if outputs.shape[-1] < 2:
            advice = "the metric of one class is zero; use Bernoulli() for one logit"
            rule = f"be {_EXPECTED}"
            raise ValueError(message(self, "outputs", rule, outputs, advice))
        return shape

    def log_prob(self, outputs: Array, targets: Array) -> Array:
        """Log-probability z_y − log Σ eᶻ, or Σ y log p for soft targets y; in nats.

        Args:
          outputs: Logits [..., K].
          targets: Integer labels of the batch shape [...], or a distribution over the
            classes (one-hot or soft) of the shape of the logits.

        Returns:
          An array of the batch shape. A label outside 0 ... K−1 gives NaN, in the
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
        if getattr(targets, "shape", None) == shape:
            if not jnp.issubdtype(targets.dtype, jnp.integer):
                rule = "be integer labels, or probabilities of the shape of the outputs"
                advice = "convert labels with `.astype(jnp.int32)`"
                raise TypeError(message(self, "targets", rule, targets, advice))
            log_p = jax.nn.log_softmax(numerics.wide_together(outputs)[0])
            return numerics.pick(log_p, targets[..., None])[..., 0]
        what = f"integer labels of shape {shape} or probabilities"
        check_targets(self, targets, outputs.shape, what=what)
        logits, probabilities = numerics.wide_together(outputs, targets)
        log_p = jax.nn.log_softmax(logits)
        return jnp.sum(numerics.masked_product(probabilities, log_p), axis=-1)

    def kl(self, outputs_p: Array, outputs_q: Array) -> Array:
        """KL(p‖q) = Σ p (log p − log q), in nats, of the batch shape.

        Accurate to a few roundings relative to the KL itself, however small it is, and
        exactly 0.0 for equal logits. +∞ where q excludes a class that p does not.

        Raises:
          TypeError, ValueError: if the logits do not fit, or differ in shape.

        Example:
          >>> import jax.numpy as jnp
          >>> from ngd_jax.likelihoods import Categorical
          >>> float(Categorical().kl(jnp.array([0.0, 1e4]), jnp.array([0.0, -1e4])))
          10000.0
        """
        a, b = self._wide_pair(outputs_p, outputs_q)
        lost = jnp.isneginf(b) & ~jnp.isneginf(a)
        a, b = numerics.floored(a), numerics.floored(b)
        delta = b - a

        top = jax.lax.stop_gradient(jnp.max(a, axis=-1, keepdims=True))
        log_sum = jnp.log(_sum(jnp.exp(a - top)))
        p = jnp.exp(a - top - log_sum)

        # log q = log p + e − log Σ p eᵉ, where e = delta − c and c is the mean of delta
        # under p. The sum is then 1 + O(e²), which expm1 and log1p keep to the last
        # digit. Classes that grow much enter as their mass r = p eᵉ instead, and if one
        # would overflow, eᵐ is taken out of the sum.
        centre = _sum(p * delta)
        shift = delta - centre
        log_r = b - top - log_sum - centre
        m = jax.lax.stop_gradient(jnp.max(log_r, axis=-1, keepdims=True))
        m = jnp.where(m > 1, m, 0)
        growth = jnp.where(
            (shift <= 1) & (m == 0),
            p * jnp.expm1(jnp.minimum(shift, 1)),
            jnp.exp(log_r - m) - p,
        )
        log_total = m + jnp.log1p(_sum(growth))
        terms = numerics.relative_entropy(
            p, jnp.exp(log_r - log_total), log_total - shift
        )
        return jnp.sum(jnp.where(lost, jnp.inf, terms), axis=-1)

    def sample(self, key: KeyArray, outputs: Array) -> Array:
        """Draws one label per example: int32, of the batch shape."""
        self.batch_shape(outputs)
        labels = jax.random.categorical(key, numerics.wide_together(outputs)[0])
        return labels.astype(jnp.int32)

    def _fisher_vp(self, outputs: Array, tangents: Array) -> Array:
        """H t = p ∘ (t − pᵀt)."""
        p = jax.nn.softmax(outputs)
        return p * _centred(p, tangents)

    def _sqrt_fisher_vp(self, outputs: Array, coefficients: Array) -> Array:
        """B u = √p ∘ (u − √p (√pᵀ u))."""
        root = _root(outputs)
        return root * _projected(root, coefficients)

    def _sqrt_fisher_tvp(self, outputs: Array, tangents: Array) -> Array:
        """Bᵀ t = √p ∘ (t − pᵀt)."""
        root = _root(outputs)
        return root * _centred(root * root, tangents)

    def _sqrt_fisher_solve(self, outputs: Array, cotangents: Array) -> Array:
        """The coefficients u = q − √p ⟨√p, q⟩, q = c/√p, with B u = c where Σc = 0.

        The gradient of a loss sums to zero if adding a number to all logits does not
        change the loss. A class of probability zero gets no coefficient.
        """
        root = _root(outputs)
        return _projected(root, numerics.divided(cotangents, root))


# For a class of probability 1 − δ, both of these leave a fraction δ of a value, rounded
# by ε of the whole. The second pass works on what is left, and is right to ε of its
# size.


def _centred(p: Array, values: Array) -> Array:
    """Subtracts the mean under p: t − pᵀt."""
    values = values - _sum(p * values)
    return values - _sum(p * values)


def _projected(root: Array, values: Array) -> Array:
    """Takes out what lies along √p: u − √p (√pᵀ u)."""
    values = values - root * _sum(root * values)
    return values - root * _sum(root * values)


def _root(logits: Array) -> Array:
    return numerics.root_exp(jax.nn.log_softmax(logits))


def _sum(values: Array) -> Array:
    return jnp.sum(values, axis=-1, keepdims=True)
