"""Checks of a call that both adapters share, with errors that say what is missing."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ngd_jax.types import Batch, KeyArray

__all__ = ["arguments_of", "check_call", "check_names", "entry_of", "keys_of"]


def check_names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple; refuses a bare string, which is a sequence of letters."""
    if isinstance(names, str):
        raise TypeError(
            f"`{argument}` must be a sequence of names, got a string: write "
            f"({names!r},)."
        )
    return tuple(names)


def check_call(called: Any, method: Any, kwargs: Mapping[str, Any], owner: str) -> None:
    """Raises unless the method exists and takes the keyword arguments."""
    if called is None:
        raise ValueError(
            f"`method` must be a method of `{owner}` or its name, got {method!r}."
        )
    parameters = inspect.signature(called).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in kwargs:
        if name not in parameters:
            raise TypeError(
                f"`{name}` is neither an option of this adapter nor an argument of the "
                f"{owner}'s {getattr(called, '__name__', 'method')}: it takes "
                f"{list(parameters)}."
            )


def entry_of(batch: Batch, name: str, needed_by: str) -> Any:
    """`batch[name]`, or an error that says which argument asks for it."""
    if not isinstance(batch, Mapping) or name not in batch:
        found = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f'`batch` lacks the entry "{name}", which `{needed_by}` asks for: got '
            f"{found}."
        )
    return batch[name]


def arguments_of(batch: Batch, inputs_fn: Callable[[Batch], Any] | None) -> tuple:
    """The positional arguments of the call; `(batch["x"],)` without `inputs_fn`."""
    if inputs_fn is None:
        return (entry_of(batch, "x", "inputs_fn=None"),)
    inputs = inputs_fn(batch)
    return inputs if isinstance(inputs, tuple) else (inputs,)


def keys_of(batch: Batch, rngs: tuple[str, ...]) -> dict[str, KeyArray]:
    """The keys of the streams `rngs`, from `batch["rngs"]`."""
    if not rngs:
        return {}
    given = entry_of(batch, "rngs", "rngs")
    for name in rngs:
        if not isinstance(given, Mapping) or name not in given:
            raise ValueError(
                f'`batch["rngs"]` must be a dict with a key for each of rngs={rngs}: '
                f"{name!r} is missing."
            )
    return {name: given[name] for name in rngs}
