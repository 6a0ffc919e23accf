"""One step of natural gradient descent, as Optax's `init` and `update`.

    1. linearise the model            F at θ
    2. solve                          (F + λI) d = g
    3. measure                        s, by the KL of θ - s d
    4. judge                          refuse the step if anything is not finite

Nothing here iterates in Python, calls back to the host or raises at run time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.damping import LevenbergMarquardt, RelativeDamping
from ngd_jax.fisher import Fisher, Kind, linearize_fisher
from ngd_jax.likelihoods import Likelihood
from ngd_jax.solvers import Solver, SolverInfo, SolverStatus
from ngd_jax.solvers.interface import forward_only
from ngd_jax.transform.arguments import (
    check_count,
    check_params,
    check_scalar,
    refuse_multi_steps,
)
from ngd_jax.transform.state import (
    NaturalGradientInfo,
    NaturalGradientState,
    StepStatus,
    initial_state,
)
from ngd_jax.trust_region import TrustRegionResult, first_trial, search_kl_radius
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

__all__ = ["Damping", "NaturalGradientStep"]

Damping = ScalarOrSchedule | RelativeDamping | LevenbergMarquardt


@dataclasses.dataclass(frozen=True, kw_only=True)
class NaturalGradientStep:
    """The arguments of `natural_gradient`, checked, and the step that they define."""

    model_fn: ModelFn
    likelihood: Likelihood
    learning_rate: ScalarOrSchedule | None
    sign: float
    max_kl: ScalarOrSchedule | None
    damping: Damping
    solver: Solver
    kind: Kind
    momentum: ScalarOrSchedule
    warm_start: float
    weights_fn: Callable[[Batch], PyTree] | None
    targets_fn: Callable[[Batch], PyTree] | None
    output_loss_fn: Callable[[Outputs, Batch], Scalar] | None
    microbatch_size: int | None
    max_kl_evaluations: int
    key: KeyArray | None

    def __post_init__(self) -> None:
        for name in ("model_fn", "solver"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"`{name}` must be callable, got {type(getattr(self, name))}."
                )
        if isinstance(self.likelihood, type) or not hasattr(self.likelihood, "kl"):
            raise TypeError(
                f"`likelihood` must be an instance such as ngd_jax.Categorical(), got "
                f"{self.likelihood!r}."
            )
        self._check_numbers()
        self._check_kind()
        if self.output_loss_fn is not None and not self._is_adaptive:
            raise ValueError(
                "`output_loss_fn` is for damping=LevenbergMarquardt(...), which weighs "
                f"actual against foretold reduction; got damping={self.damping!r}."
            )

    def _check_numbers(self) -> None:
        if self.learning_rate is None and self.max_kl is None:
            raise ValueError(
                "`learning_rate` and `max_kl` are both None: give one of them, or both."
            )
        check_scalar("learning_rate", self.learning_rate, may_be_zero=True)
        check_scalar("max_kl", self.max_kl, may_be_zero=False)
        if not isinstance(self.damping, RelativeDamping | LevenbergMarquardt):
            if self.damping is None:
                raise TypeError("`damping` must be a number or a rule, got None.")
            check_scalar("damping", self.damping, may_be_zero=True)
        for name in ("momentum", "warm_start"):
            value = getattr(self, name)
            check_scalar(name, value, may_be_zero=True)
            if isinstance(value, int | float) and value > 1:
                raise ValueError(f"`{name}` must be at most 1, got {value}.")
        check_count("max_kl_evaluations", self.max_kl_evaluations)
        if self.microbatch_size is not None:
            check_count("microbatch_size", self.microbatch_size)

    def _check_kind(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"`kind` must be one of {get_args(Kind)}, got {self.kind!r}."
            )
        for kind, name in (("sampled", "key"), ("empirical", "targets_fn")):
            is_given = getattr(self, name) is not None
            if (self.kind == kind) and not is_given:
                raise ValueError(f"`{name}` is needed for kind={kind!r}, got None.")
            if (self.kind != kind) and is_given:
                raise ValueError(
                    f"`{name}` is for kind={kind!r} only, got kind={self.kind!r}."
                )

    @property
    def _is_adaptive(self) -> bool:
        return isinstance(self.damping, LevenbergMarquardt)

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """The pair that Optax takes."""
        return optax.GradientTransformationExtraArgs(self.init, self.update)  # pyright: ignore[reportArgumentType]

    def init(self, params: Params) -> NaturalGradientState:
        """Optax's `init`."""
        refuse_multi_steps()
        check_params(params)
        rule = self.damping
        initial = rule.initial if isinstance(rule, LevenbergMarquardt) else 0.0
        return initial_state(params, damping=initial)

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
        dtype = tree.accumulator_dtype(params)
        gradient = tree.widen(updates)

        # 1. The metric, at the parameters.
        fisher = linearize_fisher(
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
        damping = self._damping(state, fisher, params).astype(dtype)

        # 2. The direction, and how fast KL grows along it: in units of its largest
        #    entry, since squares of the direction itself could over- or underflow.
        direction, solver_info = self._solve(fisher, gradient, state, damping)
        packed, unpack = tree.pack(direction)
        largest = tree.max_abs(packed)
        unit = tree.usable_unit(largest)
        course = unpack(tree.divide(packed, unit))
        quadratic = fisher.quadratic(course)

        # 3. The length, by the KL of the very parameters that it leads to.
        def emit(scale: Scalar) -> PyTree:
            step = tree.scale(self.sign * scale, course)
            return optax.tree.cast_like(step, params)

        def moved(emitted: PyTree) -> Params:
            if self.sign > 0:
                emitted = jax.tree.map(jnp.negative, emitted)
            return optax.apply_updates(params, emitted)

        step = self._step_size(
            lambda scale: fisher.kl(moved(emit(scale))),
            quadratic,
            unit,
            largest == 0,
            state.count,
        )
        emitted = emit(step.scale)

        # 4. Whether to take it.
        gradient_size = tree.max_abs(tree.pack(gradient)[0])
        status = self._status(gradient_size, largest == 0, solver_info, step, value)
        next_damping = damping
        if isinstance(self.damping, LevenbergMarquardt):
            actual = self._reduction(fisher, params, moved(emitted), value, value_fn)
            model = tree.vdot(gradient, course) - step.scale * quadratic / 2
            status, next_damping = _adapt(
                self.damping, damping, status, actual, step.scale * model
            )
        taken = status == StepStatus.TAKEN
        was_weighed = taken | (status == StepStatus.NO_REDUCTION)

        predicted_kl = self._kl_curvature * step.scale**2 * quadratic / 2
        info = NaturalGradientInfo(
            solver=solver_info,
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

    def _damping(
        self, state: NaturalGradientState, fisher: Fisher, params: Params
    ) -> Array:
        if isinstance(self.damping, LevenbergMarquardt):
            return state.damping
        if isinstance(self.damping, RelativeDamping):
            return self.damping.value(fisher, tree.size(params))
        return jnp.asarray(_at(self.damping, state.count))

    def _solve(
        self,
        fisher: Fisher,
        gradient: PyTree,
        state: NaturalGradientState,
        damping: Scalar,
    ) -> tuple[PyTree, SolverInfo]:
        rhs, start = gradient, None
        if not _is_static_zero(self.momentum):
            start = state.direction
            momentum = _at(self.momentum, state.count)
            rhs = tree.axpy(damping * momentum, start, rhs)
        elif not _is_static_zero(self.warm_start):
            start = tree.scale(_at(self.warm_start, state.count), state.direction)
        return self.solver(fisher, rhs, damping=damping, x0=start)

    def _step_size(
        self,
        kl_fn: Callable[[Scalar], Scalar],
        quadratic: Scalar,
        unit: Scalar,
        is_zero: Array,
        count: Array,
    ) -> TrustRegionResult:
        """The length of the step along the direction in units of `unit`."""
        rate = jnp.inf if self.learning_rate is None else _at(self.learning_rate, count)
        rate = jnp.asarray(rate).astype(unit.dtype) * unit
        if self.max_kl is None:
            kl = kl_fn(rate)
            one = jnp.ones((), jnp.int32)
            return TrustRegionResult(rate, kl, one, jnp.isfinite(kl))
        max_kl = jnp.asarray(_at(self.max_kl, count)).astype(unit.dtype)
        start = first_trial(self._kl_curvature * quadratic, max_kl, rate)
        return search_kl_radius(
            kl_fn,
            start=jnp.where(is_zero, 0.0, start),
            max_kl=max_kl,
            upper=rate,
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

    def _reduction(
        self,
        fisher: Fisher,
        params: Params,
        new_params: Params,
        value: Scalar | None,
        value_fn: Callable[..., Scalar] | None,
    ) -> Scalar:
        if self.output_loss_fn is not None:
            loss_fn = self.output_loss_fn
            old = loss_fn(fisher.outputs, fisher.batch) if value is None else value
            return old - loss_fn(fisher.outputs_at(new_params), fisher.batch)
        if value_fn is None:
            raise ValueError(
                "damping=LevenbergMarquardt(...) needs the loss: give "
                "`output_loss_fn` to natural_gradient, or call tx.update(..., "
                "value_fn=value_fn) with value_fn(params, batch)."
            )
        old = value_fn(params, fisher.batch) if value is None else value
        return old - value_fn(new_params, fisher.batch)


def _adapt(
    rule: LevenbergMarquardt,
    damping: Scalar,
    status: Array,
    actual: Scalar,
    predicted: Scalar,
) -> tuple[Array, Scalar]:
    """The status after weighing the reduction, and the damping of the next step."""
    accepted = rule.accepts(actual=actual, predicted=predicted)
    refused = (status == StepStatus.TAKEN) & ~accepted
    adapted = rule.update(damping, actual=actual, predicted=predicted)
    status = jnp.where(refused, StepStatus.NO_REDUCTION, status).astype(jnp.int32)
    return status, adapted.astype(damping.dtype)


def _at(value: Any, count: Array) -> Any:
    return value(count) if callable(value) else value


def _is_static_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0
