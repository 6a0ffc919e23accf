"""The length of a step, in KL: the largest s with KL(θ ‖ θ - s d) within the radius.

    ½ s² dᵀFd = max_kl    gives the first guess    s = √(2·max_kl / dᵀFd)

The guess is right where the quadratic model is, and a thousand times too long where F
is nearly singular along d, so what is promised is the KL *measured*: a search on s, one
forward pass for each trial. log KL is nearly linear in log s (slope 2 for small steps,
towards 1 for large ones), so secants in logarithms get there in two or three trials.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax.types import Array, ArrayLike, Scalar

__all__ = [
    "TrustRegionResult",
    "first_trial",
    "quadratic_step_scale",
    "search_kl_radius",
]

# A trial is good enough above this fraction of the radius; trials aim between it and 1.
_FILL = 0.92
_AIM = 0.965
# The slopes assumed beyond the trials so far. To shrink, between the 2 of short steps
# and the 1 of long ones, where outputs saturate; to grow, 2, and no more than fourfold:
# a KL that has stopped growing does not ask for a huge step.
_SHRINKING_SLOPE = 1.5
_LARGEST_SHRINK = 1e-3
_LARGEST_GROWTH = 4.0
# Trials between two others keep off both by this part of their logarithmic distance.
_MARGIN = 0.1


class TrustRegionResult(NamedTuple):
    """How long a step may be.

    Attributes:
      scale: s, the longest step measured to be within the radius; 0 where none was.
      kl: the KL measured there, in nats per example.
      num_kl_evaluations: int32, forward passes spent.
      found: whether a step within the radius was found.
    """

    scale: Scalar
    kl: Scalar
    num_kl_evaluations: Array
    found: Array


def quadratic_step_scale(quadratic: ArrayLike, max_kl: ArrayLike) -> Scalar:
    """The scale s = √(2·max_kl / q) with ½ s² q = max_kl; 1 where q is not positive.

    Args:
      quadratic: q = dᵀFd, or its multiple that the KL really grows with.
      max_kl: the radius, in nats per example.

    Example:
      >>> quadratic_step_scale(2.0, 0.01).round(3)
      Array(0.1, dtype=float32, weak_type=True)

    References:
      Schulman et al., Trust region policy optimization, 2015, appendix C.
    """
    quadratic = jnp.asarray(quadratic)
    positive = quadratic > 0
    # Two roots, so that neither quotient nor product leaves the range of float32.
    root = jnp.sqrt(jnp.where(positive, quadratic, 1.0))
    scale = jnp.sqrt(2 * jnp.asarray(max_kl)) / root
    return jnp.where(positive & jnp.isfinite(scale), scale, 1.0)


def first_trial(
    quadratic: ArrayLike, max_kl: ArrayLike, upper: ArrayLike = jnp.inf
) -> Scalar:
    """Where to start `search_kl_radius`: aims just inside of the radius.

    Starts at `upper` where the quadratic model says that it is within reach, for there
    a single trial settles it.
    """
    guess = jnp.sqrt(_AIM) * quadratic_step_scale(quadratic, max_kl)
    return jnp.where(jnp.asarray(upper) <= 2 * guess, upper, guess)


class _Search(NamedTuple):
    """The trial to come, and the trials closest to the radius from both sides."""

    scale: Scalar
    low: Scalar
    low_kl: Scalar
    high: Scalar
    high_kl: Scalar
    num_trials: Array
    done: Array


def search_kl_radius(
    kl_fn: Callable[[Scalar], Scalar],
    *,
    start: ArrayLike,
    max_kl: ArrayLike,
    upper: ArrayLike = jnp.inf,
    max_evaluations: int = 10,
) -> TrustRegionResult:
    """Finds s in (0, upper] with KL(s) in [0.92, 1]·max_kl, or KL(upper) ≤ max_kl.

    The result is the longest trial whose KL was within the radius, and so never above
    it. NaN and infinity count as outside.

    Args:
      kl_fn: s -> measured mean KL of the step of length s, 0 at s = 0.
      start: the first trial; 0 asks for no step and no trial.
      max_kl: the radius, in nats per example.
      upper: no longer step is tried.
      max_evaluations: trials at most; two or three do for a smooth model.

    Example:
      >>> result = search_kl_radius(lambda s: 3.0 * s**2, start=1.0, max_kl=0.01)
      >>> bool(0.92 * 0.01 <= result.kl <= 0.01), int(result.num_kl_evaluations)
      (True, 3)
    """
    start = jnp.asarray(start)
    dtype = jnp.promote_types(start.dtype, jnp.float32)
    start, max_kl, upper = (
        jnp.asarray(x).astype(dtype) for x in (start, max_kl, upper)
    )
    upper = jnp.minimum(upper, jnp.finfo(dtype).max)

    def body(state: _Search) -> _Search:
        s = state.scale
        kl = jnp.asarray(kl_fn(s)).astype(dtype)
        # NaN is outside; round-off below zero, and -0.0, would make the next trial NaN.
        kl = jnp.where(kl <= 0, 0.0, jnp.where(jnp.isnan(kl), jnp.inf, kl))
        inside = kl <= max_kl
        low, low_kl = (
            jnp.where(inside, s, state.low),
            jnp.where(inside, kl, state.low_kl),
        )
        high = jnp.where(inside, state.high, s)
        high_kl = jnp.where(inside, state.high_kl, kl)
        trial = _next_trial(low, low_kl, high, high_kl, _AIM * max_kl)
        return _Search(
            scale=jnp.minimum(trial, upper),
            low=low,
            low_kl=low_kl,
            high=high,
            high_kl=high_kl,
            num_trials=state.num_trials + 1,
            done=inside & ((kl >= _FILL * max_kl) | (s >= upper)),
        )

    def running(state: _Search) -> Array:
        return ~state.done & (state.num_trials < max_evaluations)

    zero = jnp.zeros((), dtype)
    infinity = jnp.asarray(jnp.inf, dtype)
    state = _Search(
        scale=jnp.minimum(start, upper),
        low=zero,
        low_kl=zero,
        high=infinity,
        high_kl=infinity,
        num_trials=jnp.zeros((), jnp.int32),
        done=~(start > 0),
    )
    state = jax.lax.while_loop(running, body, state)
    found = (state.low > 0) | (start == 0)
    return TrustRegionResult(state.low, state.low_kl, state.num_trials, found)


def _next_trial(
    low: Scalar, low_kl: Scalar, high: Scalar, high_kl: Scalar, target: Scalar
) -> Scalar:
    """Every trial lies between `low` and `high`, so the two close in on the radius."""
    growth = jnp.minimum(jnp.sqrt(target / low_kl), _LARGEST_GROWTH)
    shrink = jnp.exp(jnp.log(target / high_kl) / _SHRINKING_SLOPE)
    shrink = jnp.maximum(shrink, _LARGEST_SHRINK)
    # The secant of log KL over log s as a fraction of the way; halfway without one.
    distance = jnp.log(high / low)
    fraction = jnp.log(target / low_kl) / jnp.log(high_kl / low_kl)
    usable = (low_kl > 0) & jnp.isfinite(high_kl)
    fraction = jnp.where(usable, jnp.clip(fraction, _MARGIN, 1 - _MARGIN), 0.5)
    between = low * jnp.exp(fraction * distance)
    return jnp.where(
        low == 0, high * shrink, jnp.where(jnp.isinf(high), low * growth, between)
    )
