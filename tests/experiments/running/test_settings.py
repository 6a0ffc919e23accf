import dataclasses
import math
from typing import Annotated

import pytest

from experiments.running.settings import (
    AT_LEAST_ONE,
    FRACTION,
    NON_NEGATIVE,
    POSITIVE,
    SEED,
    ConfigError,
    check_rules,
)


@dataclasses.dataclass
class Inner:
    sizes: Annotated[list[int], AT_LEAST_ONE]


@dataclasses.dataclass
class Outer:
    rate: Annotated[float | None, POSITIVE]
    inner: Inner


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (POSITIVE, [1e-30, 1, 5.0], [0.0, -1.0, math.nan, math.inf]),
        (NON_NEGATIVE, [0.0, 2], [-1e-30, math.nan, math.inf]),
        (FRACTION, [0.0, 0.99], [1.0, -0.1, math.nan]),
        (AT_LEAST_ONE, [1, 7], [0, -3]),
        (SEED, [0, 2**31 - 1], [-1, 2**31]),
    ],
)
def test_rule_holds_for_good_values_only(rule, good, bad):
    assert all(rule.holds(value) for value in good)
    assert not any(rule.holds(value) for value in bad)


def test_none_passes_and_every_element_of_a_list_is_checked():
    check_rules(Outer(rate=None, inner=Inner(sizes=[1, 2])))
    with pytest.raises(ConfigError, match=r"^`inner.sizes` must be at least 1, got"):
        check_rules(Outer(rate=1.0, inner=Inner(sizes=[1, 0])))


def test_message_names_the_setting_by_its_dotted_path():
    with pytest.raises(ConfigError, match=r"`a\.rate` must be positive and finite"):
        check_rules(Outer(rate=-1.0, inner=Inner(sizes=[])), prefix="a.")
