"""Checks of arguments, at construction and at trace time."""

import sys
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.acceptance import SufficientDecrease
from ngd_jax.arguments import check_count
from ngd_jax.damping import LevenbergMarquardt, RelativeDamping
from ngd_jax.fisher import Kind
from ngd_jax.quadratic_model import QuadraticModelRate
from ngd_jax.relative_radius import RelativeRadius
from ngd_jax.types import Params

__all__ = ["check_options", "check_params", "refuse_multi_steps"]


def check_options(options: Any) -> None:
    """Raises unless the arguments of `natural_gradient` make sense by themselves."""
    for name in ("model_fn", "solver"):
        if not callable(getattr(options, name)):
            raise TypeError(
                f"`{name}` must be callable, got {type(getattr(options, name))}."
            )
    if isinstance(options.likelihood, type) or not hasattr(options.likelihood, "kl"):
        raise TypeError(
            f"`likelihood` must be an instance such as ngd_jax.Categorical(), got "
            f"{options.likelihood!r}."
        )
    _check_numbers(options)
    _check_kind(options)
    _check_acceptance(options.acceptance)
    _check_uses(options)


def _check_numbers(options: Any) -> None:
    if options.learning_rate is None and options.max_kl is None:
        raise ValueError(
            "`learning_rate` and `max_kl` are both None: give one of them, or both."
        )
    if not isinstance(options.learning_rate, QuadraticModelRate):
        _check_scalar("learning_rate", options.learning_rate, may_be_zero=True)
    if not isinstance(options.max_kl, RelativeRadius):
        _check_scalar("max_kl", options.max_kl, may_be_zero=False)
    elif options.learning_rate is None:
        raise ValueError(
            "`learning_rate` must be given where max_kl=RelativeRadius(...), which "
            "first tries a step of that rate, got None."
        )
    if not isinstance(options.rule, RelativeDamping | LevenbergMarquardt):
        if options.rule is None:
            raise TypeError("`damping` must be a number or a rule, got None.")
        _check_scalar("damping", options.rule, may_be_zero=True)
    for name in ("momentum", "warm_start"):
        value = getattr(options, name)
        _check_scalar(name, value, may_be_zero=True)
        if isinstance(value, int | float) and value > 1:
            raise ValueError(f"`{name}` must be at most 1, got {value}.")
    hint = " Inside optax.inject_hyperparams, list it in static_args."
    # Trial budgets may also be traced.
    if not hasattr(options.max_kl_evaluations, "dtype"):
        check_count("max_kl_evaluations", options.max_kl_evaluations, hint)
    if options.microbatch_size is not None:
        check_count("microbatch_size", options.microbatch_size, hint)


def _check_acceptance(acceptance: Any) -> None:
    if acceptance is not None and not isinstance(acceptance, SufficientDecrease):
        raise TypeError(
            f"`acceptance` must be None or SufficientDecrease(...), got {acceptance!r}."
        )


def _check_kind(options: Any) -> None:
    if options.kind not in get_args(Kind):
        raise ValueError(
            f"`kind` must be one of {get_args(Kind)}, got {options.kind!r}."
        )
    for kind, name in (("sampled", "key"), ("empirical", "targets_fn")):
        is_given = getattr(options, name) is not None
        if (options.kind == kind) and not is_given:
            raise ValueError(f"`{name}` is needed for kind={kind!r}, got None.")
        if (options.kind != kind) and is_given:
            raise ValueError(
                f"`{name}` is for kind={kind!r} only, got kind={options.kind!r}."
            )


def _check_uses(options: Any) -> None:
    """Refuses what would be accepted and ignored."""
    solver, momentum = options.solver, options.momentum
    is_relative = isinstance(options.max_kl, RelativeRadius)
    if is_relative and options.acceptance is not None:
        raise ValueError(
            f"`acceptance` refuses steps that do not lower the loss, which "
            f"max_kl=RelativeRadius(...) takes on purpose: leave it None, got "
            f"{options.acceptance!r}."
        )
    weighs = is_relative or options.acceptance
    weighs = weighs or isinstance(options.rule, LevenbergMarquardt)
    with_metric_batch = options.metric_batch_fn is not None
    in_output_space = getattr(solver, "uses_coefficients", False)
    if options.output_loss_fn is not None and not (
        weighs
        or getattr(solver, "uses_objective", False)
        or (in_output_space and not with_metric_batch)
    ):
        raise ValueError(
            f"`output_loss_fn` is for damping=LevenbergMarquardt(...), "
            f"max_kl=RelativeRadius(...) and `acceptance`, which weigh actual against "
            f"foretold reduction, and for solvers in the space of outputs "
            f"(SampleSpace, LSMR, SVD) without `metric_batch_fn`; got "
            f"damping={options.damping!r}, solver={solver!r}."
        )
    has_momentum = not (isinstance(momentum, int | float) and momentum == 0)
    if isinstance(options.learning_rate, QuadraticModelRate) and has_momentum:
        raise ValueError(
            f"`momentum` is chosen by learning_rate=QuadraticModelRate(...): leave it "
            f"0, got {momentum!r}."
        )


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


def check_params(params: Params) -> None:
    """Raises unless the model can run at `params`, and they can be differentiated."""
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


def refuse_multi_steps() -> None:
    """Raises inside of `optax.MultiSteps.init`.

    MultiSteps averages gradients over micro-batches and hands on the last `batch` only,
    silently. Nothing in the protocol tells a transformation that it is wrapped, so this
    looks at its callers, once for each `init`.
    """
    frame = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        if frame.f_code is optax.MultiSteps.init.__code__:
            raise TypeError(
                "natural_gradient cannot be inside optax.MultiSteps: the gradient "
                "would be that of all micro-batches, the metric and the KL those of "
                "the last one. Hand over the whole batch and set `microbatch_size`, "
                "which bounds memory just the same."
            )
        frame = frame.f_back
