"""Whether a step is taken, and what the damping learns from it."""

import jax.numpy as jnp

from ngd_jax.damping import LevenbergMarquardt
from ngd_jax.solvers import SolverInfo, SolverStatus
from ngd_jax.transform.state import StepStatus
from ngd_jax.trust_region import TrustRegionResult
from ngd_jax.types import Array, Scalar

__all__ = ["adapt_damping", "judge"]


def judge(
    *,
    gradient_size: Scalar,
    value: Scalar | None,
    solver_info: SolverInfo,
    is_zero: Array,
    step: TrustRegionResult,
    has_radius: bool,
    accepted: Array,
) -> Array:
    """The `StepStatus` of a step.

    Args:
      gradient_size: the largest entry of the gradient.
      value: the loss, if it was handed in.
      solver_info: how the solve went.
      is_zero: whether the direction is zero.
      step: its length.
      has_radius: whether the KL was to be within a radius, not only finite.
      accepted: whether the loss fell by enough.
    """
    missed = StepStatus.RADIUS_NOT_MET if has_radius else StepStatus.NON_FINITE_KL
    value_is_finite = True if value is None else jnp.all(jnp.isfinite(value))
    # The first that applies is the cause; those after it are consequences.
    causes = [
        (~jnp.isfinite(gradient_size), StepStatus.NON_FINITE_GRADIENT),
        (~jnp.asarray(value_is_finite), StepStatus.NON_FINITE_VALUE),
        (solver_info.status == SolverStatus.NON_FINITE, StepStatus.NON_FINITE_MODEL),
        (is_zero & (gradient_size > 0), StepStatus.NO_DIRECTION),
        (~step.found, missed),
        (~accepted, StepStatus.NO_REDUCTION),
    ]
    conditions, statuses = zip(*causes, strict=True)
    return jnp.select(
        conditions, [jnp.int32(s) for s in statuses], jnp.int32(StepStatus.TAKEN)
    )


def adapt_damping(
    rule: LevenbergMarquardt,
    damping: Scalar,
    status: Array,
    *,
    actual: Scalar,
    predicted: Scalar,
    count: Array,
) -> tuple[Array, Scalar]:
    """The status after weighing the reduction, and the damping of the next step."""
    accepted = rule.accepts(actual=actual, predicted=predicted)
    refused = (status == StepStatus.TAKEN) & ~accepted
    adapted = rule.update(damping, actual=actual, predicted=predicted)
    is_due = (count + 1) % rule.every == 0
    adapted = jnp.where(is_due | ~accepted, adapted, damping)
    status = jnp.where(refused, StepStatus.NO_REDUCTION, status).astype(jnp.int32)
    return status, adapted.astype(damping.dtype)
