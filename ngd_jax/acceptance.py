"""Whether a step is taken, by what it did to the loss: sufficient decrease.

    f(θ) - f(θ - s d) ≥ c · s gᵀd

The right side is a part of what the gradient promises. The quadratic model promises
less, f being curved, but its curvature is that of the metric: for a loss with another
one (the surrogate of a policy gradient, whose Hessian is not F) it may foretell a rise
where there is none. Knows nothing of Optax.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ngd_jax.trust_region import TrustRegionResult
from ngd_jax.types import Array, ArrayLike, Scalar

__all__ = ["SufficientDecrease"]


@dataclasses.dataclass(frozen=True)
class SufficientDecrease:
    """Takes a step only where the loss falls by a part of what the gradient promises.

    A step that fails is halved, and its KL measured anew, until one does; after
    `max_halvings` it is refused. Written without a division, so that NaN fails.

    Attributes:
      fraction: c in [0, 1): the least part of the promised decrease.
      max_halvings: 0 refuses a step that fails as it is, so that every step taken keeps
        the KL that was asked for.

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
        self,
        step: TrustRegionResult,
        *,
        decrease_fn: Callable[[Scalar], Scalar],
        slope: Scalar,
        kl_fn: Callable[[Scalar], Scalar],
        max_kl: ArrayLike,
    ) -> tuple[TrustRegionResult, Array]:
        """The longest of s, s/2, s/4, ... that is accepted and within the radius.

        Args:
          step: s, within the radius, with its KL.
          decrease_fn: s -> f(θ) - f(θ - s d).
          slope: gᵀd.
          kl_fn: s -> measured mean KL.
          max_kl: the radius in nats per example, infinite for none.

        Returns:
          The step, and whether it is accepted; a step that is not is the shortest one.
        """

        def judge(scale: Scalar) -> Array:
            return self.accepts(decrease=decrease_fn(scale), promised=scale * slope)

        def body(carry: tuple[TrustRegionResult, Array, Array]) -> tuple:
            step, count, _ = carry
            scale = step.scale / 2
            kl = jnp.asarray(kl_fn(scale)).astype(step.kl.dtype)
            shorter = TrustRegionResult(
                scale, kl, step.num_kl_evaluations + 1, step.found
            )
            return shorter, count + 1, judge(scale) & (kl <= max_kl)

        def running(carry: tuple[TrustRegionResult, Array, Array]) -> Array:
            _, count, accepted = carry
            return ~accepted & (count < self.max_halvings)

        accepted = judge(step.scale)
        if not self.max_halvings:
            return step, accepted
        # Nothing to shorten where the search has found no step at all.
        start = (step, jnp.zeros((), jnp.int32), accepted | ~step.found)
        step, _, accepted = jax.lax.while_loop(running, body, start)
        return step, accepted
