"""One step of natural gradient descent, as Optax's `init` and `update`.

    1. linearise the model            F at θ
    2. solve                          (F + λI) d = g
    3. choose the length              s, by the KL of θ - s d, and by the loss on demand
    4. take the step or refuse it     one scalar decides

Nothing here iterates in Python, calls back to the host or raises at run time.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.damping import CovariantDamping, LevenbergMarquardt, RelativeDamping
from ngd_jax.fisher import Fisher, linearize_fisher
from ngd_jax.jacobian import adjoint
from ngd_jax.microbatches import model_on
from ngd_jax.solvers.protocol import (
    RightHandSide,
    Solution,
    SolverStatus,
    first_cause,
    forward_only,
    solve_scaled,
)
from ngd_jax.transform.arguments import (
    Settings,
    check_manual_axes,
    check_wrappers,
    is_zero,
    split_functions,
)
from ngd_jax.transform.state import (
    NaturalGradientInfo,
    NaturalGradientState,
    StepStatus,
    initial_state,
)
from ngd_jax.trust_region import (
    RadiusRule,
    RateRule,
    SearchLine,
    TrustRegionResult,
    first_trial,
    search_kl_radius,
)
from ngd_jax.types import Array, ArrayLike, Batch, ModelFn, Params, PyTree, Scalar

__all__ = ["NaturalGradientStep"]


@dataclasses.dataclass(frozen=True)
class NaturalGradientStep:
    """The pair of functions that Optax takes.

    Attributes:
      settings: the checked arguments of `natural_gradient`.
    """

    settings: Settings

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """The pair that Optax takes."""
        return optax.GradientTransformationExtraArgs(self.init, self.update)  # pyright: ignore[reportArgumentType]

    def init(self, params: Params) -> NaturalGradientState:
        """Optax's `init`."""
        check_wrappers()
        params, _ = split_functions(params)
        tree.check_parameters(params)
        settings = self.settings
        rule = settings.damping_rule
        return initial_state(
            params,
            damping=rule.initial if isinstance(rule, LevenbergMarquardt) else 0.0,
            keeps_direction=settings.keeps_direction,
            solver_state=settings.solver.init(params),
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
        for name, given in (("params", params), ("batch", batch)):
            if given is None:
                raise ValueError(
                    f"`{name}` is missing: call tx.update(grads, state, params, "
                    f"batch=batch), or optimizer.update(model, grads, batch=batch) of "
                    f"nnx.Optimizer, with the batch that the gradient was taken on. "
                    f"The metric is that of the model at its parameters, on that batch."
                )
        params, model_from = split_functions(params)
        tree.check_parameters(params)
        tree.check_like(updates, params, name="updates", like_name="params")
        check_manual_axes((params, updates, batch))
        gradient = tree.placed_like(tree.widen(updates), params)
        settings, model_fn = self.settings, model_from(self.settings.model_fn)

        def step_of(scale: ArrayLike, direction: PyTree) -> PyTree:
            """The update -s d, rounded to the dtypes of the parameters."""
            step = tree.scale(-jnp.asarray(scale), tree.widen(direction))
            return jax.tree.map(lambda s, p: _rounded(s, p.dtype), step, params)

        def moved(step: PyTree) -> Params:
            """The parameters as `optax.apply_updates` will leave them."""
            wide = tree.axpy(1.0, step, tree.widen(params))
            return jax.tree.map(lambda x, p: _rounded(x, p.dtype), wide, params)

        # 1. The metric, at the parameters; and the loss, for rules that ask for it.
        fisher = self.linearize(model_fn, params, batch, state.count)
        loss = _Loss(settings, model_fn, fisher, batch, value, value_fn)

        # 2. The direction, and how fast the KL grows along it.
        def loss_along(direction: PyTree) -> Scalar:
            upper = self._upper(state.count, 1.0)
            scale = self._first_trial(fisher.quadratic(direction), upper, state.count)
            return loss.at(moved(step_of(scale, direction)))

        solution, direction, damping = self._solve(
            fisher, gradient, state, batch, loss_along
        )
        largest = solution.largest  # found once, around the solver
        if largest is None or direction is not solution.direction:
            largest = tree.max_abs(direction)
        unit = tree.usable_unit(largest)
        direction = tree.divide(direction, unit)
        pushed = solution.pushed
        if pushed is None:
            pushed = fisher.pushforward(direction)
        else:
            pushed = tree.divide(tree.widen(pushed), unit)
        upper = self._upper(state.count, unit)
        line = SearchLine(
            kl_fn=lambda scale: fisher.kl(moved(step_of(scale, direction))),
            loss_fn=lambda scale: loss.at(moved(step_of(scale, direction))),
            loss_here=loss.here,
            slope=tree.vdot(gradient, direction),
            quadratic=jnp.maximum(fisher.inner(pushed, pushed), 0.0),
            kl_curvature=getattr(settings.likelihood, "kl_curvature", 1.0),
            upper=jnp.where(largest == 0, 0.0, upper),
        )

        # 3. The length.
        step, is_accepted = self._length(line, state.count)
        emitted = step_of(step.scale, direction)
        after = moved(emitted)

        # 4. Whether to take the step.
        value_is_finite = True if value is None else jnp.all(jnp.isfinite(value))
        missed = StepStatus.NON_FINITE_KL
        if settings.max_kl is not None:
            missed = StepStatus.RADIUS_NOT_MET
        gradient_size = tree.max_abs(gradient)
        solver_failed = solution.info.status == SolverStatus.NON_FINITE
        # Momentum alone is no direction of this batch.
        is_refused = solution.info.status == SolverStatus.NOT_SEPARABLE
        is_stuck = ((largest == 0) | is_refused) & (gradient_size > 0)
        status = first_cause(
            (~jnp.isfinite(gradient_size), StepStatus.NON_FINITE_GRADIENT),
            (~jnp.asarray(value_is_finite), StepStatus.NON_FINITE_VALUE),
            (solver_failed, StepStatus.NON_FINITE_MODEL),
            (is_stuck, StepStatus.NO_DIRECTION),
            (~step.found, missed),
            (~tree.all_finite(after), StepStatus.NON_FINITE_UPDATE),
            (~is_accepted, StepStatus.NO_REDUCTION),
            (~step.filled, StepStatus.TAKEN_SHORT),
            otherwise=StepStatus.TAKEN,
        )
        next_damping = damping
        rule = settings.damping_rule
        if isinstance(rule, LevenbergMarquardt):
            predicted = step.scale * (line.slope - step.scale * line.quadratic / 2)
            actual = loss.here() - loss.at(after)
            is_kept = rule.accepts(actual=actual, predicted=predicted)
            status = jnp.where(
                _is_taken(status) & ~is_kept, StepStatus.NO_REDUCTION, status
            )
            adapted = rule.update(damping, actual=actual, predicted=predicted)
            is_due = ((state.count + 1) % rule.every == 0) | ~is_kept
            next_damping = jnp.where(is_due, adapted, damping)
        taken = _is_taken(status)
        was_weighed = taken | (status == StepStatus.NO_REDUCTION)

        scale = step.scale / unit
        kept_direction = self._kept(solution.direction, step.scale, line.upper, unit)
        if solution.length is not None:
            scale = scale * solution.length
        if solution.damping is not None:
            damping = solution.damping
        # A large scale squared on its own could overflow, and give NaN times 0.
        length = step.scale * jnp.sqrt(line.quadratic)
        predicted_kl = line.kl_curvature * length**2 / 2
        # NaN where products with F have overflowed: reported as infinite.
        predicted_kl = jnp.where(jnp.isnan(predicted_kl), jnp.inf, predicted_kl)
        info = NaturalGradientInfo(
            solver=solution.info,
            predicted_kl=jnp.where(taken, predicted_kl, 0.0),
            measured_kl=jnp.where(taken, step.kl, 0.0),
            step_scale=jnp.where(taken, scale, 0.0),
            damping=jnp.where(jnp.isfinite(damping), damping, state.info.damping),
            num_kl_evaluations=step.num_kl_evaluations,
            status=status,
        )
        keeps = settings.keeps_direction
        new_state = NaturalGradientState(
            count=jnp.where(taken, optax.safe_increment(state.count), state.count),
            direction=tree.select(taken, kept_direction, state.direction)
            if keeps
            else (),
            damping=jnp.where(was_weighed, next_damping, state.damping),
            solver_state=solution.state,
            info=info,
        )
        # The dtypes of the state never change, or every step would recompile.
        new_state = optax.tree.cast_like(new_state, state)
        sign = -settings.sign
        emitted = jax.tree.map(lambda x: jnp.where(taken, sign * x, 0), emitted)
        emitted = jax.tree.map(lambda x, p: x.astype(p.dtype), emitted, params)
        emitted = forward_only(
            emitted,
            what="natural_gradient's update",
            instead="Differentiate the loss before the update, or keep the update out "
            "with jax.lax.stop_gradient.",
        )
        return emitted, new_state

    def linearize(
        self, model_fn: ModelFn, params: Params, batch: Batch, count: Array
    ) -> Fisher:
        """The Fisher of step `count`, on the batch of the metric."""
        metric = self.settings.metric
        if metric.batch_fn is not None:
            batch = metric.batch_fn(batch)
        key = metric.key
        return linearize_fisher(
            model_fn,
            params,
            batch,
            self.settings.likelihood,
            kind=metric.kind,
            key=None if key is None else jax.random.fold_in(key, count),
            targets=None if metric.targets_fn is None else metric.targets_fn(batch),
            weights=None if metric.weights_fn is None else metric.weights_fn(batch),
            microbatch_size=metric.microbatch_size,
        )

    def _solve(
        self,
        fisher: Fisher,
        gradient: PyTree,
        state: NaturalGradientState,
        batch: Batch,
        loss_along: Callable[[PyTree], Scalar],
    ) -> tuple[Solution, PyTree, Scalar]:
        """The solution in the coordinates of the damping, d in those of θ, and λ.

            (F + λI) e = g - μ F p,    d = e + μ p      ⇔      (F + λI) d = g + λ μ p

        The proximal momentum is written as a correction e to μ p, p the last direction.
        It then keeps its precision at any λ and has the right limit for λ → 0: of all d
        that fit the batch, the one nearest to μ p. In the space of coefficients:
        w - μ A p.
        """
        settings, rhs_of_outputs = self.settings, self._coefficients(fisher, batch)
        params_from = _identity
        if isinstance(settings.damping, CovariantDamping):
            params_from = settings.damping.params_from
            fisher = settings.damping.coordinates(fisher)  # checks the scales
            gradient = adjoint(params_from, gradient)(gradient)
        damping = self.damping(state, fisher)
        damping = damping.astype(tree.accumulator_dtype(gradient))

        pulled, pulled_pushed, guess, coefficients = None, None, None, rhs_of_outputs
        rhs = gradient
        if not is_zero(settings.momentum):
            momentum = _value_at(settings.momentum, state.count)
            pulled = tree.scale(momentum, state.direction)
            product, pulled_pushed = fisher.matvec_and_push(pulled)
            rhs = tree.axpy(-1.0, product, gradient)
            if coefficients is not None:
                shift = fisher.metric.sqrt_matvec(pulled_pushed)
                coefficients = jax.tree.map(jnp.subtract, coefficients, shift)
        elif not is_zero(settings.solver.warm_start):
            guess = tree.scale(settings.solver.warm_start, state.direction)

        def objective(direction: PyTree) -> Scalar:
            if pulled is not None:
                direction = tree.axpy(1.0, direction, pulled)
            return loss_along(params_from(direction))

        solution = solve_scaled(
            settings.solver,
            fisher,
            RightHandSide(rhs, coefficients, guess, objective),
            damping=damping,
            state=state.solver_state,
        )
        direction, pushed = solution.direction, solution.pushed
        if pulled is not None:
            direction = tree.axpy(1.0, direction, pulled)
            if pushed is not None:
                pushed = tree.axpy(1.0, tree.widen(pulled_pushed), tree.widen(pushed))
        if isinstance(settings.learning_rate, RateRule):
            uses_previous = settings.learning_rate.uses_previous
            previous = state.direction if uses_previous else None
            direction, pushed = settings.learning_rate.combine(
                fisher, gradient, direction, pushed, previous, damping
            )
        if direction is not solution.direction:
            solution = solution._replace(
                direction=direction, pushed=pushed, largest=None
            )
        return solution, params_from(direction), damping

    def _coefficients(self, fisher: Fisher, batch: Batch) -> PyTree | None:
        """The gradient in the space of outputs, for the solvers that work there."""
        settings = self.settings
        loss_fn = settings.loss_fn
        # The gradient of one batch is not a combination of the rows of another.
        if loss_fn is None or not settings.solver.uses_coefficients:
            return None
        if settings.metric.batch_fn is not None:
            return None
        cotangents = jax.grad(lambda outputs: loss_fn(outputs, batch))(fisher.outputs)
        # JAX's gradient of a complex output is the conjugate of the steepest ascent.
        return fisher.sqrt_solve(jax.tree.map(jnp.conj, cotangents))

    def damping(self, state: NaturalGradientState, fisher: Fisher) -> Array:
        """λ of a step, in the coordinates of `fisher`."""
        rule = self.settings.damping_rule
        if isinstance(rule, LevenbergMarquardt):
            return state.damping
        if isinstance(rule, RelativeDamping):
            return rule.value(fisher)
        return jnp.asarray(_value_at(rule, state.count))

    def _kept(
        self, direction: PyTree, scale: Scalar, upper: Scalar, unit: Scalar
    ) -> PyTree:
        """The direction kept for the next step; `scale` and `upper` in `unit`s."""
        if isinstance(self.settings.learning_rate, RateRule):
            return tree.scale(scale / unit, direction)
        # If the radius shortened the step, keep only the part that was taken: momentum
        # from steps never taken drives a network away from its optimum.
        whole = jnp.where(jnp.isfinite(upper), upper, unit)
        part = jnp.where(whole > 0, jnp.minimum(scale / whole, 1), 1)
        return tree.scale(part, direction)

    def _upper(self, count: Array, unit: ArrayLike) -> Array:
        """The longest step that the learning rate allows, in units of `unit`."""
        rate = self.settings.learning_rate
        if isinstance(rate, RateRule):
            rate = 1.0
        rate = jnp.inf if rate is None else _value_at(rate, count)
        unit = jnp.asarray(unit)
        return jnp.asarray(rate).astype(unit.dtype) * unit

    def _radius(self, count: Array) -> Array | None:
        """The radius, unless a rule chooses it from the loss."""
        max_kl = self.settings.max_kl
        if max_kl is None or isinstance(max_kl, RadiusRule):
            return None
        return jnp.asarray(_value_at(max_kl, count))

    def _first_trial(self, quadratic: Scalar, upper: Array, count: Array) -> Scalar:
        """The length that the quadratic model predicts."""
        radius = self._radius(count)
        if radius is None:
            return upper
        curvature = getattr(self.settings.likelihood, "kl_curvature", 1.0)
        return first_trial(curvature * quadratic, radius.astype(quadratic.dtype), upper)

    def _length(
        self, line: SearchLine, count: Array
    ) -> tuple[TrustRegionResult, Array]:
        """The length of the step, and whether the step is acceptable."""
        settings = self.settings
        if isinstance(settings.max_kl, RadiusRule):
            return settings.max_kl.search(line), jnp.asarray(True)
        radius = self._radius(count)
        if radius is None:
            kl, one = line.kl_fn(line.upper), jnp.ones((), jnp.int32)
            yes = jnp.asarray(True)
            step = TrustRegionResult(line.upper, kl, one, jnp.isfinite(kl), yes)
            radius = jnp.inf
        else:
            start = self._first_trial(line.quadratic, line.upper, count)
            step = search_kl_radius(
                line.kl_fn,
                start=jnp.where(line.upper > 0, start, 0.0),
                max_kl=radius,
                upper=line.upper,
            )
        if settings.accept is None:
            return step, jnp.asarray(True)
        return settings.accept.shorten(step, line, radius)


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The loss on the batch of the gradient, for the rules that need it."""

    settings: Settings
    model_fn: ModelFn
    fisher: Fisher
    batch: Batch
    value: Scalar | None
    value_fn: Callable[..., Scalar] | None

    def at(self, params: Params) -> Scalar:
        """The loss at `params`."""
        settings = self.settings
        # `value_fn` goes first: `loss_fn` may have the gradient but another value.
        if self.value_fn is not None:
            if _num_arguments(self.value_fn) == 1:
                return self.value_fn(params)
            return self.value_fn(params, self.batch)
        if settings.loss_fn is None:
            raise ValueError(
                f"{settings.needs_loss} needs the loss: give `loss_fn` to "
                f"natural_gradient, or call tx.update(..., value_fn=value_fn) with "
                f"value_fn(params, batch)."
            )
        outputs_at = self.fisher.outputs_at
        if settings.metric.batch_fn is not None:
            outputs_at = model_on(
                self.model_fn,
                settings.likelihood,
                self.batch,
                settings.metric.microbatch_size,
            )
        return settings.loss_fn(outputs_at(params), self.batch)

    def here(self) -> Scalar:
        """The loss at the present parameters: at most one pass through the model."""
        if self.value is not None:
            return self.value
        settings = self.settings
        is_known = settings.metric.batch_fn is None and self.value_fn is None
        if is_known and settings.loss_fn is not None:
            return settings.loss_fn(self.fisher.outputs, self.batch)
        return self.at(self.fisher.params)


def _is_taken(status: Array) -> Array:
    return (status == StepStatus.TAKEN) | (status == StepStatus.TAKEN_SHORT)


def _rounded(values: Array, dtype: Any) -> Array:
    """Values rounded to a dtype, so that the compiler cannot skip the rounding.

    XLA may drop a cast to bfloat16 or float16 and back inside one program
    (`--xla_allow_excess_precision`); the KL would then be measured at parameters other
    than those returned.
    """
    info = jnp.finfo(dtype)
    if info.bits >= 32 or jnp.issubdtype(values.dtype, jnp.complexfloating):
        return values.astype(dtype)
    rounded = jax.lax.reduce_precision(values, info.nexp, info.nmant)
    if info.nexp < jnp.finfo(values.dtype).nexp:
        # `reduce_precision` flushes to zero what the dtype represents as subnormal
        # numbers.
        least = float(info.smallest_subnormal)
        is_small = jnp.abs(values) < float(info.smallest_normal)
        rounded = jnp.where(is_small, jnp.round(values / least) * least, rounded)
    return rounded.astype(dtype)


def _num_arguments(fn: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return 2
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return 2
    required = [p for p in parameters if p.kind in positional]
    return len(required)


def _value_at(value: Any, count: Array) -> Any:
    """The number, or the schedule's value after `count` steps."""
    return value(count) if callable(value) else value


def _identity(values: PyTree) -> PyTree:
    return values
