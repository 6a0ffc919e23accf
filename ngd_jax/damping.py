"""Damping λ in (F + λI) d = g: relative, Levenberg-Marquardt, in other coordinates.

    λ = ratio · tr F / P,    λ by actual against predicted reduction,    λD for λI

λ is in units of F as this library defines it, a mean over examples without a factor ½.
A library that sums over N examples needs N times the number; one whose matrix is half
or twice ours needs half or twice the number.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from ngd_jax import dense, tree
from ngd_jax.fisher import Fisher
from ngd_jax.metric import check_count
from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = ["CovariantDamping", "LevenbergMarquardt", "RelativeDamping"]


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"`{name}` must be positive and finite, got {value}.")


@dataclasses.dataclass(frozen=True)
class RelativeDamping:
    """λ = ratio · tr(F) / P: damping in units of the mean eigenvalue of F.

    Follows the scale of the model, so that one number serves outputs in any units.
    The trace is exact, so a step costs about one more backward pass for each output of
    an example; see `fisher_diagonal`.

    Attributes:
      ratio: positive.

    Example:
      >>> RelativeDamping(1e-3)
      RelativeDamping(ratio=0.001)
    """

    ratio: float

    def __post_init__(self) -> None:
        _check_positive("ratio", self.ratio)

    def value(self, fisher: Any) -> Scalar:
        """λ for `fisher`."""
        diagonal = dense.diagonal(fisher)
        return self.ratio * jnp.sum(diagonal) / max(1, diagonal.size)


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    """Adapts λ by how well the quadratic model predicted the reduction of the loss.

        ρ = (f(θ) - f(θ + δ)) / (-gᵀδ - ½ δᵀFδ)

    λ grows by `increase` where ρ < `low` (or is not a number) and shrinks by `decrease`
    where ρ > `high`. The tests are written without division, so that NaN counts as the
    worst outcome. A step with ρ < `reject` is refused: parameters stay, λ grows.

    Attributes:
      initial: λ of the first step.
      increase: factor above 1.
      decrease: factor below 1.
      low: ρ below which λ grows.
      high: ρ above which λ shrinks.
      reject: ρ below which the step is refused; minus infinity refuses none.
      minimum: λ never falls below.
      maximum: λ never rises above.
      every: the number of steps taken between updates of λ; a refused step also updates
        it.

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
    every: int = 1

    def __post_init__(self) -> None:
        for name in ("initial", "increase", "decrease", "minimum", "maximum"):
            _check_positive(name, getattr(self, name))
        check_count("every", self.every)
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
        # If even the model predicts a rise, the step was too long.
        grow = ~(actual >= self.low * predicted) | (predicted < 0)
        shrink = actual > self.high * predicted
        factor = jnp.where(grow, self.increase, jnp.where(shrink, self.decrease, 1.0))
        return jnp.clip(damping * factor, self.minimum, self.maximum)

    def accepts(self, *, actual: ArrayLike, predicted: ArrayLike) -> Array:
        """Whether the step is kept."""
        if self.reject == -math.inf:
            return jnp.asarray(True)
        return jnp.asarray(actual) >= self.reject * jnp.asarray(predicted)


@dataclasses.dataclass(frozen=True, eq=False)
class CovariantDamping:
    """Damping λD in place of λI, with a metric D that follows the parameters.

        (F + λD) d = g,    D = S⁻ᵀ S⁻¹,    S = diag(scales), or any linear map

    λI treats all parameters as if they were measured in one unit, and so depends on how
    the network is parametrised. With D you say what a change of size one is: the
    damping treats the coordinates φ, with θ = S φ, as equal. Reparametrise the network
    as θ' = T θ with S' = T S, and the step changes the network's function in exactly
    the same way.

    Attributes:
      damping: λ: a number, a schedule, a `RelativeDamping` or a `LevenbergMarquardt`.
      scales: a tree of the structure of the parameters, of positive arrays that
        broadcast to them: the size of a typical change of each. Or S itself, a linear
        function from trees shaped like the parameters to such trees.

    Example:
      Weights of a first layer whose second input is measured in thousandths:

      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> rule = ngd.CovariantDamping(1e-3, scales={"w": jnp.array([[1.0], [1e-3]])})

    References:
      Martens, New insights and perspectives on the natural gradient method, 2020,
      section 13 (damping and invariance).
    """

    damping: Any
    scales: PyTree | Callable[[PyTree], PyTree]

    def __post_init__(self) -> None:
        if isinstance(self.damping, CovariantDamping):
            raise TypeError("`damping` of CovariantDamping must not be another one.")
        if callable(self.scales):
            return
        for path, leaf in jax.tree.leaves_with_path(self.scales):
            is_known = not isinstance(leaf, jax.core.Tracer)
            if is_known and not (np.asarray(leaf) > 0).all():
                raise ValueError(
                    f"`scales` must be positive: at "
                    f"{jax.tree_util.keystr(path) or 'the root'} got {leaf}."
                )

    def params_from(self, coordinates: PyTree) -> PyTree:
        """S φ."""
        if callable(self.scales):
            return self.scales(coordinates)
        return jax.tree.map(
            lambda scale, leaf: jnp.asarray(scale, leaf.dtype) * leaf,
            self.scales,
            coordinates,
        )

    def coordinates(self, fisher: Fisher) -> Fisher:
        """The Fisher in the coordinates φ, in which this damping is λI.

        Raises:
          ValueError: at trace time, if the structure of the scales differs from that of
            the parameters, or they do not broadcast to them.
        """
        wide = tree.zeros_like_wide(fisher.params)
        scales = None if callable(self.scales) else self.scales
        if scales is not None:
            # Scales broadcast, so only their structure has to match.
            structures = (jax.tree.map(lambda _: 0, one) for one in (scales, wide))
            tree.check_like(*structures, name="scales", like_name="params")
        moved = jax.eval_shape(self.params_from, wide)
        tree.check_like(moved, wide, name="scales", like_name="params")
        return fisher.in_coordinates(self.params_from, scales)
