"""The length of a step, in KL: the largest s with KL(θ ‖ θ - s d) within the radius.

    ½ s² dᵀFd = max_kl    gives the first guess    s = √(2·max_kl / dᵀFd)

The guess is as good as the quadratic model, and can be a thousand times too long where
F is nearly singular along d. The promise is therefore about the KL as *measured*, by a
search over s with one forward pass for each trial. Owns that search and the rule of
sufficient decrease; knows nothing of Optax.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = [
    "RadiusRule",
    "RateRule",
    "SearchLine",
    "SufficientDecrease",
    "TrustRegionResult",
    "first_trial",
    "quadratic_step_scale",
    "search_kl_radius",
]

# A trial is good enough above this fraction of the radius; trials aim between it and 1.
_FILL = 0.92
_AIM = 0.965
# A step above this fraction of the radius is said to fill it.
_SHORT = 0.9
# The slopes of log KL over log s assumed beyond the trials so far. To shrink, between
# the 2 of short steps and the 1 of long ones, where outputs saturate; to grow, 2, and
# no more than fourfold: a KL that has stopped growing does not justify a huge step.
_SHRINKING_SLOPE = 1.5
_LEAST_SLOPE = 0.05
_LARGEST_SHRINK = 1e-3
_LARGEST_GROWTH = 4.0
# A trial between two others keeps this part of their logarithmic distance from both.
_MARGIN = 0.05
_MAX_EVALUATIONS = 10


class TrustRegionResult(NamedTuple):
    """How long a step may be.

    Attributes:
      scale: s, the longest step measured to be within the radius; 0 if none was.
      kl: the KL measured there, in nats per example.
      num_kl_evaluations: int32, forward passes spent.
      found: whether a step within the radius was found.
      filled: whether it is as long as allowed: its KL is at least 0.9 of the radius, or
        s is the longest step allowed.
    """

    scale: Scalar
    kl: Scalar
    num_kl_evaluations: Array
    found: Array
    filled: Array


class SearchLine(NamedTuple):
    """What is known along a direction d, for rules that choose the length of a step.

    Attributes:
      kl_fn: s -> measured mean KL of the step of length s, in nats per example.
      loss_fn: s -> the loss after it.
      loss_here: the loss before it, called by rules that need it.
      slope: gᵀd.
      quadratic: dᵀFd.
      kl_curvature: the Hessian of the KL in units of F.
      upper: the longest step to try; infinite for no limit, 0 for no step.
    """

    kl_fn: Callable[[Scalar], Scalar]
    loss_fn: Callable[[Scalar], Scalar]
    loss_here: Callable[[], Scalar]
    slope: Scalar
    quadratic: Scalar
    kl_curvature: float
    upper: Scalar


class RadiusRule(abc.ABC):
    """A rule given as `max_kl`: finds the length of a step from its KL and its loss."""

    @abc.abstractmethod
    def search(self, line: SearchLine) -> TrustRegionResult:
        """The length of the step along `line`."""


class RateRule(abc.ABC):
    """A rule given as `learning_rate`: chooses the step itself from the direction.

    Attributes:
      uses_previous: whether `combine` uses the last step.
    """

    uses_previous = True

    @abc.abstractmethod
    def combine(
        self,
        fisher: Any,
        gradient: PyTree,
        direction: PyTree,
        pushed: PyTree | None,
        previous: PyTree | None,
        damping: Scalar,
    ) -> tuple[PyTree, PyTree]:
        """The step D of θ ← θ - D, and J D.

        Args:
          fisher: F.
          gradient: g.
          direction: d.
          pushed: J d, if it is known.
          previous: the last step, if `uses_previous`.
          damping: λ.
        """


def quadratic_step_scale(quadratic: ArrayLike, max_kl: ArrayLike) -> Scalar:
    """The scale s = √(2·max_kl / q) with ½ s² q = max_kl; 1 where q is not positive.

    Args:
      quadratic: q = dᵀFd, or the multiple of it with which the KL actually grows.
      max_kl: the radius, in nats per example.

    Example:
      >>> quadratic_step_scale(2.0, 0.01).round(3)
      Array(0.1, dtype=float32, weak_type=True)

    References:
      Schulman et al., Trust region policy optimization, 2015, appendix C.
    """
    quadratic = jnp.asarray(quadratic)
    # A q that has overflowed calls for a short step, not for none.
    largest = jnp.finfo(jnp.promote_types(quadratic.dtype, jnp.float32)).max
    quadratic = jnp.minimum(quadratic, float(largest))
    positive = quadratic > 0
    # Two roots, so that neither quotient nor product leaves the range of float32.
    root = jnp.sqrt(jnp.where(positive, quadratic, 1.0))
    scale = jnp.sqrt(2 * jnp.asarray(max_kl)) / root
    return jnp.where(positive & jnp.isfinite(scale), scale, 1.0)


def first_trial(
    quadratic: ArrayLike, max_kl: ArrayLike, upper: ArrayLike = jnp.inf
) -> Scalar:
    """Where to start `search_kl_radius`: just inside the radius by the model.

    It starts at `upper` if that is within the radius by the quadratic model, since a
    single trial there settles the search.
    """
    guess = jnp.sqrt(_AIM) * quadratic_step_scale(quadratic, max_kl)
    guess = jnp.maximum(guess, jnp.finfo(guess.dtype).tiny)  # 0 would be no trial
    return jnp.where(jnp.asarray(upper) <= 2 * guess, upper, guess)


class _Search(NamedTuple):
    """The next trial, and the trials closest to the radius on either side.

    `low_excess` and `high_excess` are log(KL / aim) there, as Anderson and Björck
    weigh them; `last_inside` says on which side the last trial was, and `slope` is that
    assumed for log KL over log s if none was inside.
    """

    scale: Scalar
    low: Scalar
    low_kl: Scalar
    low_excess: Scalar
    high: Scalar
    high_excess: Scalar
    last_inside: Array
    slope: Scalar
    num_trials: Array
    done: Array


def search_kl_radius(
    kl_fn: Callable[[Scalar], Scalar],
    *,
    start: ArrayLike,
    max_kl: ArrayLike,
    upper: ArrayLike = jnp.inf,
    max_evaluations: int = _MAX_EVALUATIONS,
) -> TrustRegionResult:
    """Finds s in (0, upper] with KL(s) in [0.92, 1]·max_kl, or KL(upper) ≤ max_kl.

    The result is the longest trial whose KL was within the radius, and so never above
    it. NaN and infinity count as outside. log KL is nearly linear in log s (slope 2 for
    short steps, towards 1 for long ones), so secants in logarithms, weighted as by
    Anderson and Björck where they approach from one side only, need two or three trials
    on a smooth model.

    Args:
      kl_fn: s -> measured mean KL of the step of length s, 0 at s = 0.
      start: the first trial; 0 means no step and no trial.
      max_kl: the radius, in nats per example.
      upper: the longest step to try.
      max_evaluations: the most trials to make.

    Example:
      >>> result = search_kl_radius(lambda s: 3.0 * s**2, start=1.0, max_kl=0.01)
      >>> bool(0.92 * 0.01 <= result.kl <= 0.01), int(result.num_kl_evaluations)
      (True, 3)

    References:
      Anderson and Björck, A new high order method of regula falsi type for computing a
      root of an equation, 1973.
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
        excess = jnp.log(kl / (_AIM * max_kl))
        # A second trial in a row on one side: the other end pulls with less weight.
        again = (inside == state.last_inside) & (state.num_trials > 0)
        before = jnp.where(inside, state.low_excess, state.high_excess)
        weight = 1 - excess / before
        weight = jnp.where(again, jnp.where(weight > 0, weight, 0.5), 1.0)
        # The slope between two trials outside: on a plateau just beyond the radius the
        # assumed one would make the trials creep.
        slope = (state.high_excess - excess) / jnp.log(state.high / s)
        slope = jnp.clip(slope, _LEAST_SLOPE, _SHRINKING_SLOPE)
        new = _Search(
            scale=s,
            low=jnp.where(inside, s, state.low),
            low_kl=jnp.where(inside, kl, state.low_kl),
            low_excess=jnp.where(inside, excess, weight * state.low_excess),
            high=jnp.where(inside, state.high, s),
            high_excess=jnp.where(inside, weight * state.high_excess, excess),
            last_inside=inside,
            slope=jnp.where(jnp.isfinite(slope), slope, _SHRINKING_SLOPE),
            num_trials=state.num_trials + 1,
            done=inside & ((kl >= _FILL * max_kl) | (s >= upper)),
        )
        return new._replace(scale=jnp.minimum(_next_trial(new), upper))

    def running(state: _Search) -> Array:
        return ~state.done & (state.num_trials < max_evaluations)

    zero = jnp.zeros((), dtype)
    infinity = jnp.asarray(jnp.inf, dtype)
    state = _Search(
        scale=jnp.minimum(start, upper),
        low=zero,
        low_kl=zero,
        low_excess=-infinity,
        high=infinity,
        high_excess=infinity,
        last_inside=jnp.asarray(False),
        slope=jnp.asarray(_SHRINKING_SLOPE, dtype),
        num_trials=jnp.zeros((), jnp.int32),
        done=~(start > 0),
    )
    state = jax.lax.while_loop(running, body, state)
    is_none = start == 0
    return TrustRegionResult(
        scale=state.low,
        kl=state.low_kl,
        num_kl_evaluations=state.num_trials,
        found=(state.low > 0) | is_none,
        filled=(state.low_kl >= _SHORT * max_kl) | (state.low >= upper) | is_none,
    )


def _next_trial(state: _Search) -> Scalar:
    """Every trial lies between `low` and `high`, so the two close in on the radius."""
    growth = jnp.minimum(jnp.exp(-state.low_excess / 2), _LARGEST_GROWTH)
    shrink = jnp.exp(-state.high_excess / state.slope)
    shrink = jnp.maximum(shrink, _LARGEST_SHRINK)
    # The secant of log KL over log s as a fraction of the way; halfway without one.
    fraction = state.low_excess / (state.low_excess - state.high_excess)
    is_usable = jnp.isfinite(state.low_excess) & jnp.isfinite(state.high_excess)
    fraction = jnp.where(is_usable, jnp.clip(fraction, _MARGIN, 1 - _MARGIN), 0.5)
    between = state.low * jnp.exp(fraction * jnp.log(state.high / state.low))
    return jnp.where(
        state.low == 0,
        state.high * shrink,
        jnp.where(jnp.isinf(state.high), state.low * growth, between),
    )


@dataclasses.dataclass(frozen=True)
class SufficientDecrease:
    """Takes a step only if the loss falls by a fraction of what the gradient promises.

        f(θ) - f(θ - s d) ≥ c · s gᵀd

    A step that fails is halved, and its KL measured again, until one passes; after
    `max_halvings` it is refused. The quadratic model allows for curvature and so
    promises less than the gradient, but its curvature is that of the metric: for a loss
    with a different one (the surrogate of a policy gradient, whose Hessian is not F),
    it may predict a rise where there is none. Written without a division, so that NaN
    fails.

    Attributes:
      fraction: c in [0, 1): the least part of the promised decrease.
      max_halvings: 0 refuses a failing step at once, so that every step taken has the
        KL that was asked for.

    Example:
      >>> rule = SufficientDecrease(fraction=0.1)
      >>> bool(rule.accepts(decrease=0.5, promised=1.0))
      True
      >>> bool(rule.accepts(decrease=float("nan"), promised=1.0))
      False

    References:
      Armijo, Minimization of functions having Lipschitz continuous first partial
      derivatives, 1966; Schulman et al., Trust region policy optimization, 2015,
      appendix C, whose authors' code has c = 0.1 and 10 halvings.
    """

    fraction: float = 0.1
    max_halvings: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ValueError(f"`fraction` must be in [0, 1), got {self.fraction}.")
        halvings = self.max_halvings
        if isinstance(halvings, bool) or not isinstance(halvings, int):
            raise TypeError(f"`max_halvings` must be an integer, got {halvings!r}.")
        if halvings < 0:
            raise ValueError(f"`max_halvings` must not be negative, got {halvings}.")

    def accepts(self, *, decrease: ArrayLike, promised: ArrayLike) -> Array:
        """Whether f(θ) - f(θ - s d) is enough of the promised s gᵀd."""
        return jnp.asarray(decrease) >= self.fraction * jnp.asarray(promised)

    def shorten(
        self, step: TrustRegionResult, line: SearchLine, max_kl: ArrayLike
    ) -> tuple[TrustRegionResult, Array]:
        """The longest of s, s/2, s/4, ... that is accepted and within the radius.

        Args:
          step: s, within the radius, with its KL.
          line: the direction.
          max_kl: the radius in nats per example, infinite for none.

        Returns:
          The step, and whether it is accepted; a step that fails is the shortest.
        """
        before = line.loss_here()

        def is_accepted(scale: Scalar) -> Array:
            decrease = before - line.loss_fn(scale)
            return self.accepts(decrease=decrease, promised=scale * line.slope)

        def body(carry: tuple[TrustRegionResult, Array, Array]) -> tuple:
            step, count, _ = carry
            scale = step.scale / 2
            kl = jnp.asarray(line.kl_fn(scale)).astype(step.kl.dtype)
            count_of_kl = step.num_kl_evaluations + 1
            shorter = step._replace(scale=scale, kl=kl, num_kl_evaluations=count_of_kl)
            return shorter, count + 1, is_accepted(scale) & (kl <= max_kl)

        def running(carry: tuple[TrustRegionResult, Array, Array]) -> Array:
            _, count, accepted = carry
            return ~accepted & (count < self.max_halvings)

        accepted = is_accepted(step.scale)
        if not self.max_halvings:
            return step, accepted
        # There is nothing to shorten if the search has found no step at all.
        start = (step, jnp.zeros((), jnp.int32), accepted | ~step.found)
        step, _, accepted = jax.lax.while_loop(running, body, start)
        return step, accepted
