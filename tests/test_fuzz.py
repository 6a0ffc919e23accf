"""A short form of `tests.fuzz`, which is meant to run for an hour."""

import pytest

from tests import fuzz
from tests.marks import long_unless


@pytest.mark.parametrize("seed", long_unless([0], range(8)))
def test_random_settings_keep_the_promises_of_a_step(seed):
    fuzz.trial(seed)
