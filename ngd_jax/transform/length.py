"""How far a step goes along its direction: rate, radius and acceptance together."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.fisher import Fisher
from ngd_jax.quadratic_model import QuadraticModelRate
from ngd_jax.relative_radius import RelativeRadius
from ngd_jax.transform.schedule import value_at
from ngd_jax.trust_region import TrustRegionResult, first_trial, search_kl_radius
from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = ["Course", "StepLength", "make_course"]


class Course(NamedTuple):
    """The direction in units of its largest entry, and what is known along it.

    Squares of the direction itself could over- or underflow.

    Attributes:
      direction: d / unit.
      unit: the largest entry of d; 1 where that is no use as a divisor.
      is_zero: whether d is zero.
      slope: gᵀd / unit.
      quadratic: dᵀFd / unit².
    """

    direction: PyTree
    unit: Scalar
    is_zero: Array
    slope: Scalar
    quadratic: Scalar


def make_course(
    fisher: Fisher, gradient: PyTree, direction: PyTree, image: PyTree | None
) -> Course:
    """The course along `direction`, d in the coordinates of the parameters.

    Args:
      fisher: F.
      gradient: g.
      direction: d.
      image: J d, or None where nobody knows it.
    """
    direction, unit, largest = tree.in_units(direction)
    if image is None:
        quadratic = fisher.quadratic(direction)
    else:
        image = tree.divide(image, unit)
        quadratic = jnp.maximum(fisher.inner(image, image), 0.0)
    return Course(
        direction, unit, largest == 0, tree.vdot(gradient, direction), quadratic
    )


@dataclasses.dataclass(frozen=True)
class StepLength:
    """The rules for the length of step `count`.

    Attributes:
      options: the arguments of `natural_gradient`.
      count: steps taken so far; what schedules are evaluated at.
    """

    options: Any
    count: Array

    @property
    def kl_curvature(self) -> float:
        """The Hessian of the KL in units of the metric: 1 but for wave functions."""
        return getattr(self.options.likelihood, "kl_curvature", 1.0)

    def first_trial(self, quadratic: Scalar, unit: ArrayLike = 1.0) -> Scalar:
        """The length that the quadratic model foretells, in units of `unit`."""
        rate = self._rate(jnp.asarray(unit, quadratic.dtype))
        radius = self._radius()
        if radius is None:
            return rate
        radius = jnp.asarray(radius).astype(quadratic.dtype)
        return first_trial(self.kl_curvature * quadratic, radius, rate)

    def search(
        self,
        course: Course,
        *,
        kl_fn: Callable[[Scalar], Scalar],
        loss_fn: Callable[[Scalar], Scalar],
        loss_here: Callable[[], Scalar],
    ) -> tuple[TrustRegionResult, Array]:
        """The length in units of `course.unit`, and whether the step is acceptable.

        Args:
          course: the direction.
          kl_fn: s -> measured mean KL of a step of length s.
          loss_fn: s -> the loss after it.
          loss_here: the loss before it; called only where a rule asks for the loss.
        """
        max_kl, acceptance = self.options.max_kl, self.options.acceptance
        if isinstance(max_kl, RelativeRadius):
            step = max_kl.search(
                kl_fn,
                loss_fn,
                loss=loss_here(),
                slope=course.slope,
                quadratic=course.quadratic,
                kl_curvature=self.kl_curvature,
                upper=jnp.where(course.is_zero, 0.0, self._rate(course.unit)),
                max_evaluations=self.options.max_kl_evaluations,
            )
            return step, jnp.asarray(True)
        step = self._within_radius(course, kl_fn)
        if acceptance is None:
            return step, jnp.asarray(True)
        radius = self._radius()
        before = loss_here()
        return acceptance.shorten(
            step,
            decrease_fn=lambda scale: before - loss_fn(scale),
            slope=course.slope,
            kl_fn=kl_fn,
            max_kl=jnp.inf if radius is None else radius,
        )

    def _within_radius(
        self, course: Course, kl_fn: Callable[[Scalar], Scalar]
    ) -> TrustRegionResult:
        start = self.first_trial(course.quadratic, course.unit)
        radius = self._radius()
        if radius is None:
            kl = kl_fn(start)
            one = jnp.ones((), jnp.int32)
            return TrustRegionResult(start, kl, one, jnp.isfinite(kl))
        return search_kl_radius(
            kl_fn,
            start=jnp.where(course.is_zero, 0.0, start),
            max_kl=jnp.asarray(radius).astype(course.unit.dtype),
            upper=self._rate(course.unit),
            max_evaluations=self.options.max_kl_evaluations,
        )

    def _rate(self, unit: ArrayLike) -> Array:
        """The longest step that the learning rate allows, in units of `unit`."""
        rate = self.options.learning_rate
        if isinstance(rate, QuadraticModelRate):
            rate = 1.0
        rate = jnp.inf if rate is None else value_at(rate, self.count)
        return jnp.asarray(rate).astype(jnp.result_type(unit)) * unit

    def _radius(self) -> ArrayLike | None:
        """The radius, where it does not depend on the loss."""
        max_kl = self.options.max_kl
        if max_kl is None or isinstance(max_kl, RelativeRadius):
            return None
        return value_at(max_kl, self.count)
