"""Scalar functions that keep the digits of a small KL divergence, and dtype helpers.

With the log ratio d = log p − log q of two masses, a divergence is a sum of terms

    p (e⁻ᵈ − 1 + d) = q − p + p log(p/q) ≥ 0.

Each is computed to full relative accuracy, from differences of the outputs and never
from a difference of two logarithms, so that a KL of 1e-8 keeps its digits in float32.
Knows nothing of likelihoods.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from ngd_jax.types import Array, ArrayLike, PyTree

__all__ = [
    "cast_like",
    "difference",
    "divided",
    "exp_excess",
    "floored",
    "largest_exponent",
    "log_mean_exp",
    "masked_product",
    "pick",
    "relative_entropy",
    "root_exp",
    "wide_pair",
    "wide_together",
]


def wide_together(*arrays: ArrayLike) -> tuple[Array, ...]:
    """Converts all arrays to their common dtype, float32 or wider."""
    dtypes = [jnp.result_type(x) for x in arrays]
    with jax.numpy_dtype_promotion("standard"):  # asked for here, even under "strict"
        common = functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))
    return tuple(jnp.asarray(x).astype(common) for x in arrays)


def wide_pair(outputs: PyTree, vector: PyTree) -> tuple[PyTree, PyTree]:
    """Converts two trees leaf by leaf to a common dtype, float32 or wider."""
    pairs = jax.tree.map(wide_together, outputs, vector)
    outer, inner = jax.tree.structure(outputs), jax.tree.structure((0, 0))
    return jax.tree.transpose(outer, inner, pairs)


def cast_like(values: PyTree, like: PyTree) -> PyTree:
    """Rounds every leaf to the dtype of its leaf in `like`; real from complex too."""

    def cast(x: Array, y: ArrayLike) -> Array:
        x = x if jnp.iscomplexobj(y) else jnp.real(x)
        return x.astype(jnp.result_type(y))

    return jax.tree.map(cast, values, like)


def largest_exponent(dtype: jnp.dtype) -> float:
    """The largest whole x for which eˣ is finite: 88 in float32, 709 in float64."""
    return float(math.floor(math.log(float(jnp.finfo(dtype).max))))


def root_exp(log_square: Array) -> Array:
    """√(eˣ), capped so that its square is finite.

    Half the exponent rather than a square root, whose derivative is infinite at 0.
    """
    limit = largest_exponent(log_square.dtype)
    return jnp.exp(jnp.minimum(log_square, limit) / 2)


def floored(log_mass: Array) -> Array:
    """Replaces −∞, the log of an exact zero, by a number with finite differences.

    +∞ and NaN stay, so that an overflow upstream is seen.
    """
    return jnp.maximum(log_mass, -jnp.finfo(log_mass.dtype).max / 4)


def difference(log_p: Array, log_q: Array) -> Array:
    """The difference log q − log p, where −∞ − (−∞) = 0: neither allows the outcome.

    Not `where(p == q, 0, q − p)`, whose derivative vanishes at p = q, which is where
    the Fisher information is read off the second derivative.
    """
    return floored(log_q) - floored(log_p)


def divided(values: Array, root: Array) -> Array:
    """Divides values / root elementwise, 0 where the quotient could overflow.

    `root` ≥ 0 is the square root of a Fisher information; below the fourth root of the
    smallest number there is no information left, and above it squares of the quotient
    stay finite.
    """
    usable = root > float(jnp.finfo(root.dtype).tiny) ** 0.25
    return jnp.where(usable, values / jnp.where(usable, root, 1), 0)


def masked_product(weights: Array, values: Array) -> Array:
    """Multiplies elementwise with 0·(±∞) = 0, in the gradient as well."""
    return weights * jnp.where(weights == 0, 0, values)


def pick(values: Array, index: Array) -> Array:
    """Entries of the last axis by index; NaN, also in gradients, if out of range."""
    size = values.shape[-1]
    if index.dtype.itemsize < 4:  # so that it can be compared with a large size
        index = index.astype(jnp.int32)
    picked = jnp.take_along_axis(values, jnp.clip(index, 0, size - 1), axis=-1)
    # A factor, not a `where`, whose gradient for a wrong index would be 0.
    valid = (index >= 0) & (index < size)
    return picked * jnp.where(valid, 1, jnp.nan).astype(values.dtype)


@jax.custom_jvp
def exp_excess(x: Array) -> Array:
    """eˣ − 1 − x ≥ 0, to full relative accuracy, finite for x up to +∞.

    The Taylor series takes over where the two terms cancel; the derivative, eˣ − 1, is
    given in closed form, so that neither branch nor series shows in it.
    """
    x = jnp.minimum(x, largest_exponent(x.dtype))
    # x²/2! + x³/3! + ..., to x¹¹/11!: the rest is below 1e-17 of it for |x| < 0.1.
    series = jnp.full_like(x, 1 / math.factorial(11))
    for k in range(10, 1, -1):
        series = series * x + 1 / math.factorial(k)
    return jnp.where(jnp.abs(x) < 0.1, x * x * series, jnp.expm1(x) - x)


@exp_excess.defjvp
def _exp_excess_jvp(primals, tangents):
    (x,), (x_dot,) = primals, tangents
    slope = jnp.expm1(jnp.minimum(x, largest_exponent(x.dtype)))
    return exp_excess(x), slope * x_dot


def relative_entropy(p: Array, q: Array, log_ratio: Array) -> Array:
    """Elementwise q − p + p log(p/q), from both masses and d = log(p/q).

    Its sum over the outcomes is the KL divergence when both masses sum to one (and the
    KL of Poisson distributions when they are rates). It is never negative, and 0 at
    d = 0. An error common to all d cancels to first order, because Σ (p − q) = 0.
    """
    close = jnp.abs(log_ratio) <= 1
    near = p * exp_excess(-jnp.where(close, log_ratio, 0))
    # Otherwise factor out the larger mass: no difference of two huge numbers, no
    # exponential that overflows, and a second factor of at least 0.26.
    distance = jnp.abs(jnp.where(close, 1, log_ratio))
    far = jnp.where(
        log_ratio > 0,
        p * (jnp.expm1(-distance) + distance),
        q * (1 - (1 + distance) * jnp.exp(-distance)),
    )
    return jnp.where(close, near, far)


def log_mean_exp(values: Array, weights: Array | None = None) -> Array:
    """The logarithm of Σ w eᵛ / Σ w over all axes, accurate to the spread of v.

    Args:
      values: v, of any shape.
      weights: w ≥ 0, of the same shape; `None` is the plain mean. Entries of weight 0
        do not count, whatever their value.

    Returns:
      A scalar, float32 or wider; exactly 0.0 where all values are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> float(log_mean_exp(jnp.array([0.0, 0.0])))
      0.0
      >>> print(round(float(log_mean_exp(jnp.log(jnp.array([1.0, 3.0])))), 4))
      0.6931
    """
    if weights is None:
        weights = jnp.ones_like(values)
    values, weights = wide_together(values, weights)
    values = jnp.where(weights > 0, values, 0)
    weights = weights / jnp.sum(weights)
    # Around the mean c, log E eᵛ = c + log(1 + E(eᵛ⁻ᶜ − 1)) with a small argument.
    centre = jnp.sum(weights * values)
    centred = values - centre
    narrow = jnp.max(jnp.where(weights > 0, jnp.abs(centred), 0)) <= 1
    excess = jnp.expm1(jnp.where(narrow & (weights > 0), centred, 0))
    small = jnp.log1p(jnp.sum(weights * excess))
    return centre + jnp.where(narrow, small, logsumexp(centred, b=weights))
