"""Which cases of a test run by default, and which only in `.ci/run`."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest

__all__ = ["float64_is_long", "long_unless"]


def long_unless(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases as parameters; those that are not in `quick` are `long`.

    Args:
      quick: values, or names.
      cases: values, tuples of them for several parameters, or a mapping from names.
    """
    named = cases if isinstance(cases, Mapping) else dict.fromkeys(cases)
    params = []
    for name, values in named.items():
        is_named = isinstance(cases, Mapping)
        values = values if is_named else name
        values = values if isinstance(values, tuple) else (values,)
        marks = [] if name in quick else [pytest.mark.long]
        params.append(pytest.param(*values, id=name if is_named else None, marks=marks))
    return params


# For tests that take the fixture `dtype`.
float64_is_long = pytest.mark.parametrize(
    "dtype", long_unless(["float32"], ["float32", "float64"]), indirect=True
)
