"""Builds objects from a configuration: `_target_` names a constructor.

The other entries are its arguments. This is the convention of
`hydra.utils.instantiate`, which we cannot use: it turns the frozen dataclasses that it
is given into configurations, and its errors do not say which arguments a constructor
takes.
"""

import copy
import dataclasses
import functools
import inspect
import math
import pkgutil
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from experiments.running.settings import ConfigError, check_rules

__all__ = ["build", "locate", "settings_class"]


def build(node: Any, path: str, offered: Mapping[str, Any] | None = None) -> Any:
    """Builds what `node` describes; a node without `_target_` is returned as it is.

    Args:
      node: numbers, text, lists and dictionaries.
      path: dotted name of `node` in the whole configuration, for messages.
      offered: arguments by name, passed to every constructor in `node` that has a
        parameter of that name and is not given it.

    Raises:
      ConfigError: a constructor does not know a name or refuses a value.
    """
    offered = offered or {}
    if isinstance(node, list):
        return [build(item, f"{path}[{i}]", offered) for i, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    given = {
        name: build(value, f"{path}.{name}", offered)
        for name, value in node.items()
        if name != "_target_"
    }
    if "_target_" not in node:
        return given
    target = locate(node["_target_"], f"{path}._target_")
    parameters = _parameters(target)
    for name, value in given.items():
        if name not in parameters:
            raise ConfigError(
                f"`{path}.{name}` is not a setting of {node['_target_']}, which has "
                f"{', '.join(n for n in parameters if n not in offered)}."
            )
        kind = parameters[name].annotation
        given[name] = _checked(f"{path}.{name}", value, kind)
    for name in parameters.keys() & offered.keys() - given.keys():
        given[name] = offered[name]
    try:
        built = target(**given)
    except (TypeError, ValueError) as error:
        # Constructors name their arguments in backticks: replace by the full names.
        message = re.sub(r"`(\w+)`", rf"`{path}.\1`", str(error), count=1)
        message = message if message.startswith("`") else f"`{path}`: {message}"
        raise ConfigError(message) from error
    if dataclasses.is_dataclass(built):
        check_rules(built, f"{path}.")
    return built


def locate(name: Any, path: str) -> Callable[..., Any]:
    """Imports the object `name`, "package.module.object" or "package.module:object".

    Raises:
      ConfigError: there is no such module or object, or it is not callable.
    """
    try:
        found = pkgutil.resolve_name(str(name))
    except Exception as error:  # anything that a module raises on import
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"`{path}` must name what can be imported, got {name}: {reason}."
        ) from error
    if not callable(found):
        raise ConfigError(f"`{path}` must name what can be called, got {name}.")
    return found


@functools.cache
def settings_class(target: Callable[..., Any]) -> type:
    """The arguments of `target` as a dataclass, which also has `_target_` and `name`.

    A dataclass is used as it is and gets `_target_` only.
    """
    if isinstance(target, type) and dataclasses.is_dataclass(target):
        return dataclasses.make_dataclass(
            target.__name__, [("_target_", str)], bases=(target,), kw_only=True
        )
    fields: list[Any] = [("_target_", str), ("name", str)]
    for name, parameter in _parameters(target).items():
        kind = Any if parameter.annotation is parameter.empty else parameter.annotation
        fields.append((name, kind))
        if parameter.default is not parameter.empty:
            default = functools.partial(copy.copy, parameter.default)
            fields[-1] += (dataclasses.field(default_factory=default),)
    return dataclasses.make_dataclass(target.__name__, fields, kw_only=True)


def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    parameters = inspect.signature(target, eval_str=True).parameters
    anything = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: one for name, one in parameters.items() if one.kind not in anything}


def _checked(path: str, value: Any, annotation: Any) -> Any:
    """Refuses values that constructors of other libraries notice late or never."""
    if isinstance(value, str) and not _takes_text(annotation):
        group = path.replace(".", "/")
        raise ConfigError(
            f"`{path}` must not be text, got {value!r}; if there are files to choose "
            f"from, `{group}={value}` chooses one."
        )
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"`{path}` must be a number, got nan.")
    if annotation is int and isinstance(value, float | bool):
        raise ConfigError(f"`{path}` must be a whole number, got {value}.")
    kinds = typing.get_args(annotation) or (annotation,)
    is_written_as_int = type(value) is int and float in kinds and int not in kinds
    return float(value) if is_written_as_int else value


def _takes_text(annotation: Any) -> bool:
    if typing.get_origin(annotation) is typing.Literal:
        return True
    if parts := typing.get_args(annotation):
        return any(map(_takes_text, parts))
    unknown = annotation in (Any, inspect.Parameter.empty)
    return unknown or annotation is str or isinstance(annotation, str)
