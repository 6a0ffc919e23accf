"""Typed settings: dataclass fields that carry the rule that their values must obey.

A configuration class declares `learning_rate: Annotated[float, POSITIVE]`; its values
are in `configs/`. `None` passes if the type allows it, and a list if each of its
elements does. Knows neither Hydra nor any task.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

__all__ = [
    "AT_LEAST_ONE",
    "FRACTION",
    "NON_NEGATIVE",
    "POSITIVE",
    "SEED",
    "ConfigError",
    "Rule",
    "check_rules",
    "one_of",
    "one_of_or_own",
]


class ConfigError(ValueError):
    """A mistake in the configuration, reported in one line that names the setting."""


class Rule(NamedTuple):
    """What a value must satisfy, in words and as a predicate.

    Attributes:
      text: completes the sentence "`name` must be ...".
      holds: the predicate, written so that NaN fails it.
    """

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("positive and finite", lambda value: 0.0 < value < math.inf)
NON_NEGATIVE = Rule("zero or more, and finite", lambda value: 0.0 <= value < math.inf)
FRACTION = Rule("in [0, 1)", lambda value: 0.0 <= value < 1.0)
AT_LEAST_ONE = Rule("at least 1", lambda value: value >= 1)


def one_of(*names: str) -> Rule:
    """The rule of a setting that must be one of a few names."""
    return Rule(f"one of {', '.join(names)}", lambda value: value in names)


def one_of_or_own(*names: str) -> Rule:
    """The rule of a setting that is one of a few names, or "module:function"."""
    return Rule(
        f"one of {', '.join(names)}, or a module:function of your own",
        lambda value: value in names or ":" in value,
    )


SEED = Rule("between 0 and 2^31 - 1", lambda value: 0 <= value < 2**31)


def check_rules(config: Any, prefix: str = "") -> None:
    """Checks every field of a configuration dataclass, nested ones too, by its rule.

    Args:
      config: a dataclass instance.
      prefix: dotted path of `config` in the whole configuration, for the message.

    Raises:
      ConfigError: names the setting, the rule and the actual value.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_rules(value, f"{name}.")
        elements = value if isinstance(value, list) else [value]
        for rule in getattr(hints[field.name], "__metadata__", ()):
            if isinstance(rule, Rule) and not all(
                rule.holds(element) for element in elements if element is not None
            ):
                raise ConfigError(f"`{name}` must be {rule.text}, got {value}.")
