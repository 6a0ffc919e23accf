"""One step of natural gradient descent, as Optax's `init` and `update`.

    1. linearise the model            F at θ
    2. solve                          (F + λI) d = g
    3. measure                        s, by the KL of θ - s d, and by the loss on demand
    4. judge                          refuse the step if anything is not finite

Nothing here iterates in Python, calls back to the host or raises at run time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.acceptance import SufficientDecrease
from ngd_jax.damping import CovariantDamping, LevenbergMarquardt, RelativeDamping
from ngd_jax.fisher import Fisher, Kind, linearize_fisher
from ngd_jax.fisher.linearization import adjoint
from ngd_jax.likelihoods import Likelihood
from ngd_jax.quadratic_model import QuadraticModelRate
from ngd_jax.relative_radius import RelativeRadius
from ngd_jax.solvers import Solver, StatefulSolver
from ngd_jax.solvers.interface import forward_only
from ngd_jax.transform.arguments import (
    check_options,
    check_params,
    refuse_multi_steps,
)
from ngd_jax.transform.direction import Direction, Hints, find_direction, rescale
from ngd_jax.transform.length import StepLength, make_course
from ngd_jax.transform.loss import WeighedLoss
from ngd_jax.transform.schedule import value_at
from ngd_jax.transform.state import (
    NaturalGradientInfo,
    NaturalGradientState,
    StepStatus,
    initial_state,
)
from ngd_jax.transform.verdict import adapt_damping, judge
from ngd_jax.types import (
    Array,
    Batch,
    KeyArray,
    ModelFn,
    Outputs,
    Params,
    PyTree,
    Scalar,
    ScalarOrSchedule,
)

__all__ = ["Damping", "NaturalGradientStep", "Radius", "Rate"]

Damping = ScalarOrSchedule | RelativeDamping | LevenbergMarquardt | CovariantDamping
Radius = ScalarOrSchedule | RelativeRadius | None
Rate = ScalarOrSchedule | QuadraticModelRate | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NaturalGradientStep:
    """The arguments of `natural_gradient`, checked, and the step that they define."""

    model_fn: ModelFn
    likelihood: Likelihood
    learning_rate: Rate
    sign: float
    max_kl: Radius
    damping: Damping
    solver: Solver
    kind: Kind
    momentum: ScalarOrSchedule
    warm_start: ScalarOrSchedule
    weights_fn: Callable[[Batch], PyTree] | None
    targets_fn: Callable[[Batch], PyTree] | None
    metric_batch_fn: Callable[[Batch], Batch] | None
    output_loss_fn: Callable[[Outputs, Batch], Scalar] | None
    microbatch_size: int | None
    max_kl_evaluations: int
    acceptance: SufficientDecrease | None
    key: KeyArray | None

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def rule(self) -> Any:
        """What sets λ, in whatever coordinates."""
        if isinstance(self.damping, CovariantDamping):
            return self.damping.damping
        return self.damping

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """The pair that Optax takes."""
        return optax.GradientTransformationExtraArgs(self.init, self.update)  # pyright: ignore[reportArgumentType]

    def init(self, params: Params) -> NaturalGradientState:
        """Optax's `init`."""
        refuse_multi_steps()
        check_params(params)
        rule, solver = self.rule, self.solver
        return initial_state(
            params,
            damping=rule.initial if isinstance(rule, LevenbergMarquardt) else 0.0,
            solver_state=(
                solver.init(params) if isinstance(solver, StatefulSolver) else ()
            ),
        )

    def update(
        self,
        updates: optax.Updates,
        state: NaturalGradientState,
        params: Params | None = None,
        *,
        batch: Batch = None,
        value: Scalar | None = None,
        value_fn: Callable[..., Scalar] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, NaturalGradientState]:
        """Optax's `update`, with `batch`; see `natural_gradient`."""
        del extra_args  # For the other members of a chain; Optax asks us to ignore it.
        if params is None:
            raise ValueError(
                "`params` are missing: call tx.update(grads, state, params, "
                "batch=batch). The metric is that of the model at its parameters."
            )
        if batch is None:
            raise ValueError(
                "`batch` is missing: call tx.update(grads, state, params, batch=batch) "
                "with the batch that the gradient was taken on."
            )
        check_params(params)
        tree.check_like(updates, params, name="updates", like_name="params")
        gradient = tree.widen(updates)

        def emit(scale: Scalar, course: PyTree) -> PyTree:
            step = tree.scale(self.sign * scale, course)
            return optax.tree.cast_like(step, params)

        def moved(emitted: PyTree) -> Params:
            if self.sign > 0:
                emitted = jax.tree.map(jnp.negative, emitted)
            return optax.apply_updates(params, emitted)

        # 1. The metric, at the parameters; and the loss, where a rule asks for it.
        fisher = self._linearize(params, batch, state)
        loss = WeighedLoss(self, fisher, batch, value, value_fn)
        length = StepLength(self, state.count)

        # 2. The direction, and how fast KL grows along it.
        def objective(direction: PyTree) -> Scalar:
            scale = length.first_trial(fisher.quadratic(direction))
            return loss.at(moved(emit(scale, direction)))

        found, direction, damping = self._solve(
            fisher, gradient, state, batch, objective
        )
        course = make_course(fisher, gradient, direction, found.image)

        # 3. The length, by the KL of the very parameters that it leads to; and, where
        #    a rule asks for it, by their loss.
        def after(scale: Scalar) -> Params:
            return moved(emit(scale, course.direction))

        step, accepted = length.search(
            course,
            kl_fn=lambda scale: fisher.kl(after(scale)),
            loss_fn=lambda scale: loss.at(after(scale)),
            loss_here=loss.here,
        )
        emitted = emit(step.scale, course.direction)

        # 4. Whether to take it.
        status = judge(
            gradient_size=tree.max_abs(tree.pack(gradient)[0]),
            value=value,
            solver_info=found.info,
            is_zero=course.is_zero,
            step=step,
            has_radius=self.max_kl is not None,
            accepted=accepted,
        )
        next_damping = damping
        if isinstance(self.rule, LevenbergMarquardt):
            model = course.slope - step.scale * course.quadratic / 2
            status, next_damping = adapt_damping(
                self.rule,
                damping,
                status,
                actual=loss.here() - loss.at(moved(emitted)),
                predicted=step.scale * model,
                count=state.count,
            )
        taken = status == StepStatus.TAKEN
        was_weighed = taken | (status == StepStatus.NO_REDUCTION)

        direction = found.direction
        if isinstance(self.learning_rate, QuadraticModelRate):
            direction = tree.scale(step.scale / course.unit, direction)
        predicted_kl = length.kl_curvature * step.scale**2 * course.quadratic / 2
        info = NaturalGradientInfo(
            solver=found.info,
            predicted_kl=jnp.where(taken, predicted_kl, 0.0),
            measured_kl=jnp.where(taken, step.kl, 0.0),
            step_scale=jnp.where(taken, step.scale / course.unit, 0.0),
            damping=damping,
            num_kl_evaluations=step.num_kl_evaluations,
            status=status,
        )
        new_state = NaturalGradientState(
            count=jnp.where(taken, optax.safe_increment(state.count), state.count),
            direction=tree.select(taken, direction, state.direction),
            damping=jnp.where(was_weighed, next_damping, state.damping),
            solver_state=tree.select(
                was_weighed, found.solver_state, state.solver_state
            ),
            # The dtypes of the state never change, or every step would compile anew.
            info=optax.tree.cast_like(info, state.info),
        )
        emitted = tree.select(taken, emitted, optax.tree.zeros_like(emitted))
        emitted = forward_only(
            emitted,
            what="natural_gradient's update",
            instead="Differentiate the loss before the update, or keep the update out "
            "with jax.lax.stop_gradient.",
        )
        return emitted, new_state

    def _linearize(
        self, params: Params, batch: Batch, state: NaturalGradientState
    ) -> Fisher:
        if self.metric_batch_fn is not None:
            batch = self.metric_batch_fn(batch)
        return linearize_fisher(
            self.model_fn,
            params,
            batch,
            self.likelihood,
            kind=self.kind,
            key=None if self.key is None else jax.random.fold_in(self.key, state.count),
            targets=None if self.targets_fn is None else self.targets_fn(batch),
            weights=None if self.weights_fn is None else self.weights_fn(batch),
            microbatch_size=self.microbatch_size,
        )

    def _solve(
        self,
        fisher: Fisher,
        gradient: PyTree,
        state: NaturalGradientState,
        batch: Batch,
        objective: Callable[[PyTree], Scalar],
    ) -> tuple[Direction, PyTree, Scalar]:
        """What was found in the coordinates of the damping, the same d, and λ."""
        params_from = None
        if isinstance(self.damping, CovariantDamping):
            self.damping.check(fisher.params)
            params_from = self.damping.params_from
            gradient = adjoint(params_from, gradient)(gradient)
            fisher = fisher.in_coordinates(params_from)
        dtype = tree.accumulator_dtype(gradient)
        damping = self._damping(state, fisher).astype(dtype)

        def objective_here(direction: PyTree) -> Scalar:
            return objective(params_from(direction) if params_from else direction)

        found = find_direction(
            self.solver,
            fisher,
            gradient,
            damping=damping,
            previous=state.direction,
            momentum=value_at(self.momentum, state.count),
            warm_start=value_at(self.warm_start, state.count),
            hints=Hints(self._coefficients(fisher, batch), objective_here),
            solver_state=state.solver_state,
        )
        if isinstance(self.learning_rate, QuadraticModelRate):
            found = rescale(
                self.learning_rate,
                fisher,
                gradient,
                found,
                previous=state.direction,
                damping=damping,
            )
        course = params_from(found.direction) if params_from else found.direction
        return found, course, damping

    def _coefficients(self, fisher: Fisher, batch: Batch) -> PyTree | None:
        """The gradient in the space of outputs, for the solvers that work there."""
        loss_fn = self.output_loss_fn
        is_used = getattr(self.solver, "uses_coefficients", False)
        # The gradient of one batch is no combination of the rows of another.
        if loss_fn is None or not is_used or self.metric_batch_fn is not None:
            return None
        cotangents = jax.grad(lambda outputs: loss_fn(outputs, batch))(fisher.outputs)
        # JAX's gradient of a complex output is the conjugate of the steepest ascent.
        return fisher.sqrt_solve(jax.tree.map(jnp.conj, cotangents))

    def _damping(self, state: NaturalGradientState, fisher: Fisher) -> Array:
        if isinstance(self.rule, LevenbergMarquardt):
            return state.damping
        if isinstance(self.rule, RelativeDamping):
            return self.rule.value(fisher, tree.size(fisher.params))
        return jnp.asarray(value_at(self.rule, state.count))
