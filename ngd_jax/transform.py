"""Natural gradient as an Optax transformation.

    d = (F + λI)⁻¹ g,    θ ← θ - s d,    s = the learning rate or the KL radius

The only file that knows Optax's protocol. One step is: linearise the model, solve for
d, find s with the measured KL, refuse the step if anything is not finite. Nothing here
iterates in Python, calls back to the host or raises at run time.
"""

import dataclasses
import enum
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.damping import LevenbergMarquardt, RelativeDamping
from ngd_jax.fisher import Fisher, linearize_fisher
from ngd_jax.fisher.operator import Kind
from ngd_jax.likelihoods import Likelihood
from ngd_jax.solvers import CG, Solver, SolverInfo, SolverStatus
from ngd_jax.solvers.interface import forward_only
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

__all__ = [
    "NaturalGradientInfo",
    "NaturalGradientState",
    "StepStatus",
    "natural_gradient",
    "scale_by_natural_gradient",
]

Damping = ScalarOrSchedule | RelativeDamping | LevenbergMarquardt


class StepStatus(enum.IntEnum):
    """What became of a step; `message` says it in words.

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

    @property
    def message(self) -> str:
        """One sentence for a person."""
        return _MESSAGES[self]


_MESSAGES = {
    StepStatus.TAKEN: "The step was taken.",
    StepStatus.NON_FINITE_GRADIENT: "Refused: the gradient is not finite.",
    StepStatus.NON_FINITE_MODEL: (
        "Refused: the outputs of the model or their derivatives are not finite on this "
        "batch."
    ),
    StepStatus.NO_DIRECTION: (
        "Refused: the solver found no direction; its own status says why."
    ),
    StepStatus.NON_FINITE_KL: (
        "Refused: the KL of the step is not finite. Set max_kl, or a smaller learning "
        "rate."
    ),
    StepStatus.RADIUS_NOT_MET: (
        "Refused: no step with a KL within max_kl was found in max_kl_evaluations."
    ),
    StepStatus.NON_FINITE_VALUE: "Refused: the loss handed in as value is not finite.",
    StepStatus.NO_REDUCTION: (
        "Refused by LevenbergMarquardt: the loss did not fall as foretold. The damping "
        "has been raised."
    ),
}


class NaturalGradientInfo(NamedTuple):
    """How the last update went; nothing that the next one needs.

    Get it out of any chain with `optax.tree.get(opt_state, "NaturalGradientInfo")`.

    Attributes:
      solver: `SolverInfo` of the solve.
      predicted_kl: ½ s² dᵀFd, the KL of the step by the quadratic model, in nats.
      measured_kl: the mean KL(θ ‖ θ + update) measured on the batch, in nats per
        example; 0 for a refused step.
      step_scale: s in update = -s d; 0 for a refused step.
      damping: the λ that was used.
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
    """What the next update needs. A refused step changes only `info` (and `damping`).

    Attributes:
      count: int32, steps taken; what schedules are evaluated at.
      direction: the last natural direction d, float32 or wider, for momentum and warm
        starts; zero before the first step.
      damping: the λ of the next step under `LevenbergMarquardt`, else that of the last.
      info: how the last update went, a `NaturalGradientInfo`.
    """

    count: Array
    direction: PyTree
    damping: Array
    info: NaturalGradientInfo


def natural_gradient(
    learning_rate: ScalarOrSchedule | None,
    model_fn: ModelFn,
    likelihood: Likelihood,
    *,
    max_kl: ScalarOrSchedule | None = None,
    damping: Damping = 1e-3,
    solver: Solver = CG(),
    kind: Kind = "exact",
    momentum: ScalarOrSchedule = 0.0,
    warm_start: float = 0.0,
    weights_fn: Callable[[Batch], PyTree] | None = None,
    targets_fn: Callable[[Batch], PyTree] | None = None,
    output_loss_fn: Callable[[Outputs, Batch], Scalar] | None = None,
    microbatch_size: int | None = None,
    max_kl_evaluations: int = 10,
    key: KeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient descent: θ ← θ - s d with (F + λI) d = g.

    * Only `learning_rate`: s is the learning rate.
    * `learning_rate` and `max_kl`: the same, shortened where the measured KL of the
      step would exceed `max_kl`.
    * `learning_rate=None` and `max_kl`: the step always goes to the radius. This is the
      constant-KL step of natural gradient, and TRPO's.

    The promise: the mean KL(θ ‖ θ + update), measured on the batch, is at most
    `max_kl`; without such a step the update is zero. It holds for the update that this
    transformation emits. What else a chain does to it (weight decay, clipping, another
    learning rate) is outside of the promise.

    The result's `update` needs the parameters and one extra argument, `batch`:
    `tx.update(grads, state, params, batch=batch)`. It also takes Optax's own `value`
    and `value_fn`, and ignores what it does not know, as Optax asks.

    Args:
      learning_rate: a number, a schedule, or None.
      model_fn: a pure function (params, batch) -> outputs, the same model that the loss
        is made of. What must not be differentiated (running statistics, dropout keys)
        goes through `batch`.
      likelihood: what the outputs mean; see `ngd_jax.likelihoods`.
      max_kl: the radius in nats per example: a number, a schedule, or None. TRPO uses
        1e-2.
      damping: λ ≥ 0 in units of F, a mean over examples: a number, a schedule, a
        `RelativeDamping` or `LevenbergMarquardt`. F is singular for most networks, so 0
        is for special cases.
      solver: `CG`, `Cholesky`, `Lineax` or any `Solver`.
      kind: "exact", "sampled" (needs `key`) or "empirical" (needs `targets_fn`); see
        `linearize_fisher`.
      momentum: proximal momentum μ in [0, 1): (F + λI) d = g + λ μ d_previous, started
        from d_previous. Acts through the damping: none without.
      warm_start: decay ρ of the solver's first guess, ρ d_previous; 0 starts at zero.
        With momentum the start is d_previous whatever this says.
      weights_fn: batch -> weights (masks, importance weights) that broadcast against
        the examples; see `linearize_fisher`.
      targets_fn: batch -> targets, for kind "empirical".
      output_loss_fn: (outputs, batch) -> loss, for `LevenbergMarquardt` where `update`
        is not given a `value_fn`.
      microbatch_size: examples in memory at once, for the metric and for the KL. Use
        this instead of `optax.MultiSteps`, which would take the metric from the last
        micro-batch only.
      max_kl_evaluations: forward passes at most in search of the radius. Two or three
        do for smooth models.
      key: for kind "sampled"; the draws of step n come from `fold_in(key, n)`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `NaturalGradientState`.

    Raises:
      ValueError, TypeError: at construction, or when `update` is traced, naming the
        argument. Never at run time: a gradient, a model or a KL that is not finite
        gives a zero update, keeps the state, and is told in `info.status`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, ngd_jax as ngd
      >>> x = jax.random.normal(jax.random.key(0), (64, 3))
      >>> batch = {"x": x, "y": x @ jnp.array([1.0, -2.0, 0.5])}
      >>> def model_fn(params, batch):
      ...     return batch["x"] @ params["w"]
      >>> def loss_fn(params, batch):
      ...     return 0.5 * jnp.mean((model_fn(params, batch) - batch["y"]) ** 2)
      >>> tx = ngd.natural_gradient(
      ...     1.0, model_fn, ngd.Gaussian(event_ndims=0), damping=0.0
      ... )
      >>> params = {"w": jnp.zeros(3)}
      >>> grads = jax.grad(loss_fn)(params, batch)
      >>> updates, state = tx.update(grads, tx.init(params), params, batch=batch)
      >>> optax.apply_updates(params, updates)["w"].round(3)  # least squares: one step
      Array([ 1. , -2. ,  0.5], dtype=float32)
      >>> ngd.StepStatus(int(state.info.status)).name
      'TAKEN'

    References:
      Amari, Natural gradient works efficiently in learning, 1998; Schulman et al.,
      Trust region policy optimization, 2015; Martens, New insights and perspectives on
      the natural gradient method, 2020; for the momentum, Goldshlager, Abrahamsen and
      Lin, A Kaczmarz-inspired approach to accelerate the optimization of neural network
      wavefunctions, 2024, equation 15.

    Note:
      Inside `optax.inject_hyperparams`, list everything but `learning_rate`, `max_kl`,
      `damping` and `momentum` in `static_args`.
    """
    if learning_rate is None and max_kl is None:
        raise ValueError(
            "`learning_rate` and `max_kl` are both None: give one of them, or both."
        )
    _check_scalar("learning_rate", learning_rate, may_be_zero=True)
    return _Method(
        model_fn=model_fn,
        likelihood=likelihood,
        learning_rate=learning_rate,
        sign=-1.0,
        max_kl=max_kl,
        damping=damping,
        solver=solver,
        kind=kind,
        momentum=momentum,
        warm_start=warm_start,
        weights_fn=weights_fn,
        targets_fn=targets_fn,
        output_loss_fn=output_loss_fn,
        microbatch_size=microbatch_size,
        max_kl_evaluations=max_kl_evaluations,
        key=key,
    ).transformation()


def scale_by_natural_gradient(
    model_fn: ModelFn,
    likelihood: Likelihood,
    *,
    max_kl: ScalarOrSchedule | None = None,
    damping: Damping = 1e-3,
    solver: Solver = CG(),
    kind: Kind = "exact",
    momentum: ScalarOrSchedule = 0.0,
    warm_start: float = 0.0,
    weights_fn: Callable[[Batch], PyTree] | None = None,
    targets_fn: Callable[[Batch], PyTree] | None = None,
    output_loss_fn: Callable[[Outputs, Batch], Scalar] | None = None,
    microbatch_size: int | None = None,
    max_kl_evaluations: int = 10,
    key: KeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces a gradient g by the natural one, d = (F + λI)⁻¹ g: no sign, no rate.

    For chains that bring a sign and a learning rate of their own. With `max_kl` the
    direction comes out as long as its radius allows, s d with KL(θ ‖ θ - s d) at most
    `max_kl` and close to it: the KL is measured along -d, where a descent goes.

    Args:
      model_fn, likelihood, max_kl, damping, solver, kind, momentum, warm_start,
        weights_fn, targets_fn, output_loss_fn, microbatch_size, max_kl_evaluations,
        key: as for `natural_gradient`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `NaturalGradientState`.

    Raises:
      ValueError, TypeError: as `natural_gradient`.

    Example:
      >>> import optax, ngd_jax as ngd
      >>> model_fn = lambda params, batch: batch["x"] @ params["w"]
      >>> tx = optax.chain(
      ...     ngd.scale_by_natural_gradient(model_fn, ngd.Gaussian()),
      ...     optax.add_decayed_weights(1e-4),
      ...     optax.scale_by_learning_rate(0.5),
      ... )
    """
    return _Method(
        model_fn=model_fn,
        likelihood=likelihood,
        learning_rate=1.0 if max_kl is None else None,
        sign=1.0,
        max_kl=max_kl,
        damping=damping,
        solver=solver,
        kind=kind,
        momentum=momentum,
        warm_start=warm_start,
        weights_fn=weights_fn,
        targets_fn=targets_fn,
        output_loss_fn=output_loss_fn,
        microbatch_size=microbatch_size,
        max_kl_evaluations=max_kl_evaluations,
        key=key,
    ).transformation()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Method:
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
        _check_scalar("max_kl", self.max_kl, may_be_zero=False)
        if not isinstance(self.damping, RelativeDamping | LevenbergMarquardt):
            if self.damping is None:
                raise TypeError("`damping` must be a number or a rule, got None.")
            _check_scalar("damping", self.damping, may_be_zero=True)
        for name in ("momentum", "warm_start"):
            value = getattr(self, name)
            _check_scalar(name, value, may_be_zero=True)
            if isinstance(value, int | float) and value > 1:
                raise ValueError(f"`{name}` must be at most 1, got {value}.")
        if self.kind == "sampled" and self.key is None:
            raise ValueError('`key` is needed for kind="sampled", got None.')
        if self.kind == "empirical" and self.targets_fn is None:
            raise ValueError('`targets_fn` is needed for kind="empirical", got None.')
        if self.kind != "sampled" and self.key is not None:
            raise ValueError(
                f'`key` is for kind="sampled" only, got kind={self.kind!r}.'
            )
        if self.kind != "empirical" and self.targets_fn is not None:
            raise ValueError(
                f'`targets_fn` is for kind="empirical" only, got kind={self.kind!r}.'
            )
        adaptive = isinstance(self.damping, LevenbergMarquardt)
        if self.output_loss_fn is not None and not adaptive:
            raise ValueError(
                "`output_loss_fn` is for damping=LevenbergMarquardt(...), which weighs "
                f"actual against foretold reduction; got damping={self.damping!r}."
            )
        _check_count("max_kl_evaluations", self.max_kl_evaluations)
        if self.microbatch_size is not None:
            _check_count("microbatch_size", self.microbatch_size)

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        return optax.GradientTransformationExtraArgs(self.init, self.update)

    def init(self, params: Params) -> NaturalGradientState:
        _refuse_multi_steps()
        _check_params(params)
        dtype = tree.accumulator_dtype(params)

        # A buffer of its own for every entry: the state may be donated.
        def number() -> Array:
            return jnp.zeros((), dtype)

        def integer() -> Array:
            return jnp.zeros((), jnp.int32)

        damping = number()
        if isinstance(self.damping, LevenbergMarquardt):
            damping += self.damping.initial
        return NaturalGradientState(
            count=integer(),
            direction=tree.zeros_like_wide(params),
            damping=damping,
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
        _check_params(params)
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

        # 2. The direction, and how fast KL grows along it.
        direction, solver_info = self._solve(fisher, gradient, state, damping)
        quadratic = fisher.quadratic(direction)

        # 3. The length, by the KL of the very parameters that it leads to.
        def emit(scale: Scalar) -> PyTree:
            step = tree.scale(self.sign * scale, direction)
            return optax.tree.cast_like(step, params)

        def moved(emitted: PyTree) -> Params:
            if self.sign > 0:
                emitted = jax.tree.map(jnp.negative, emitted)
            return optax.apply_updates(params, emitted)

        gradient_size = tree.max_abs(tree.pack(gradient)[0])
        unit = jnp.where(gradient_size > 0, gradient_size, 1.0)
        scaled = tree.divide(tree.pack(direction)[0], unit)
        is_zero = tree.vdot(scaled, scaled) == 0
        step = self._step_size(
            lambda scale: fisher.kl(moved(emit(scale))),
            quadratic,
            is_zero,
            state.count,
            dtype,
        )
        emitted = emit(step.scale)

        # 4. Whether to take it.
        status = self._status(gradient_size, is_zero, solver_info, step, value)
        next_damping = damping
        if isinstance(self.damping, LevenbergMarquardt):
            actual = self._reduction(fisher, params, moved(emitted), value, value_fn)
            model = tree.vdot(gradient, direction) - step.scale * quadratic / 2
            status, next_damping = _adapt(
                self.damping, damping, status, actual, step.scale * model
            )
        taken = status == StepStatus.TAKEN

        predicted_kl = self._kl_curvature * step.scale**2 * quadratic / 2
        info = NaturalGradientInfo(
            solver=solver_info,
            predicted_kl=jnp.where(taken, predicted_kl, 0.0),
            measured_kl=jnp.where(taken, step.kl, 0.0),
            step_scale=jnp.where(taken, step.scale, 0.0),
            damping=damping,
            num_kl_evaluations=step.num_kl_evaluations,
            status=status,
        )
        new_state = NaturalGradientState(
            count=jnp.where(taken, optax.safe_increment(state.count), state.count),
            direction=tree.select(taken, direction, state.direction),
            damping=next_damping,
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
        is_zero: Array,
        count: Array,
        dtype: jnp.dtype,
    ) -> TrustRegionResult:
        rate = jnp.inf if self.learning_rate is None else _at(self.learning_rate, count)
        rate = jnp.asarray(rate).astype(dtype)
        if self.max_kl is None:
            kl = kl_fn(rate)
            one = jnp.ones((), jnp.int32)
            return TrustRegionResult(rate, kl, one, jnp.isfinite(kl))
        max_kl = jnp.asarray(_at(self.max_kl, count)).astype(dtype)
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
    """The status after weighing the reduction, and the next damping."""
    was_taken = status == StepStatus.TAKEN
    accepted = rule.accepts(actual=actual, predicted=predicted)
    adapted = rule.update(damping, actual=actual, predicted=predicted)
    # A step that was refused for other reasons says nothing about the model.
    next_damping = jnp.where(was_taken, adapted, damping).astype(damping.dtype)
    status = jnp.where(was_taken & ~accepted, StepStatus.NO_REDUCTION, status)
    return status.astype(jnp.int32), next_damping


def _at(value: Any, count: Array) -> Any:
    return value(count) if callable(value) else value


def _is_static_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _check_scalar(name: str, value: Any, *, may_be_zero: bool) -> None:
    """Raises unless `value` is None, a schedule, or a number in range."""
    if value is None or callable(value):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        # Arrays, traced ones above all: inject_hyperparams makes them of numbers.
        if hasattr(value, "dtype") and jnp.shape(value) == ():
            return
        raise TypeError(
            f"`{name}` must be a number or a schedule (count -> number), got {value!r}."
        )
    in_range = value >= 0 if may_be_zero else value > 0
    if not in_range or value == float("inf"):
        rule = "must be finite and not negative" if may_be_zero else "must be positive"
        raise ValueError(f"`{name}` {rule}, got {value}.")


def _check_count(name: str, value: Any) -> None:
    if name == "max_kl_evaluations" and hasattr(value, "dtype"):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"`{name}` must be a Python int, got {type(value).__name__}. Inside "
            f"optax.inject_hyperparams, list it in static_args."
        )
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _check_params(params: Params) -> None:
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    if any(is_masked(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_masked)):
        raise TypeError(
            "`params` hold optax.MaskedNode: natural_gradient runs the model, which "
            "needs all of its parameters, and so cannot be inside optax.masked or "
            "optax.partition. To train a part of the parameters, make `params` that "
            "part and close `model_fn` over the rest; to mask other transformations "
            "(weight decay, clipping), chain them behind this one."
        )
    tree.check_parameters(params)


def _refuse_multi_steps() -> None:
    """Raises inside of `optax.MultiSteps.init`.

    MultiSteps averages gradients over micro-batches and hands on the last `batch` only,
    silently. Nothing in the protocol tells a transformation that it is wrapped, so this
    looks at its callers, once for each `init`.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is optax.MultiSteps.init.__code__:
            raise TypeError(
                "natural_gradient cannot be inside optax.MultiSteps: the gradient would "
                "be that of all micro-batches, the metric and the KL that of the last "
                "one only. Hand over the whole batch and set `microbatch_size`, which "
                "bounds memory just the same."
            )
        frame = frame.f_back
