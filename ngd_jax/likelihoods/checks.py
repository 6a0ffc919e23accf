"""Errors of shape, structure and dtype, raised while a function is being traced.

Each message names the argument and the likelihood, says what was expected and what
came, and what to do. Knows nothing of the distributions.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ngd_jax.types import Array, PyTree

__all__ = [
    "batch_shape_of",
    "check_dict",
    "check_floating",
    "check_like",
    "check_nonnegative",
    "check_nonnegative_int",
    "check_positive",
    "check_targets",
    "describe",
]


def describe(tree: PyTree) -> str:
    """Says what came, in a few words: `float32[8, 3]`, `{'mean': float32[8]}`."""
    if isinstance(tree, dict):
        inner = ", ".join(f"{name!r}: {describe(leaf)}" for name, leaf in tree.items())
        return f"{{{inner}}}"
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        return f"{tree.dtype}[{', '.join(map(str, tree.shape))}]"
    if isinstance(tree, (bool, int, float, complex, str, type(None))):
        return repr(tree)
    return f"a {type(tree).__name__}"


def check_floating(
    likelihood: Any, array: Array, *, name: str, expected: str, kind: Any = jnp.floating
) -> None:
    """Raises TypeError unless `array` is an array of floating dtype."""
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise TypeError(
            f"`{name}` of {likelihood!r} must be an array, {expected}, "
            f"got {describe(array)}."
        )
    if not jnp.issubdtype(array.dtype, kind):
        raise TypeError(
            f"`{name}` of {likelihood!r} must be {expected} with a "
            f"{'floating point' if kind is jnp.floating else 'floating or complex'} "
            f"dtype, got {describe(array)}; convert with `.astype(jnp.float32)`."
        )


def batch_shape_of(
    likelihood: Any, array: Array, event_ndims: int, *, name: str, expected: str
) -> tuple[int, ...]:
    """The leading axes of `array`; raises unless it is floating with an event."""
    check_floating(likelihood, array, name=name, expected=expected)
    if len(array.shape) < event_ndims:
        raise ValueError(
            f"`{name}` of {likelihood!r} must be {expected}: the last {event_ndims} "
            f"axes are one example and those before it the batch, got "
            f"{describe(array)}. Return one more axis from `model_fn`, or construct "
            f"the likelihood with fewer `event_ndims`."
        )
    return tuple(array.shape[: len(array.shape) - event_ndims])


def check_dict(
    likelihood: Any, tree: PyTree, names: tuple[str, ...], *, name: str
) -> None:
    """Raises unless `tree` is a dict with exactly the keys `names`."""
    if not isinstance(tree, dict):
        raise TypeError(
            f"`{name}` of {likelihood!r} must be a dict with the keys {list(names)}, "
            f"got {describe(tree)}."
        )
    if set(tree) != set(names):
        raise ValueError(
            f"`{name}` of {likelihood!r} must have exactly the keys {list(names)}, got "
            f"{sorted(map(str, tree))}."
        )


def check_like(likelihood: Any, tree: PyTree, outputs: PyTree, *, name: str) -> None:
    """Raises unless `tree` has the structure and shapes of `outputs`, and is inexact.

    Used for tangents, coefficients and the second outputs of a divergence.
    """
    structure = jax.tree.structure(tree)
    if structure != jax.tree.structure(outputs):
        raise ValueError(
            f"`{name}` of {likelihood!r} must have the tree structure of the outputs, "
            f"{describe(outputs)}, got {describe(tree)}."
        )
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(outputs), strict=True)
    for leaf, like in pairs:
        if jnp.shape(leaf) != jnp.shape(like):
            raise ValueError(
                f"`{name}` of {likelihood!r} must have the shapes of the outputs, "
                f"{describe(outputs)}, got {describe(tree)}."
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"`{name}` of {likelihood!r} must have a floating point dtype, got "
                f"{describe(tree)}; convert with `.astype(jnp.float32)`."
            )


def check_targets(
    likelihood: Any, targets: Array, shape: tuple[int, ...], *, what: str
) -> None:
    """Raises unless `targets` is a real array of exactly `shape`.

    Exactly, because targets [N] against outputs [N, 1] would broadcast to [N, N].
    """
    if not (hasattr(targets, "shape") and hasattr(targets, "dtype")):
        raise TypeError(
            f"`targets` of {likelihood!r} must be an array of {what}, got "
            f"{describe(targets)}."
        )
    if tuple(targets.shape) != tuple(shape):
        raise ValueError(
            f"`targets` of {likelihood!r} must be {what} of shape {tuple(shape)}, the "
            f"shape of the outputs, got {describe(targets)}; reshape the targets or "
            f"let `model_fn` return that shape."
        )
    if jnp.issubdtype(targets.dtype, jnp.complexfloating):
        raise TypeError(
            f"`targets` of {likelihood!r} must be real {what}, got {describe(targets)}."
        )


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a finite number above zero."""
    _check_number(name, value)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"`{name}` must be positive, got {value!r}.")


def check_nonnegative(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a finite number, zero or above."""
    _check_number(name, value)
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"`{name}` must not be negative, got {value!r}.")


def check_nonnegative_int(name: str, value: int) -> None:
    """Raises unless `value` is an integer, zero or above."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < 0:
        raise ValueError(f"`{name}` must not be negative, got {value!r}.")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"`{name}` must be a Python number (it is static), got {describe(value)}."
        )
