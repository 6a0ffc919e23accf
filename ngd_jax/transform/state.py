"""What a step keeps for the next one, and what it reports about itself."""

import enum
from typing import NamedTuple

import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.solvers.protocol import SolverInfo
from ngd_jax.types import Array, Params, PyTree

__all__ = [
    "NaturalGradientInfo",
    "NaturalGradientState",
    "StepStatus",
    "initial_state",
]


class StepStatus(enum.IntEnum):
    """The outcome of a step; `message` puts it into words.

    Example:
      >>> StepStatus(0).name, StepStatus(1).message
      ('TAKEN', 'Refused: the gradient is not finite.')
    """

    TAKEN = 0
    NON_FINITE_GRADIENT = 1
    NON_FINITE_MODEL = 2
    NO_DIRECTION = 3
    NON_FINITE_KL = 4
    RADIUS_NOT_MET = 5
    NON_FINITE_VALUE = 6
    NO_REDUCTION = 7
    NON_FINITE_UPDATE = 8
    TAKEN_SHORT = 9

    @property
    def message(self) -> str:
        """The status as a sentence."""
        return _MESSAGES[self]

    @property
    def is_taken(self) -> bool:
        """Whether the step was taken."""
        return self in (StepStatus.TAKEN, StepStatus.TAKEN_SHORT)


_MESSAGES = {
    StepStatus.TAKEN: "The step was taken.",
    StepStatus.NON_FINITE_GRADIENT: "Refused: the gradient is not finite.",
    StepStatus.NON_FINITE_MODEL: (
        "Refused: the outputs of the model or their derivatives are not finite on this "
        "batch, or, with solvers that take examples one by one (SampleSpace, SVD), on "
        "one of its examples alone."
    ),
    StepStatus.NO_DIRECTION: (
        "Refused: the solver found no direction; its own status says why."
    ),
    StepStatus.NON_FINITE_KL: (
        "Refused: the KL of the step is not finite. Set max_kl, or a smaller learning "
        "rate."
    ),
    StepStatus.RADIUS_NOT_MET: (
        "Refused: no step with a KL within max_kl was found in ten evaluations."
    ),
    StepStatus.NON_FINITE_VALUE: "Refused: the loss handed in as value is not finite.",
    StepStatus.NO_REDUCTION: (
        "Refused: the loss did not fall as predicted. LevenbergMarquardt has raised "
        "the damping; SufficientDecrease leaves everything as it was."
    ),
    StepStatus.NON_FINITE_UPDATE: (
        "Refused: the update, or the parameters after it, would not be finite. Set "
        "max_kl, or a smaller learning rate."
    ),
    StepStatus.TAKEN_SHORT: (
        "The step was taken, but is shorter than asked for: the search for the radius "
        "ended below 0.9 of max_kl after ten evaluations."
    ),
}


class NaturalGradientInfo(NamedTuple):
    """How the last update went; the next one does not need it.

    Get it out of any chain with `optax.tree.get(opt_state, "NaturalGradientInfo")`.

    Attributes:
      solver: `SolverInfo` of the solve.
      predicted_kl: ½ s² dᵀFd, the KL of the step by the quadratic model, in nats.
      measured_kl: the mean KL(θ ‖ θ + update) measured on the batch, in nats per
        example, at the parameters as `optax.apply_updates` will leave them, in their
        dtype; 0 for a refused step.
      step_scale: s in update = -s d; 0 for a refused step. For a solver that chooses
        the length itself, that length times the scale.
      damping: the λ that was used, or that the solver chose.
      num_kl_evaluations: int32, forward passes spent on measuring KL.
      status: int32, a `StepStatus`.
    """

    solver: SolverInfo
    predicted_kl: Array
    measured_kl: Array
    step_scale: Array
    damping: Array
    num_kl_evaluations: Array
    status: Array


class NaturalGradientState(NamedTuple):
    """The state that the next update needs.

    A refused step leaves the parameters, `count`, `direction` and all schedules as they
    were. `damping` still changes if a step is refused because of the loss, and
    `solver_state` always does: it averages over all batches seen, whatever the outcome
    of the step, and values that are not finite never enter it.

    Attributes:
      count: int32, steps taken; schedules are evaluated at it.
      direction: the last natural direction d, float32 or wider, for momentum and warm
        starts: zero before the first step, () if neither is used. If the step was
        shortened, d is shortened with it, so that the update was -rate·d. In
        the coordinates of `CovariantDamping` if there is one; under a rule for the
        learning rate, the last step itself.
      damping: the λ of the next step under `LevenbergMarquardt`, else that of the last.
      solver_state: what the solver keeps, such as a preconditioner; () for most.
      info: how the last update went, a `NaturalGradientInfo`.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    direction: PyTree
    damping: Array
    solver_state: PyTree
    info: NaturalGradientInfo


def initial_state(
    params: Params, *, damping: float, keeps_direction: bool, solver_state: PyTree
) -> NaturalGradientState:
    """The state before the first step; `params` may have no leaves."""
    dtype = tree.accumulator_dtype(params)

    # Every entry has its own buffer, since the state may be donated.
    def number() -> Array:
        return jnp.zeros((), dtype)

    def integer() -> Array:
        return jnp.zeros((), jnp.int32)

    return NaturalGradientState(
        count=integer(),
        direction=tree.zeros_like_wide(params) if keeps_direction else (),
        damping=jnp.full((), damping, dtype),
        solver_state=solver_state,
        info=NaturalGradientInfo(
            solver=SolverInfo(integer(), number(), integer()),
            predicted_kl=number(),
            measured_kl=number(),
            step_scale=number(),
            damping=number(),
            num_kl_evaluations=integer(),
            status=integer(),
        ),
    )
