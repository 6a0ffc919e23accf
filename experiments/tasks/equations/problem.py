"""What a problem is: an equation on a box, with points and a form for its solution.

    residuals(params, points) -> {block: residuals [N_b]},    loss = ½ Σ_b w_b mean r_b²

Knows no optimizer, no equation, and no network except the one that gives it
derivatives.
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
from experiments.tasks.equations.derivatives import (
    Jet,
    Params,
    affine,
    forward_operator,
    jet_of,
    network,
)

__all__ = ["LAYOUTS", "Points", "Problem", "Sizes", "periodic"]

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
