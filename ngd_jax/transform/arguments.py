"""Checks of arguments, at construction and at trace time."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.types import Params

__all__ = ["check_count", "check_params", "check_scalar", "refuse_multi_steps"]


def check_scalar(name: str, value: Any, *, may_be_zero: bool) -> None:
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


def check_count(name: str, value: Any) -> None:
    """Raises unless `value` is a positive int; trial budgets may also be traced."""
    if name == "max_kl_evaluations" and hasattr(value, "dtype"):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"`{name}` must be a Python int, got {type(value).__name__}. Inside "
            f"optax.inject_hyperparams, list it in static_args."
        )
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


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
