"""Numbers that may be schedules."""

from typing import Any

from ngd_jax.types import Array

__all__ = ["value_at"]


def value_at(value: Any, count: Array) -> Any:
    """The number, or the schedule's value after `count` steps."""
    return value(count) if callable(value) else value
