"""Damping λ in (F + λI) d = g: constants, schedules, relative, Levenberg-Marquardt.

λ is in units of F as this library defines it, a mean over examples without a factor ½.
A library that sums over N examples needs N times the number, one whose matrix is half
or twice ours half or twice.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from ngd_jax.types import Array, ArrayLike, Scalar

__all__ = ["LevenbergMarquardt", "RelativeDamping"]


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"`{name}` must be positive and finite, got {value}.")


@dataclasses.dataclass(frozen=True)
class RelativeDamping:
    """λ = ratio · tr(F) / P: damping in units of the mean eigenvalue of F.

    Follows the scale of the model, so that one number serves outputs in any units.
    The trace is exact, so a step costs about as many more backward passes as an
    example has outputs; see `Fisher.diagonal`.

    Attributes:
      ratio: positive.

    Example:
      >>> RelativeDamping(1e-3)
      RelativeDamping(ratio=0.001)
    """

    ratio: float

    def __post_init__(self) -> None:
        _check_positive("ratio", self.ratio)

    def value(self, fisher: Any, num_parameters: int) -> Scalar:
        """λ for `fisher`."""
        return self.ratio * fisher.trace() / num_parameters


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    """Adapts λ by how well the quadratic model foretold the reduction of the loss.

        ρ = (f(θ) - f(θ + δ)) / (-gᵀδ - ½ δᵀFδ)

    λ grows by `increase` where ρ < `low` (or is not a number) and shrinks by `decrease`
    where ρ > `high`. The tests are written without the division, so that NaN counts as
    the worst outcome. A step with ρ < `reject` is refused: parameters stay, λ grows.

    Attributes:
      initial: λ of the first step.
      increase: factor above 1.
      decrease: factor below 1.
      low: ρ below which λ grows.
      high: ρ above which λ shrinks.
      reject: ρ below which the step is refused; minus infinity refuses none.
      minimum: λ never falls below.
      maximum: λ never rises above.

    Example:
      >>> rule = LevenbergMarquardt(initial=1.0)
      >>> float(rule.update(1.0, actual=0.9, predicted=1.0))  # ρ = 0.9: relax
      0.666...
      >>> float(rule.update(1.0, actual=float("nan"), predicted=1.0))
      1.5

    References:
      Martens, Deep learning via Hessian-free optimization, 2010, section 4.1: factors
      3/2 and 2/3 at ratios 1/4 and 3/4.
    """

    initial: float = 1.0
    increase: float = 3 / 2
    decrease: float = 2 / 3
    low: float = 1 / 4
    high: float = 3 / 4
    reject: float = 0.0
    minimum: float = 1e-8
    maximum: float = 1e8

    def __post_init__(self) -> None:
        for name in ("initial", "increase", "decrease", "minimum", "maximum"):
            _check_positive(name, getattr(self, name))
        if not self.increase > 1:
            raise ValueError(f"`increase` must be above 1, got {self.increase}.")
        if not self.decrease < 1:
            raise ValueError(f"`decrease` must be below 1, got {self.decrease}.")
        if not self.reject <= self.low < self.high:
            raise ValueError(
                f"`reject` ≤ `low` < `high` must hold, got {self.reject}, {self.low}, "
                f"{self.high}."
            )
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"`initial` must lie between `minimum` and `maximum`, got "
                f"{self.initial} outside of [{self.minimum}, {self.maximum}]."
            )

    def update(
        self, damping: ArrayLike, *, actual: ArrayLike, predicted: ArrayLike
    ) -> Array:
        """The next λ.

        Args:
          damping: the present λ.
          actual: f(θ) - f(θ + δ).
          predicted: -gᵀδ - ½ δᵀFδ.
        """
        actual, predicted = jnp.asarray(actual), jnp.asarray(predicted)
        # A step so long that the model itself foretells a rise was too long.
        grow = ~(actual >= self.low * predicted) | (predicted < 0)
        shrink = actual > self.high * predicted
        factor = jnp.where(grow, self.increase, jnp.where(shrink, self.decrease, 1.0))
        return jnp.clip(damping * factor, self.minimum, self.maximum)

    def accepts(self, *, actual: ArrayLike, predicted: ArrayLike) -> Array:
        """Whether the step is kept."""
        if self.reject == -math.inf:
            return jnp.asarray(True)
        return jnp.asarray(actual) >= self.reject * jnp.asarray(predicted)
