"""Pictures of solutions: the meaning of their colours."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.tasks.equations.pictures import _draw


@pytest.mark.parametrize("is_signed_log", [False, True])
def test_scale_of_colours_says_where_it_is_logarithmic(is_signed_log):
    panel = Figure().subplots()
    axes = [np.arange(3.0), np.arange(4.0)]
    _draw(panel, axes, np.linspace(-5, 2, 12), "error", is_signed_log=is_signed_log)
    bar = panel.figure.axes[1]
    label = "symmetric log scale, linear within ±5e-02" if is_signed_log else ""
    assert bar.get_ylabel() == label
