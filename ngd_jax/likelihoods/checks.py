"""Errors of shape, structure and dtype, raised while a function is being traced.

Each message names the argument and the likelihood, states the rule, shows what was
passed, and says what to do. Knows nothing of the distributions.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ngd_jax.types import Array, PyTree

__all__ = [
    "batch_shape_of",
    "check_dict",
    "check_inexact",
    "check_number",
    "check_targets",
    "describe",
    "message",
]


def describe(values: PyTree) -> str:
    """Describes an argument briefly: `float32[8, 3]`, `{'mean': float32[8]}`."""
    if isinstance(values, dict):
        inner = ", ".join(f"{name!r}: {describe(x)}" for name, x in values.items())
        return f"{{{inner}}}"
    if _is_array(values):
        return f"{values.dtype}[{', '.join(map(str, values.shape))}]"
    if isinstance(values, (bool, int, float, complex, str, type(None))):
        return repr(values)
    return f"a {type(values).__name__}"


def message(
    likelihood: Any, name: str, rule: str, values: PyTree, advice: str = ""
) -> str:
    """The text of an error: "`name` of ... must `rule`, got `values`; `advice`."."""
    text = f"`{name}` of {likelihood!r} must {rule}, got {describe(values)}"
    return f"{text}; {advice}." if advice else f"{text}."


def batch_shape_of(
    likelihood: Any,
    array: Array,
    event_ndims: int,
    *,
    expected: str,
    name: str = "outputs",
    kind: Any = jnp.floating,
) -> tuple[int, ...]:
    """The leading axes of `array`; raises unless it is an array of `kind` with them."""
    if not (_is_array(array) and jnp.issubdtype(array.dtype, kind)):
        dtypes = "floating point" if kind is jnp.floating else "floating or complex"
        rule = f"be {expected} with a {dtypes} dtype"
        raise TypeError(message(likelihood, name, rule, array, _TO_FLOAT))
    if len(array.shape) < event_ndims:
        rule = f"be {expected}, whose last {event_ndims} axes are one example"
        advice = "return more axes from `model_fn`, or use fewer `event_ndims`"
        raise ValueError(message(likelihood, name, rule, array, advice))
    return tuple(array.shape[: len(array.shape) - event_ndims])


def check_inexact(likelihood: Any, values: PyTree, *, name: str) -> None:
    """Raises TypeError unless all leaves have floating point or complex dtypes."""
    for leaf in jax.tree.leaves(values):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            rule = "have a floating point dtype"
            raise TypeError(message(likelihood, name, rule, values, _TO_FLOAT))


def check_dict(
    likelihood: Any, values: PyTree, names: Iterable[str], *, name: str
) -> None:
    """Raises unless `values` is a dict with exactly the keys `names`."""
    if not isinstance(values, dict) or set(values) != set(names):
        error = ValueError if isinstance(values, dict) else TypeError
        rule = f"be a dict with exactly the keys {list(names)}"
        raise error(message(likelihood, name, rule, values))


def check_targets(
    likelihood: Any, targets: Array, shape: tuple[int, ...], *, what: str
) -> None:
    """Raises unless `targets` is a real array of exactly `shape`.

    Exactly, because targets [N] against outputs [N, 1] would broadcast to [N, N].
    """
    if not _is_array(targets) or jnp.issubdtype(targets.dtype, jnp.complexfloating):
        rule = f"be a real array of {what}"
        raise TypeError(message(likelihood, "targets", rule, targets))
    if tuple(targets.shape) != tuple(shape):
        rule = f"be {what} of shape {tuple(shape)}, the shape of the outputs"
        advice = "reshape the targets or let `model_fn` return that shape"
        raise ValueError(message(likelihood, "targets", rule, targets, advice))


def check_number(
    name: str, value: Any, kind: type = float, *, is_positive: bool = False
) -> None:
    """Raises unless `value` is finite, of `kind` or int, and not below (or at) zero."""
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        what = (
            "an integer"
            if kind is int
            else "a Python number (it is static: float(x) makes one)"
        )
        raise TypeError(f"`{name}` must be {what}, got {describe(value)}.")
    if not math.isfinite(value) or value < 0 or (is_positive and value == 0):
        rule = "must be positive" if is_positive else "must not be negative"
        raise ValueError(f"`{name}` {rule}, got {value!r}.")


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


_TO_FLOAT = "convert with `jnp.asarray(..., jnp.float32)`"
