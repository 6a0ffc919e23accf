"""Checks of arguments that several parts of the library take."""

from typing import Any

__all__ = ["check_count"]


def check_count(name: str, value: Any, hint: str = "") -> None:
    """Raises unless `value` is a positive int, static under jit.

    Raises:
      TypeError: on anything but a Python int; `hint` ends the message.
      ValueError: on a number below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"`{name}` must be a Python int (static under jit), got "
            f"{type(value).__name__}.{hint}"
        )
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
