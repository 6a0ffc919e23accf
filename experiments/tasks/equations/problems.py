"""Equations as residuals, with their domains, points and exact solutions.

    residual_fn(params, points) -> {block: residuals [N_b]},    loss = Σ_b w_b mean r_b²

A problem knows no optimizer, and no network except the one that gives it derivatives.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import qmc

import ngd_jax as ngd
from experiments.running.build import locate
from experiments.running.settings import ConfigError
from experiments.tasks.equations.derivatives import (
    Jet,
    Params,
    affine,
    forward_operator,
    jet_of,
    network,
)

__all__ = [
    "LAYOUTS",
    "PROBLEMS",
    "Points",
    "Problem",
    "Sizes",
    "burgers_solution",
    "make_problem",
    "periodic",
]

Points = dict[str, Any]
LAYOUTS = ("grid", "halton", "random")


@dataclasses.dataclass(frozen=True)
class Problem:
    """An equation on a box.

    Attributes:
      name: as in the configuration.
      low: lower corner of the box.
      high: upper corner.
      operator: coefficients c of the second-order operator Σ cᵢ ∂ᵢᵢ.
      equation: (point, Jet) -> residual inside.
      solution: points `[N, d]` -> exact u `[N]`.
      faces: (axis, end) of the sides of the box on which u is given; end 0 is low.
      weights: w of both blocks, "interior" and "boundary".
      features: point -> `[F]`, inputs of the network in place of the point: with
        cos(πx) and sin(πx), u is periodic whatever the parameters are.
      hard: point -> (a, b), and u = a + b × network: where b vanishes, u is a whatever
        the parameters are. A problem that needs no boundary then has no `faces`.
      stretch: k > 0 if u has a layer in the middle of the first axis: points lie at x =
        sinh(k s) / sinh(k) for evenly spread s in [-1, 1], and residuals are weighted
        in proportion to the spacing dx/ds, so that the layer does not drown out the
        rest.
    """

    name: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    operator: tuple[float, ...]
    equation: Callable[[jax.Array, Jet], jax.Array]
    solution: Callable[[jax.Array], jax.Array]
    faces: tuple[tuple[int, int], ...]
    weights: dict[str, float]
    features: Callable[[jax.Array], jax.Array] | None = None
    hard: Callable[[jax.Array], tuple[jax.Array, jax.Array]] | None = None
    stretch: float = 0.0

    @property
    def dimension(self) -> int:
        """Number of inputs, including time."""
        return len(self.low)

    @property
    def num_features(self) -> int:
        """Number of inputs of the network."""
        if self.features is None:
            return self.dimension
        point = jax.ShapeDtypeStruct((self.dimension,), jnp.float32)
        return jax.eval_shape(self.features, point).size

    def value(self, params: Params, x: jax.Array) -> jax.Array:
        """u_θ(x), a scalar, at one point `[d]`."""
        inside = network(params, x if self.features is None else self.features(x))
        if self.hard is None:
            return inside
        a, b = self.hard(x)
        return a + b * inside

    def jet(self, params: Params, x: jax.Array) -> Jet:
        """u_θ with its derivatives, at one point `[d]`."""
        c = jnp.asarray(self.operator, x.dtype)
        inputs = None if self.features is None else jet_of(self.features, x, c)
        inside = forward_operator(params, x, c, inputs)
        hard = self.hard
        if hard is None:
            return inside
        both = jet_of(lambda x: jnp.stack(hard(x)), x, c)
        a, b = (Jet(*(part[..., i] for part in both)) for i in (0, 1))
        return affine(a, b, inside, c)

    @functools.cached_property
    def likelihood(self) -> ngd.Likelihood:
        """The likelihood whose Fisher is the Gauss-Newton matrix of ½ loss."""
        blocks = {name: ngd.Gaussian(event_ndims=0) for name in self.weights}
        return ngd.Product(blocks, weights=self.weights)

    def residuals(self, params: Params, points: Points) -> dict[str, jax.Array]:
        """The residuals of every block at its points: the outputs of the model."""

        def inside(x: jax.Array) -> jax.Array:
            return self._spacing(x) * self.equation(x, self.jet(params, x))

        residuals = {"interior": jax.vmap(inside)(points["interior"])}
        if self.faces:
            values = jax.vmap(functools.partial(self.value, params))(points["boundary"])
            residuals["boundary"] = values - points["boundary_values"]
        return residuals

    def loss(self, residuals: dict[str, jax.Array], points: Points) -> jax.Array:
        """½ Σ w mean r²: the negative log-likelihood up to a constant."""
        del points
        total = [w * jnp.mean(residuals[name] ** 2) for name, w in self.weights.items()]
        return sum(total[1:], start=total[0]) / 2

    def draw_points(self, key: jax.Array, sizes: "Sizes") -> Points:
        """Points of all blocks, and the values prescribed on the boundary, if any."""
        match sizes.layout:
            case "grid":
                interior, boundary = self._grid(sizes.interior, sizes.boundary)
            case "halton":
                interior, boundary = self._halton(sizes.interior, sizes.boundary)
            case "random":
                interior, boundary = self._random(key, sizes.interior, sizes.boundary)
            case _:
                raise ValueError(
                    f"`layout` must be one of {', '.join(LAYOUTS)}, got "
                    f"{sizes.layout!r}."
                )
        points = {"interior": self._stretched(interior)}
        if self.faces:
            boundary = self._stretched(boundary)
            values = self.solution(boundary)
            points |= {"boundary": boundary, "boundary_values": values}
        return points

    def test_points(self, num_points: int) -> jax.Array:
        """A grid in two dimensions, otherwise random points from a separate key."""
        if self.dimension == 2:
            side = round(num_points**0.5)
            axes = [
                np.linspace(lo, hi, side)
                for lo, hi in zip(self.low, self.high, strict=True)
            ]
            return jnp.asarray(list(itertools.product(*axes)))
        return self._uniform(jax.random.key(2024), num_points)

    def _spacing(self, x: jax.Array) -> jax.Array | float:
        """Spacing of points at x along the first axis, relative to the widest."""
        if not self.stretch:
            return 1.0
        narrowest = 1 / math.sinh(self.stretch)
        relative = (2 * x[0] - self.low[0] - self.high[0]) / (
            self.high[0] - self.low[0]
        )
        return jnp.sqrt((narrowest**2 + relative**2) / (narrowest**2 + 1))

    def _stretched(self, points: jax.Array) -> jax.Array:
        if not self.stretch:
            return points
        middle = (self.low[0] + self.high[0]) / 2
        half = (self.high[0] - self.low[0]) / 2
        even = (points[:, 0] - middle) / half
        moved = jnp.sinh(self.stretch * even) / math.sinh(self.stretch)
        return points.at[:, 0].set(middle + half * moved)

    def _uniform(self, key: jax.Array, count: int) -> jax.Array:
        low, high = jnp.asarray(self.low), jnp.asarray(self.high)
        return jax.random.uniform(key, (count, self.dimension), minval=low, maxval=high)

    def _random(
        self, key: jax.Array, interior: int, boundary: int
    ) -> tuple[jax.Array, jax.Array]:
        """Uniform points inside, and on all faces in turn."""
        keys = jax.random.split(key)
        if not self.faces:
            return self._uniform(keys[0], interior), jnp.zeros((0, self.dimension))
        faces = np.asarray(self.faces)[np.arange(boundary) % len(self.faces)]
        ends = np.asarray((self.low, self.high))[faces[:, 1], faces[:, 0]]
        is_fixed = faces[:, :1] == np.arange(self.dimension)
        points = self._uniform(keys[1], boundary)
        points = jnp.where(is_fixed, jnp.asarray(ends)[:, None], points)
        return self._uniform(keys[0], interior), points

    def _halton(self, interior: int, boundary: int) -> tuple[jax.Array, jax.Array]:
        """Halton points inside, and lower-dimensional ones on the faces in turn.

        No two points share a coordinate, so they detect a jump of u along an axis,
        which could hide between the lines of a grid.
        """
        low, high = np.asarray(self.low), np.asarray(self.high)
        inside = low + (high - low) * _halton(self.dimension, interior)
        edges = [np.zeros((0, self.dimension))]
        along = _halton(self.dimension - 1, boundary)
        parts = np.split(along, len(self.faces)) if self.faces else []
        for (axis, end), part in zip(self.faces, parts, strict=True):
            edges.append(low + (high - low) * np.insert(part, axis, end, axis=1))
        return jnp.asarray(inside), jnp.asarray(np.concatenate(edges))

    def _grid(self, interior: int, boundary: int) -> tuple[jax.Array, jax.Array]:
        """Interior points of a square grid, and points along the faces."""
        side = round(interior ** (1 / self.dimension))
        axes = [
            np.linspace(lo, hi, side + 2)[1:-1]
            for lo, hi in zip(self.low, self.high, strict=True)
        ]
        per_face = boundary // max(1, len(self.faces))
        edges = [np.zeros((0, 2))]
        for axis, end in self.faces:
            points = np.empty((per_face, 2))
            along = 1 - axis
            # Count each corner once: a face begins where the last one ends.
            is_backwards = (axis == 0) != (end == 0)
            start, stop = self.low[along], self.high[along]
            if is_backwards:
                start, stop = stop, start
            points[:, along] = np.linspace(start, stop, per_face, endpoint=False)
            points[:, axis] = (self.low, self.high)[end][axis]
            edges.append(points)
        inside = jnp.asarray(list(itertools.product(*axes)))
        return inside, jnp.asarray(np.concatenate(edges))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many points there are, and how they are laid out.

    Attributes:
      interior: points inside.
      boundary: points on the boundary, all faces together.
      layout: "grid", in two dimensions; "halton", Halton's sequence; or "random".
    """

    interior: int
    boundary: int
    layout: str


def _halton(dimension: int, count: int) -> np.ndarray:
    """Points in (0, 1)^d, without the first point of the sequence, which is zero."""
    return qmc.Halton(dimension, scramble=False).random(count + 1)[1:]


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


VISCOSITY = 0.01 / math.pi


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
    return _burgers(
        VISCOSITY,
        name="burgers1d",
        faces=PARABOLIC_FACES,
        weights=_BOUNDARY_FIRST,
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


def periodic(periods: Sequence[float | None]) -> Callable[[jax.Array], jax.Array]:
    """Features of a point that make u periodic, for `Problem.features`.

    Args:
      periods: for every input its period, for which cos(2πx/L) and sin(2πx/L) stand in
        its place; None for an input that stays.
    """

    def features(x: jax.Array) -> jax.Array:
        parts = []
        for value, period in zip(x, periods, strict=True):
            if period is None:
                parts.append(value)
            else:
                angle = value * (2 * math.pi / period)
                parts += [jnp.cos(angle), jnp.sin(angle)]
        return jnp.stack(parts)

    return features


def burgers_solution(
    points: jax.Array, num_nodes: int = 200, viscosity: float = VISCOSITY
) -> jax.Array:
    """u(x, t) of u_t + u uₓ = ν uₓₓ from u(x, 0) = -sin πx, by the Cole-Hopf transform.

    u = -∫ sin π(x-η) f(x-η) e^(-η²/4νt) dη / ∫ f(x-η) e^(-η²/4νt) dη with
    f(y) = e^(-cos(πy)/2πν), by Gauss-Hermite quadrature.

    References:
      Basdevant et al., Spectral and finite difference solutions of the Burgers
      equation, 1986, equations 2.2 and 2.3.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(num_nodes)
    x, t = points[:, :1], points[:, 1:]
    y = x - jnp.sqrt(4 * viscosity * t) * nodes
    exponent = -jnp.cos(jnp.pi * y) / (2 * jnp.pi * viscosity)
    # Only the ratio matters: divide out the largest exponential to avoid overflow.
    factor = weights * jnp.exp(exponent - exponent.max(axis=1, keepdims=True))
    return -(factor * jnp.sin(jnp.pi * y)).sum(axis=1) / factor.sum(axis=1)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "poisson2d": _poisson2d,
    "heat1d": _heat1d,
    "poisson5d": _poisson5d,
    "poisson20d": _poisson20d,
    "helmholtz2d": _helmholtz2d,
    "burgers1d": _burgers1d,
    "burgers_periodic": _burgers_periodic,
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
