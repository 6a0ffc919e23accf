"""The equations, with their domains and exact solutions.

Each is a function without arguments that makes a `Problem`; `make_problem` finds them
by name.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.running.build import locate
from experiments.running.settings import ConfigError
from experiments.tasks.equations.derivatives import Jet
from experiments.tasks.equations.problem import Problem, periodic
from experiments.tasks.equations.regions import polygon
from experiments.tasks.equations.solutions import allen_cahn_solution, burgers_solution
from experiments.tasks.equations.unknowns import Unknowns

__all__ = ["PROBLEMS", "make_problem"]

ALL_FACES = ((1, 0), (0, 1), (1, 1), (0, 0))
# Faces of a box in space (the first input) and time: the start and both ends.
PARABOLIC_FACES = ((1, 0), (0, 1), (0, 0))
_EQUAL = {"interior": 1.0, "boundary": 1.0}
# A boundary residual is an error in u itself; inside, the operator amplifies errors.
_BOUNDARY_FIRST = {"interior": 1.0, "boundary": 10.0}


def _poisson2d() -> Problem:
    def equation(x: jax.Array, at: Jet) -> jax.Array:
        return -at.second - 2 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * x))

    return Problem(
        name="poisson2d",
        low=(0.0, 0.0),
        high=(1.0, 1.0),
        operator=(1.0, 1.0),
        equation=equation,
        solution=lambda x: jnp.prod(jnp.sin(jnp.pi * x), axis=-1),
        faces=ALL_FACES,
        weights={"interior": 1.0, "boundary": 4.0},  # length of the boundary
    )


def _heat1d() -> Problem:
    def solution(x: jax.Array) -> jax.Array:
        return jnp.exp(-(jnp.pi**2) * x[:, 1] / 4) * jnp.sin(jnp.pi * x[:, 0])

    return Problem(
        name="heat1d",
        low=(0.0, 0.0),
        high=(1.0, 1.0),
        operator=(0.25, 0.0),
        equation=lambda _, at: at.gradient[1] - at.second,
        solution=solution,
        faces=PARABOLIC_FACES,
        weights=_EQUAL,
    )


def _poisson5d() -> Problem:
    def equation(x: jax.Array, at: Jet) -> jax.Array:
        return -at.second - jnp.pi**2 * jnp.sum(jnp.cos(jnp.pi * x))

    return _in_many_dimensions(
        "poisson5d", 5, equation, lambda x: jnp.cos(jnp.pi * x).sum(axis=-1)
    )


def _poisson20d() -> Problem:
    """Δu = 1, where u is the mean of xᵢ² / 2 plus a harmonic part Σ x₂ᵢ x₂ᵢ₊₁."""

    def solution(x: jax.Array) -> jax.Array:
        return (x**2).mean(axis=-1) / 2 + (x[:, ::2] * x[:, 1::2]).sum(axis=-1)

    return _in_many_dimensions("poisson20d", 20, lambda _, at: 1 - at.second, solution)


def _in_many_dimensions(
    name: str, dimension: int, equation: Callable, solution: Callable
) -> Problem:
    return Problem(
        name=name,
        low=(0.0,) * dimension,
        high=(1.0,) * dimension,
        operator=(1.0,) * dimension,
        equation=equation,
        solution=solution,
        faces=tuple(itertools.product(range(dimension), (0, 1))),
        weights=_BOUNDARY_FIRST,
    )


def _helmholtz2d() -> Problem:
    """Δu + u = f, u = sin(πx) sin(4πy): waves of two lengths, on a square of side 2."""
    waves = (math.pi, 4 * math.pi)

    def equation(x: jax.Array, at: Jet) -> jax.Array:
        exact = jnp.sin(waves[0] * x[0]) * jnp.sin(waves[1] * x[1])
        return at.second + at.value - (1 - waves[0] ** 2 - waves[1] ** 2) * exact

    return Problem(
        name="helmholtz2d",
        low=(-1.0, -1.0),
        high=(1.0, 1.0),
        operator=(1.0, 1.0),
        equation=equation,
        solution=lambda x: jnp.sin(waves[0] * x[:, 0]) * jnp.sin(waves[1] * x[:, 1]),
        faces=ALL_FACES,
        weights={"interior": 1.0, "boundary": 1000.0},
    )


def _burgers(viscosity: float, **options: Any) -> Problem:
    return Problem(
        low=(-1.0, 0.0),
        high=(1.0, 1.0),
        operator=(viscosity, 0.0),
        equation=lambda _, at: at.gradient[1] + at.value * at.gradient[0] - at.second,
        solution=functools.partial(burgers_solution, viscosity=viscosity),
        **options,
    )


def _burgers1d() -> Problem:
    """With ν = 0.01 / π; right at t = 0, odd and periodic in x, for all parameters.

    s, an odd function of sin πx, spreads the front, which is as wide as 2ν:
    u = -sin πx + t s network(cos πx, 2 s², t).
    """

    def spread(x: jax.Array) -> jax.Array:
        wave = jnp.sin(jnp.pi * x[0]) / jnp.pi
        return jnp.arcsinh(math.sinh(6.0) * wave) / 6.0

    return _burgers(
        0.01 / math.pi,
        name="burgers1d",
        faces=(),
        weights={"interior": 1.0},
        features=lambda x: jnp.stack(
            [jnp.cos(jnp.pi * x[0]), 2 * spread(x) ** 2, x[1]]
        ),
        hard=lambda x: (-jnp.sin(jnp.pi * x[0]), x[1] * spread(x)),
        stretch=4.0,  # 27 times as dense in the middle as at the ends
    )


def _burgers_periodic() -> Problem:
    """With ν = 0.01; periodic, and right at t = 0, for all parameters."""

    def hard(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return -jnp.sin(jnp.pi * x[0]), x[1]

    return _burgers(
        0.01,
        name="burgers_periodic",
        faces=(),
        weights={"interior": 1.0},
        features=periodic((2.0, None)),
        hard=hard,
        stretch=2.5,
    )


def _laplace_lshape() -> Problem:
    """Δu = 0 with the singularity of a corner: u = r^(2/3) sin(2φ/3)."""

    def solution(x: jax.Array) -> jax.Array:
        angle = jnp.arctan2(x[..., 1], x[..., 0]) % (2 * jnp.pi)
        return jnp.sum(x**2, axis=-1) ** (1 / 3) * jnp.sin(2 / 3 * angle)

    square = polygon([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
    missing = polygon([(0.0, -1.0), (1.0, -1.0), (1.0, 0.0), (0.0, 0.0)])
    return Problem(
        name="laplace_lshape",
        low=(-1.0, -1.0),
        high=(1.0, 1.0),
        operator=(1.0, 1.0),
        equation=lambda _, at: at.second,
        solution=solution,
        faces=(),
        weights={"interior": 1.0, "boundary": 100.0},
        region=square - missing,
    )


def _allen_cahn() -> Problem:
    """u_t = 0.001 uₓₓ + 5 (u - u³), periodic and right at t = 0 by its form."""

    def hard(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        wave = jnp.cos(jnp.pi * x[0])
        return wave * (1 - wave) / 2, x[1]

    def equation(_: jax.Array, at: Jet) -> jax.Array:
        return at.gradient[1] - at.second - 5 * (at.value - at.value**3)

    return Problem(
        name="allen_cahn",
        low=(-1.0, 0.0),
        high=(1.0, 1.0),
        operator=(0.001, 0.0),
        equation=equation,
        solution=allen_cahn_solution,
        faces=(),
        weights={"interior": 1.0},
        features=periodic((2.0, None)),
        hard=hard,
    )


def _heat1d_inverse() -> Problem:
    """u_t = k uₓₓ with an unknown k, from values of u with errors of 0.01."""
    heat = _heat1d()

    def equation(_: jax.Array, at: Jet, coefficients: jax.Array) -> jax.Array:
        return at.gradient[1] - coefficients[0] * at.second

    def hard(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sin(jnp.pi * x[0]), x[1] * x[0] * (1 - x[0])

    return dataclasses.replace(
        heat,
        name="heat1d_inverse",
        operator=(1.0, 0.0),
        equation=equation,
        faces=(),
        # The equation is exact, the data are not: u must not bend to their errors.
        weights={"interior": 1.0, "data": 0.01},
        hard=hard,
        unknowns=Unknowns(truth=(0.25,), guess=(1.0,), num_values=200, noise=0.01),
    )


def _pipe_flow() -> Problem:
    """(v·∇)v + ∇p = ν Δv, div v = 0 in a flat pipe, driven by a fall of the pressure.

    The steady flow of the tutorials of jinns, with the same lengths and viscosity, and
    walls and ends by its form as there. Its solution is Poiseuille's parabola.
    """
    length, radius, fall, viscosity = 1.0, 0.05, 0.1, 0.00061

    def equation(_: jax.Array, at: Jet) -> jax.Array:
        v, along_x, along_y = at.value, at.gradient[0], at.gradient[1]
        pressure = jnp.stack([along_x[2], along_y[2]])
        carried = v[0] * along_x[:2] + v[1] * along_y[:2]
        momentum = carried + pressure - viscosity * at.second[:2]
        return jnp.append(momentum, along_x[0] + along_y[1])

    def hard(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        left, wall = 1 - x[0] / length, 1 - (x[1] / radius) ** 2
        ends = jnp.stack([jnp.zeros_like(left), jnp.zeros_like(left), fall * left])
        return ends, jnp.stack([wall, wall, left * x[0]])

    def solution(x: jax.Array) -> jax.Array:
        speed = fall / (2 * viscosity * length) * (radius**2 - x[:, 1] ** 2)
        pressure = fall * (1 - x[:, 0] / length)
        return jnp.stack([speed, jnp.zeros_like(speed), pressure], axis=1)

    return Problem(
        name="pipe_flow",
        low=(0.0, -radius),
        high=(length, radius),
        operator=(1.0, 1.0),
        equation=equation,
        solution=solution,
        faces=(),
        weights={"interior": 1.0},
        features=lambda x: x / jnp.asarray([length, radius], x.dtype),
        hard=hard,
        num_outputs=3,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "poisson2d": _poisson2d,
    "heat1d": _heat1d,
    "poisson5d": _poisson5d,
    "poisson20d": _poisson20d,
    "helmholtz2d": _helmholtz2d,
    "burgers1d": _burgers1d,
    "burgers_periodic": _burgers_periodic,
    "laplace_lshape": _laplace_lshape,
    "allen_cahn": _allen_cahn,
    "heat1d_inverse": _heat1d_inverse,
    "pipe_flow": _pipe_flow,
}


@functools.cache
def make_problem(name: str) -> Problem:
    """Builds the problem of that name, or a user's "module:function", only once.

    Raises:
      ConfigError: the user's function does not return a `Problem`.
    """
    problem = (PROBLEMS.get(name) or locate(name, "task.problem"))()
    if not isinstance(problem, Problem):
        raise ConfigError(
            f"`task.problem` must name a function that makes a Problem, but {name} "
            f"made {type(problem).__name__}."
        )
    return problem
