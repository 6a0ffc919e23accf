"""Curves that leave their panel say so."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.tasks.policies.pictures import _Curves, _draw_value


def drawn(records):
    axis = Figure().subplots()
    records = [{"step": step + 1, **record} for step, record in enumerate(records)]
    _draw_value(axis, _Curves(records, 1000))
    return axis


@pytest.mark.parametrize("is_many", [False, True])
def test_explained_variance_below_the_panel_is_marked_at_its_edge(is_many):
    lowest = [-3.0, 0.5, None, -7.25, 0.9]
    records = [{"explained_variance": value} for value in lowest]
    if is_many:
        records = [
            {
                "explained_variance": 0.1,
                "explained_variance_min": value,
                "explained_variance_max": 0.2,
            }
            for value in lowest
        ]
    axis = drawn(records)
    assert axis.get_ylim() == (-1.0, 1.05)
    _, marks = axis.get_lines()
    np.testing.assert_array_equal(marks.get_xdata(), [1, 4])
    np.testing.assert_array_equal(marks.get_ydata(), [-1, -1])
    assert marks.get_label() == "below -1, down to -7.25"


def test_explained_variance_within_the_panel_is_not_marked():
    [curve] = drawn([{"explained_variance": 0.3}, {"explained_variance": -1.0}]).lines
    np.testing.assert_array_equal(curve.get_ydata(), [0.3, -1.0])
