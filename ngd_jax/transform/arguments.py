"""The arguments of `natural_gradient`, checked at construction and at trace time."""

import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ngd_jax.damping import CovariantDamping, LevenbergMarquardt, RelativeDamping
from ngd_jax.likelihoods import Likelihood
from ngd_jax.metric import Metric
from ngd_jax.solvers.protocol import Solver
from ngd_jax.trust_region import RadiusRule, RateRule, SufficientDecrease
from ngd_jax.types import (
    Batch,
    ModelFn,
    Outputs,
    Params,
    PyTree,
    Scalar,
    ScalarOrSchedule,
)

__all__ = [
    "Damping",
    "Radius",
    "Rate",
    "Settings",
    "check_manual_axes",
    "check_wrappers",
    "is_zero",
    "split_functions",
]

Damping = ScalarOrSchedule | RelativeDamping | LevenbergMarquardt | CovariantDamping
Radius = ScalarOrSchedule | RadiusRule | None
Rate = ScalarOrSchedule | RateRule | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The checked arguments of `natural_gradient`, which documents them.

    Attributes:
      sign: -1 for updates, 1 for directions without a sign.
    """

    learning_rate: Rate
    model_fn: ModelFn
    likelihood: Likelihood
    max_kl: Radius
    damping: Damping
    momentum: ScalarOrSchedule
    solver: Solver
    loss_fn: Callable[[Outputs, Batch], Scalar] | None
    accept: SufficientDecrease | None
    metric: Metric
    sign: float = -1.0

    def __post_init__(self) -> None:
        self._check_types()
        self._check_numbers()
        self._check_uses()

    @property
    def damping_rule(self) -> Any:
        """The number or rule that sets λ, whatever the coordinates."""
        if isinstance(self.damping, CovariantDamping):
            return self.damping.damping
        return self.damping

    @property
    def keeps_direction(self) -> bool:
        """Whether the next step uses the last direction."""
        rate = self.learning_rate
        return (
            not is_zero(self.momentum)
            or not is_zero(self.solver.warm_start)
            or (isinstance(rate, RateRule) and rate.uses_previous)
        )

    @property
    def needs_loss(self) -> str | None:
        """The setting that needs the loss, as it was written; None if none does."""
        if isinstance(self.damping_rule, LevenbergMarquardt):
            return "damping=LevenbergMarquardt(...)"
        if isinstance(self.max_kl, RadiusRule):
            return f"max_kl={self.max_kl!r}"
        if self.accept is not None:
            return f"accept={self.accept!r}"
        return f"solver={self.solver!r}" if self.solver.uses_objective else None

    def _check_types(self) -> None:
        if not callable(self.model_fn):
            raise TypeError(f"`model_fn` must be callable, got {type(self.model_fn)}.")
        origins = {base.__module__ for base in type(self.model_fn).__mro__}
        for library in ("linen", "nnx"):
            if any(origin.startswith(f"flax.{library}.") for origin in origins):
                raise TypeError(
                    f"`model_fn` must be a function (params, batch) -> outputs, got a "
                    f"module of Flax: wrap it in ngd_jax.flax.{library}_model_fn."
                )
        is_likelihood = hasattr(self.likelihood, "kl")
        if isinstance(self.likelihood, type) or not is_likelihood:
            raise TypeError(
                f"`likelihood` must be an instance such as ngd_jax.Categorical(), got "
                f"{self.likelihood!r}."
            )
        expected = {
            "solver": (Solver, "an ngd_jax.Solver such as ngd_jax.CG()"),
            "metric": (Metric, "an ngd_jax.Metric(...)"),
        }
        if self.accept is not None:
            expected["accept"] = (SufficientDecrease, "None or SufficientDecrease(...)")
        for name, (kind, what) in expected.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"`{name}` must be {what}, got {value!r}.")

    def _check_numbers(self) -> None:
        if self.learning_rate is None and self.max_kl is None:
            raise ValueError(
                "`learning_rate` and `max_kl` are both None: give one of them, or both."
            )
        if not isinstance(self.learning_rate, RateRule):
            _check_scalar("learning_rate", self.learning_rate, may_be_zero=True)
        if not isinstance(self.max_kl, RadiusRule):
            _check_scalar("max_kl", self.max_kl, may_be_zero=False)
        elif self.learning_rate is None:
            raise ValueError(
                f"`learning_rate` must be given with max_kl={self.max_kl!r}, which "
                f"first tries a step of that rate, got None."
            )
        rule = self.damping_rule
        if not isinstance(rule, RelativeDamping | LevenbergMarquardt):
            if rule is None:
                raise TypeError("`damping` must be a number or a rule, got None.")
            _check_scalar("damping", rule, may_be_zero=True)
        _check_scalar("momentum", self.momentum, may_be_zero=True)
        if isinstance(self.momentum, int | float) and self.momentum > 1:
            raise ValueError(f"`momentum` must be at most 1, got {self.momentum}.")

    def _check_uses(self) -> None:
        """Raises for settings that would otherwise be ignored."""
        if isinstance(self.max_kl, RadiusRule) and self.accept is not None:
            raise ValueError(
                f"`accept` refuses steps that do not lower the loss, which "
                f"max_kl={self.max_kl!r} takes on purpose: leave it None, got "
                f"{self.accept!r}."
            )
        in_output_space = self.solver.uses_coefficients and self.metric.batch_fn is None
        if self.loss_fn is not None and not (self.needs_loss or in_output_space):
            raise ValueError(
                f"`loss_fn` is for rules that weigh the loss "
                f"(damping=LevenbergMarquardt(...), `accept`, a rule as `max_kl`) and "
                f"for solvers in the space of outputs (SampleSpace, LSMR) without "
                f"`batch_fn`; got damping={self.damping!r}, solver={self.solver!r}."
            )
        if isinstance(self.learning_rate, RateRule) and not is_zero(self.momentum):
            raise ValueError(
                f"`momentum` is chosen by learning_rate={self.learning_rate!r}: leave "
                f"it 0, got {self.momentum!r}."
            )


def is_zero(value: Any) -> bool:
    """Whether a setting is the number 0, and no schedule that may become it."""
    return isinstance(value, int | float) and value == 0


def _check_scalar(name: str, value: Any, *, may_be_zero: bool) -> None:
    """Raises unless `value` is None, a schedule, or a number in range."""
    if value is None or callable(value):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        # An array, usually traced: inject_hyperparams turns numbers into arrays.
        if hasattr(value, "dtype") and jnp.shape(value) == ():
            return
        raise TypeError(
            f"`{name}` must be a number or a schedule (count -> number), got {value!r}."
        )
    in_range = value >= 0 if may_be_zero else value > 0
    if not in_range or value == float("inf"):
        rule = "must be finite and not negative" if may_be_zero else "must be positive"
        raise ValueError(f"`{name}` {rule}, got {value}.")


def split_functions(
    params: Params,
) -> tuple[Params, Callable[[ModelFn], ModelFn]]:
    """Separates the arrays of a model from its functions, such as activations.

    Some libraries keep functions among the leaves of a model, with `None` in their
    place in its gradient.

    Returns:
      The parameters with None for every function, and a map from a model of all leaves
      to a model of those parameters.
    """
    leaves, structure = jax.tree.flatten(params)
    is_function = [callable(x) and not hasattr(x, "dtype") for x in leaves]
    if not any(is_function):
        return params, lambda model_fn: model_fn
    pairs = list(zip(leaves, is_function, strict=True))
    arrays = [None if is_fn else leaf for leaf, is_fn in pairs]

    def model_from(model_fn: ModelFn) -> ModelFn:
        def model_of_arrays(arrays: PyTree, batch: Batch) -> Outputs:
            rest = iter(jax.tree.leaves(arrays))
            merged = [leaf if is_fn else next(rest) for leaf, is_fn in pairs]
            return model_fn(jax.tree.unflatten(structure, merged), batch)

        return model_of_arrays

    return jax.tree.unflatten(structure, arrays), model_from


def check_manual_axes(values: PyTree) -> None:
    """Raises inside `jax.shard_map` or `jax.pmap`, unless all devices do the same.

    Averaging the gradients by hand is not enough: F, the solver's inner products and
    the KL are sums over all examples too.

    Args:
      values: parameters, gradient and batch.

    Raises:
      ValueError: naming the mesh axis and what to do.
    """
    for axis in jax.sharding.get_abstract_mesh().manual_axes:
        is_hidden = not _varies(jax.lax.axis_index(axis), axis)  # check_vma=False
        if is_hidden or any(_varies(x, axis) for x in jax.tree.leaves(values)):
            raise ValueError(
                f"natural_gradient cannot take its step inside jax.shard_map or "
                f"jax.pmap, where every device sees its own part along {axis!r}: F and "
                f"the KL are of all examples. Call tx.update under jax.jit alone, on "
                f"arrays whose examples are divided over the mesh; train independent "
                f"models by jax.vmap."
            )


def _varies(value: Any, axis: Any) -> bool:
    """Whether JAX's types say that a value differs along a manual mesh axis."""
    kind = jax.typeof(value)
    # Before jax 0.10 the set itself.
    return axis in (kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying)


def _nested_code(function: Any, name: str) -> types.CodeType | None:
    constants = function.__code__.co_consts
    codes = (c for c in constants if isinstance(c, types.CodeType))
    return next((code for code in codes if code.co_name == name), None)


def check_wrappers() -> None:
    """Raises inside `optax.MultiSteps.init` and `optax.flatten`.

    MultiSteps averages gradients over micro-batches and passes on only the last
    `batch`; flatten passes on one vector in place of the model's parameters. Nothing in
    the protocol tells a transformation that it is wrapped, so this looks at its
    callers, once for each `init`.
    """
    reasons = {
        optax.MultiSteps.init.__code__: (
            "natural_gradient cannot be inside optax.MultiSteps: the gradient would be "
            "that of all micro-batches, the metric and the KL those of the last one. "
            "Hand over the whole batch and set metric=Metric(microbatch_size=...), "
            "which bounds memory just the same."
        ),
        _nested_code(optax.flatten, "init_fn"): (
            "natural_gradient cannot be inside optax.flatten: `model_fn` would get one "
            "vector in place of its parameters. Leave optax.flatten out; the "
            "solvers join small arrays by themselves."
        ),
    }
    frame = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        if frame.f_code in reasons:
            raise TypeError(reasons[frame.f_code])
        frame = frame.f_back
