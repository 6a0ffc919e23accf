"""A KL radius in units of the loss, for losses that tend to zero.

    max_kl = fraction · f(θ),    s ≤ the learning rate

For least squares, f = ½ |r|² and KL = ½ |Δr|²: no step changes the residuals by more
than √fraction of their size, whether they are 10 or 10⁻⁶. Knows nothing of Optax.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ngd_jax.trust_region import (
    RadiusRule,
    SearchLine,
    TrustRegionResult,
    first_trial,
    search_kl_radius,
)
from ngd_jax.types import Array, Scalar

__all__ = ["RelativeRadius"]


@dataclasses.dataclass(frozen=True)
class RelativeRadius(RadiusRule):
    """A `max_kl` rule: a radius that follows the loss, but for steps that prove good.

        1. s = rate, rate/2, ..., rate/2^max_halvings:  take the first with
           f(θ) - f(θ - s d) ≥ sufficient · (s gᵀd - ½ s² dᵀFd),
        2. else the longest s ≤ rate whose measured KL is within fraction · f(θ).

    Far from a solution the second rule acts, and the loss need not fall: a descent that
    must lower the loss in every step creeps along the first narrow valley that it
    meets, whereas a path of bounded speed, that of the Gauss-Newton flow, goes on to
    where the metric has a higher rank. Close to a solution the first rule acts, and
    steps are full steps.

    So the KL of a step is at most fraction · f(θ) only if the first rule found no step.

    Attributes:
      fraction: the radius in units of f(θ), which must be positive: a squared error,
        or another loss whose least value is zero. With ½ mean r² as the loss, as suits
        `Gaussian`, 0.01 lets the residuals change by a tenth.
      sufficient: in (0, 1], or infinity for the second rule alone.
      max_halvings: the number of shorter steps that the first rule tries.

    Example:
      >>> import ngd_jax as ngd
      >>> model_fn = lambda w, x: x @ w
      >>> tx = ngd.natural_gradient(
      ...     1.0,
      ...     model_fn,
      ...     ngd.Gaussian(),
      ...     max_kl=ngd.contrib.RelativeRadius(0.01),
      ...     loss_fn=lambda outputs, batch: (outputs**2).mean() / 2,
      ... )

    References:
      Conn, Gould and Toint, Trust-region methods, 2000, section 6.1 (actual against
      predicted reduction); Transtrum and Sethna, Improvements to the
      Levenberg-Marquardt algorithm for nonlinear least-squares minimization, 2012,
      section 4 (accepting uphill steps).
    """

    fraction: float = 0.01
    sufficient: float = 0.25
    max_halvings: int = 2

    def __post_init__(self) -> None:
        if not (self.fraction > 0 and math.isfinite(self.fraction)):
            raise ValueError(
                f"`fraction` must be positive and finite, got {self.fraction}."
            )
        if not (0 < self.sufficient <= 1 or self.sufficient == math.inf):
            raise ValueError(
                f"`sufficient` must be in (0, 1] or infinity, got {self.sufficient}."
            )
        halvings = self.max_halvings
        if isinstance(halvings, bool) or not isinstance(halvings, int) or halvings < 0:
            raise ValueError(
                f"`max_halvings` must be an integer of at least 0, got {halvings!r}."
            )

    def search(self, line: SearchLine) -> TrustRegionResult:
        """The length of the step; see the class."""
        upper, loss = line.upper, line.loss_here()

        def by_radius() -> TrustRegionResult:
            max_kl = (self.fraction * loss).astype(line.quadratic.dtype)
            start = first_trial(line.kl_curvature * line.quadratic, max_kl, upper)
            return search_kl_radius(
                line.kl_fn,
                start=jnp.where(upper > 0, start, 0.0),
                max_kl=max_kl,
                upper=upper,
            )

        if self.sufficient == math.inf:
            return by_radius()

        def is_enough(scale: Scalar) -> Array:
            predicted = scale * line.slope - scale**2 * line.quadratic / 2
            decrease = loss - line.loss_fn(scale)
            # Without a division: NaN, and a model that predicts a rise, fail.
            return (decrease >= self.sufficient * predicted) & (predicted > 0)

        def shorter(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            count, _ = carry
            return count + 1, is_enough(upper * 0.5 ** (count + 1).astype(upper.dtype))

        def running(carry: tuple[Array, Array]) -> Array:
            count, found = carry
            return ~found & (count < self.max_halvings)

        start = (jnp.zeros((), jnp.int32), is_enough(upper))
        count, found = jax.lax.while_loop(running, shorter, start)
        scale = upper * 0.5 ** count.astype(upper.dtype)

        def as_found() -> TrustRegionResult:
            kl = jnp.asarray(line.kl_fn(scale))
            one, yes = jnp.ones((), jnp.int32), jnp.asarray(True)
            return TrustRegionResult(scale, kl, one, jnp.isfinite(kl), yes)

        like = jax.eval_shape(by_radius)
        return jax.lax.cond(
            found,
            lambda: jax.tree.map(lambda x, t: x.astype(t.dtype), as_found(), like),
            by_radius,
        )
