"""The settings of the task `pinn`.

`configs/task/pinn.yaml` and `configs/problem/` have the values.
"""

import dataclasses
from typing import Annotated

from experiments.running.settings import (
    AT_LEAST_ONE,
    NON_NEGATIVE,
    POSITIVE,
    one_of,
    one_of_or_own,
)
from experiments.tasks.equations.problem import LAYOUTS
from experiments.tasks.equations.problems import PROBLEMS

__all__ = ["PhysicsConfig"]


@dataclasses.dataclass
class PhysicsConfig:
    """Settings of the task `pinn`.

    Attributes:
      name: "pinn".
      problem: the equation; `problem=...` chooses one with its values. As
        "module:function", a function without arguments that returns a `Problem`.
      precision: "float64" or "float32".
      hidden_sizes: widths of the tanh network.
      initial_scale: standard deviation of weights and biases; null for weights of
        1/√inputs and biases of 1.
      interior: number of points inside the domain.
      boundary: number of points on its boundary, including the initial time; 0 for a
        problem that needs none.
      layout: "grid", in two dimensions; "halton", evenly scattered; or "random".
      redraw_every: steps between draws of new points; null for points that stay.
      residual_power: k > 0 for new points inside that follow the residual, with p ∝
        |r|^k / mean |r|^k + 1; 0 for evenly spread ones.
      causality: ε > 0 weighs the residuals of a time down by exp(-ε Σ mean r²) over all
        earlier slices of time; 0 weighs none.
      test_points: number of evaluation points, on a grid in two dimensions.
    """

    name: str
    problem: Annotated[str, one_of_or_own(*PROBLEMS)]
    precision: Annotated[str, one_of("float64", "float32")]
    hidden_sizes: Annotated[list[int], AT_LEAST_ONE]
    initial_scale: Annotated[float | None, POSITIVE]
    interior: Annotated[int, AT_LEAST_ONE]
    boundary: Annotated[int, NON_NEGATIVE]
    layout: Annotated[str, one_of(*LAYOUTS)]
    redraw_every: Annotated[int | None, AT_LEAST_ONE]
    residual_power: Annotated[float, NON_NEGATIVE]
    causality: Annotated[float, NON_NEGATIVE]
    test_points: Annotated[int, AT_LEAST_ONE]
