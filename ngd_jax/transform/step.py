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
from ngd_jax.fisher.functions import model_on
from ngd_jax.fisher.linearization import adjoint
from ngd_jax.likelihoods import Likelihood
from ngd_jax.quadratic_model import QuadraticModelRate
from ngd_jax.relative_radius import RelativeRadius
from ngd_jax.solvers import Solver, SolverInfo, SolverStatus, StatefulSolver
from ngd_jax.solvers.interface import forward_only
from ngd_jax.transform.arguments import (
    check_options,
    check_params,
    refuse_multi_steps,
)
from ngd_jax.transform.direction import Direction, Hints, find_direction, rescale
from ngd_jax.transform.state import (
    NaturalGradientInfo,
    NaturalGradientState,
    StepStatus,
    initial_state,
)
from ngd_jax.trust_region import TrustRegionResult, first_trial, search_kl_radius
from ngd_jax.types import (
    Array,
    ArrayLike,
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
        loss_fn = self._loss_fn(fisher, batch, value_fn)

        # 2. The direction, and how fast KL grows along it: in units of its largest
        #    entry, since squares of the direction itself could over- or underflow.
        def objective(course: PyTree) -> Scalar:
            scale = self._first_trial(fisher.quadratic(course), 1.0, state.count)
            return loss_fn(moved(emit(scale, course)))

        found, course, damping = self._solve(fisher, gradient, state, batch, objective)
        packed, unpack = tree.pack(course)
        largest = tree.max_abs(packed)
        unit = tree.usable_unit(largest)
        course = unpack(tree.divide(packed, unit))
        quadratic = fisher.quadratic(course)

        # 3. The length, by the KL of the very parameters that it leads to; and, where
        #    a rule asks for it, by their loss.
        def kl_fn(scale: Scalar) -> Scalar:
            return fisher.kl(moved(emit(scale, course)))

        if isinstance(self.max_kl, RelativeRadius):
            rate = self._rate(unit, state.count)
            step = self.max_kl.search(
                kl_fn,
                lambda scale: loss_fn(moved(emit(scale, course))),
                loss=self._loss_here(fisher, params, batch, loss_fn, value),
                slope=tree.vdot(gradient, course),
                quadratic=quadratic,
                kl_curvature=self._kl_curvature,
                upper=jnp.where(largest == 0, 0.0, rate),
                max_evaluations=self.max_kl_evaluations,
            )
        else:
            step = self._step_size(kl_fn, quadratic, unit, largest == 0, state.count)
        accepted = jnp.asarray(True)
        if self.acceptance is not None and not isinstance(self.max_kl, RelativeRadius):
            max_kl = jnp.inf if self.max_kl is None else _at(self.max_kl, state.count)
            here = self._loss_here(fisher, params, batch, loss_fn, value)
            step, accepted = self.acceptance.shorten(
                step,
                decrease_fn=lambda scale: here - loss_fn(moved(emit(scale, course))),
                slope=tree.vdot(gradient, course),
                kl_fn=kl_fn,
                max_kl=max_kl,
            )
        emitted = emit(step.scale, course)

        # 4. Whether to take it.
        gradient_size = tree.max_abs(tree.pack(gradient)[0])
        status = self._status(gradient_size, largest == 0, found.info, step, value)
        failed = (status == StepStatus.TAKEN) & ~accepted
        status = jnp.where(failed, StepStatus.NO_REDUCTION, status).astype(jnp.int32)
        next_damping = damping
        if isinstance(self.rule, LevenbergMarquardt):
            old = self._loss_here(fisher, params, batch, loss_fn, value)
            actual = old - loss_fn(moved(emitted))
            model = tree.vdot(gradient, course) - step.scale * quadratic / 2
            status, next_damping = _adapt(
                self.rule, damping, status, actual, step.scale * model, state.count
            )
        taken = status == StepStatus.TAKEN
        was_weighed = taken | (status == StepStatus.NO_REDUCTION)

        direction = found.direction
        if isinstance(self.learning_rate, QuadraticModelRate):
            direction = tree.scale(step.scale / unit, direction)
        predicted_kl = self._kl_curvature * step.scale**2 * quadratic / 2
        info = NaturalGradientInfo(
            solver=found.info,
            predicted_kl=jnp.where(taken, predicted_kl, 0.0),
            measured_kl=jnp.where(taken, step.kl, 0.0),
            step_scale=jnp.where(taken, step.scale / unit, 0.0),
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

    def _loss_fn(
        self,
        fisher: Fisher,
        batch: Batch,
        value_fn: Callable[..., Scalar] | None,
    ) -> Callable[[Params], Scalar]:
        """The loss on the batch of the gradient, as a function of the parameters."""
        if self.output_loss_fn is not None:
            output_loss_fn = self.output_loss_fn
            outputs_fn = fisher.outputs_at
            if self.metric_batch_fn is not None:
                outputs_fn = model_on(
                    self.model_fn, self.likelihood, batch, self.microbatch_size
                )
            return lambda params: output_loss_fn(outputs_fn(params), batch)
        if value_fn is not None:
            return lambda params: value_fn(params, batch)

        def missing(_params: Params) -> Scalar:
            raise ValueError(
                f"{self._who_needs_the_loss()} needs the loss: give `output_loss_fn` "
                f"to natural_gradient, or call tx.update(..., value_fn=value_fn) with "
                f"value_fn(params, batch)."
            )

        return missing

    def _loss_here(
        self,
        fisher: Fisher,
        params: Params,
        batch: Batch,
        loss_fn: Callable[[Params], Scalar],
        value: Scalar | None,
    ) -> Scalar:
        """The loss at the parameters, with a pass through the model at need only."""
        if value is not None:
            return value
        if self.output_loss_fn is not None and self.metric_batch_fn is None:
            return self.output_loss_fn(fisher.outputs, batch)
        return loss_fn(params)

    def _who_needs_the_loss(self) -> str:
        if isinstance(self.rule, LevenbergMarquardt):
            return "damping=LevenbergMarquardt(...)"
        if isinstance(self.max_kl, RelativeRadius):
            return f"max_kl={self.max_kl!r}"
        if self.acceptance is not None:
            return f"acceptance={self.acceptance!r}"
        return f"solver={self.solver!r}"

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
            momentum=_at(self.momentum, state.count),
            warm_start=_at(self.warm_start, state.count),
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
        return jnp.asarray(_at(self.rule, state.count))

    def _rate(self, unit: ArrayLike, count: Array) -> Array:
        """The longest step that the learning rate allows, in units of `unit`."""
        rate = self.learning_rate
        if isinstance(rate, QuadraticModelRate):
            rate = 1.0
        rate = jnp.inf if rate is None else _at(rate, count)
        return jnp.asarray(rate).astype(jnp.result_type(unit)) * unit

    def _first_trial(self, quadratic: Scalar, unit: ArrayLike, count: Array) -> Array:
        rate = self._rate(jnp.asarray(unit, quadratic.dtype), count)
        if self.max_kl is None or isinstance(self.max_kl, RelativeRadius):
            return rate
        max_kl = jnp.asarray(_at(self.max_kl, count)).astype(quadratic.dtype)
        return first_trial(self._kl_curvature * quadratic, max_kl, rate)

    def _step_size(
        self,
        kl_fn: Callable[[Scalar], Scalar],
        quadratic: Scalar,
        unit: Scalar,
        is_zero: Array,
        count: Array,
    ) -> TrustRegionResult:
        """The length of the step along the direction in units of `unit`."""
        start = self._first_trial(quadratic, unit, count)
        if self.max_kl is None:
            kl = kl_fn(start)
            one = jnp.ones((), jnp.int32)
            return TrustRegionResult(start, kl, one, jnp.isfinite(kl))
        return search_kl_radius(
            kl_fn,
            start=jnp.where(is_zero, 0.0, start),
            max_kl=jnp.asarray(_at(self.max_kl, count)).astype(unit.dtype),
            upper=self._rate(unit, count),
            max_evaluations=self.max_kl_evaluations,
        )

    @property
    def _kl_curvature(self) -> float:
        """The Hessian of the KL in units of the metric: 1 but for wave functions."""
        return getattr(self.likelihood, "kl_curvature", 1.0)

    def _status(
        self,
        gradient_size: Scalar,
        is_zero: Array,
        solver_info: SolverInfo,
        step: TrustRegionResult,
        value: Scalar | None,
    ) -> Array:
        missed = (
            StepStatus.NON_FINITE_KL
            if self.max_kl is None
            else StepStatus.RADIUS_NOT_MET
        )
        value_is_finite = True if value is None else jnp.all(jnp.isfinite(value))
        # The first that applies is the cause; those after it are consequences.
        causes = [
            (~jnp.isfinite(gradient_size), StepStatus.NON_FINITE_GRADIENT),
            (~jnp.asarray(value_is_finite), StepStatus.NON_FINITE_VALUE),
            (
                solver_info.status == SolverStatus.NON_FINITE,
                StepStatus.NON_FINITE_MODEL,
            ),
            (is_zero & (gradient_size > 0), StepStatus.NO_DIRECTION),
            (~step.found, missed),
        ]
        conditions, statuses = zip(*causes, strict=True)
        return jnp.select(
            conditions, [jnp.int32(s) for s in statuses], jnp.int32(StepStatus.TAKEN)
        )


def _adapt(
    rule: LevenbergMarquardt,
    damping: Scalar,
    status: Array,
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


def _at(value: Any, count: Array) -> Any:
    return value(count) if callable(value) else value
