"""What a problem is: an equation on a region, with points and a form for its solution.

    residuals(params, points) -> {block: residuals [N_b]},    loss = ½ Σ_b w_b mean r_b²

Blocks are "interior" and, where a problem has them, "boundary" and "data". For a system
of K equations residuals are `[N_b, K]`, and r² is their sum of squares.

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

import ngd_jax as ngd
from experiments.tasks.equations.derivatives import (
    Jet,
    Params,
    affine,
    forward_operator,
    init_network,
    jet_of,
    network,
)
from experiments.tasks.equations.points import follow_residuals, halton
from experiments.tasks.equations.regions import Region
from experiments.tasks.equations.unknowns import Unknowns, observe
from experiments.tasks.equations.weights import causal_weights

__all__ = ["LAYOUTS", "Points", "Problem", "Sizes", "periodic"]

PyTree = Any
Points = dict[str, Any]
LAYOUTS = ("grid", "halton", "random")
# Candidates for each of the points that follow the residual.
_CANDIDATES = 10


@dataclasses.dataclass(frozen=True)
class Problem:
    """An equation on a box, or on a region inside of it.

    Attributes:
      name: as in the configuration.
      low: lower corner of the box.
      high: upper corner.
      operator: coefficients c of the second-order operator Σ cᵢ ∂ᵢᵢ.
      equation: (point, Jet) -> residual inside; with `unknowns`, (point, Jet,
        coefficients).
      solution: points `[N, d]` -> exact u `[N]`.
      faces: (axis, end) of the sides of the box on which u is given; end 0 is low.
      weights: w of all blocks that the problem has: "interior", "boundary" where u is
        given on a boundary, "data" with `unknowns`.
      features: point -> `[F]`, inputs of the network in place of the point: with
        cos(πx) and sin(πx), u is periodic whatever the parameters are.
      hard: point -> (a, b), and u = a + b × network: where b vanishes, u is a whatever
        the parameters are. A problem that needs no boundary then has no `faces`.
      stretch: k > 0 if u has a layer in the middle of the first axis: points lie at x =
        sinh(k s) / sinh(k) for evenly spread s in [-1, 1], and residuals are weighted
        in proportion to the spacing dx/ds, so that the layer does not drown out the
        rest.
      region: where the equation holds, if not in the whole box, which has no `faces`
        then: u is given on the boundary of the region.
      unknowns: coefficients of the equation that are parameters too.
      num_outputs: K. With K > 1, u is a vector: `equation` returns K residuals,
        `solution` `[N, K]`, and the b of `hard` is a number or K of them.
    """

    name: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    operator: tuple[float, ...]
    equation: Callable[..., jax.Array]
    solution: Callable[[jax.Array], jax.Array]
    faces: tuple[tuple[int, int], ...]
    weights: dict[str, float]
    features: Callable[[jax.Array], jax.Array] | None = None
    hard: Callable[[jax.Array], tuple[jax.Array, jax.Array]] | None = None
    stretch: float = 0.0
    region: Region | None = None
    unknowns: Unknowns | None = None
    num_outputs: int = 1

    def __post_init__(self) -> None:
        if self.region is not None and (self.faces or self.stretch):
            raise ValueError("`faces` and `stretch` must be unset with a `region`.")
        if ("data" in self.weights) != (self.unknowns is not None):
            raise ValueError('`weights` must have "data" if there are `unknowns`.')
        if ("boundary" in self.weights) and not (self.faces or self.region):
            raise ValueError('`weights` must not have "boundary" without `faces`.')

    @property
    def num_faces(self) -> int:
        """Number of faces with a boundary condition; a region has one or none."""
        return len(self.faces) or int("boundary" in self.weights)

    @property
    def is_in_time(self) -> bool:
        """Whether the last input is time: the operator has no derivative along it."""
        return self.operator[-1] == 0

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

    def init(
        self, key: jax.Array, hidden_sizes: Sequence[int], scale: float | None
    ) -> PyTree:
        """The parameters: of a tanh network, see `init_network`, and the unknowns."""
        widths = (self.num_features, *hidden_sizes, self.num_outputs)
        layers = init_network(key, widths, scale)
        if self.unknowns is None:
            return layers
        return {"network": layers, "coefficients": jnp.asarray(self.unknowns.guess)}

    def value(self, params: PyTree, x: jax.Array) -> jax.Array:
        """u_θ(x), a scalar or `[K]`, at one point `[d]`."""
        layers = self._layers(params)
        inside = network(layers, x if self.features is None else self.features(x))
        if self.hard is None:
            return inside
        a, b = self.hard(x)
        return a + b * inside

    def jet(self, params: PyTree, x: jax.Array) -> Jet:
        """u_θ with its derivatives, at one point `[d]`."""
        c = jnp.asarray(self.operator, x.dtype)
        inputs = None if self.features is None else jet_of(self.features, x, c)
        inside = forward_operator(self._layers(params), x, c, inputs)
        hard = self.hard
        if hard is None:
            return inside
        both = jet_of(lambda x: jnp.stack(jnp.broadcast_arrays(*hard(x))), x, c)
        value, gradient, second = both
        a, b = (Jet(value[i], gradient[:, i], second[i]) for i in (0, 1))
        return affine(a, b, inside, c)

    @functools.cached_property
    def likelihood(self) -> ngd.Likelihood:
        """The likelihood whose Fisher is the Gauss-Newton matrix of ½ loss."""
        gaussian = ngd.Gaussian(event_ndims=int(self.num_outputs > 1))
        blocks = dict.fromkeys(self.weights, gaussian)
        return ngd.Product(blocks, weights=self.weights)

    def residuals(self, params: PyTree, points: Points) -> dict[str, jax.Array]:
        """The residuals of every block at its points: the outputs of the model."""
        known = () if self.unknowns is None else (params["coefficients"],)

        def inside(x: jax.Array) -> jax.Array:
            return self._spacing(x) * self.equation(x, self.jet(params, x), *known)

        value = jax.vmap(functools.partial(self.value, params))
        residuals = {"interior": jax.vmap(inside)(points["interior"])}
        if "interior_weights" in points:
            roots = jnp.sqrt(points["interior_weights"])
            residuals["interior"] = (residuals["interior"].T * roots).T
        for name in self.weights:
            if name != "interior":
                residuals[name] = value(points[name]) - points[f"{name}_values"]
        return residuals

    def loss(self, residuals: dict[str, jax.Array], points: Points) -> jax.Array:
        """½ Σ w mean r²: the negative log-likelihood up to a constant."""
        del points
        total = [
            w * jnp.mean(_squares(residuals[name])) for name, w in self.weights.items()
        ]
        return sum(total[1:], start=total[0]) / 2

    def draw_points(self, key: jax.Array, sizes: "Sizes") -> Points:
        """Points of all blocks, with the values of u that are given there."""
        points = self._collocate(key, sizes)
        if self.unknowns is None:
            return points
        keys = jax.random.split(jax.random.fold_in(key, 1))
        at = self._place(keys[0], Sizes(self.unknowns.num_values, 0, "random"))[0]
        return points | observe(keys[1], at, self.solution, self.unknowns.noise)

    def redraw_points(
        self,
        key: jax.Array,
        params: PyTree,
        points: Points,
        sizes: "Sizes",
        power: float,
    ) -> Points:
        """New points inside and on the boundary; data stay.

        With `power` > 0, those inside follow the residual: see `follow_residuals`.
        """
        if not power:
            return points | self._collocate(key, sizes)
        many = dataclasses.replace(sizes, interior=_CANDIDATES * sizes.interior)
        new = points | self._collocate(key, many)
        candidates = new["interior"]
        residuals = jnp.sqrt(_squares(self.residuals(params, new)["interior"]))
        chosen = follow_residuals(
            jax.random.fold_in(key, 1), candidates, residuals, sizes.interior, power
        )
        return new | {"interior": chosen}

    def weigh_causally(
        self, params: PyTree, points: Points, causality: float
    ) -> Points:
        """`points` with weights of the interior that respect time."""
        residuals = jnp.sqrt(_squares(self.residuals(params, points)["interior"]))
        times = points["interior"][:, -1]
        weights = causal_weights(times, residuals, causality)
        return points | {"interior_weights": weights}

    def test_points(self, num_points: int) -> jax.Array:
        """A grid in two dimensions, otherwise random points from a separate key."""
        if self.dimension != 2:
            return self._uniform(jax.random.key(2024), num_points)
        side = round(num_points**0.5)
        axes = [
            np.linspace(lo, hi, side)
            for lo, hi in zip(self.low, self.high, strict=True)
        ]
        points = jnp.asarray(list(itertools.product(*axes)))
        if self.region is None:
            return points
        return points[jax.jit(jax.vmap(self.region.contains))(points)]

    def _layers(self, params: PyTree) -> Params:
        return params if self.unknowns is None else params["network"]

    def _collocate(self, key: jax.Array, sizes: "Sizes") -> Points:
        interior, boundary = self._place(key, sizes)
        points = {"interior": self._stretched(interior)}
        if self.num_faces:
            boundary = self._stretched(boundary)
            values = self.solution(boundary)
            points |= {"boundary": boundary, "boundary_values": values}
        return points

    def _place(self, key: jax.Array, sizes: "Sizes") -> tuple[jax.Array, jax.Array]:
        if self.region is not None:
            return self.region.draw(key, sizes.interior, sizes.boundary, sizes.layout)
        match sizes.layout:
            case "grid":
                return self._grid(sizes.interior, sizes.boundary)
            case "halton":
                return self._halton(sizes.interior, sizes.boundary)
            case "random":
                return self._random(key, sizes.interior, sizes.boundary)
        raise ValueError(
            f"`layout` must be one of {', '.join(LAYOUTS)}, got {sizes.layout!r}."
        )

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
        inside = low + (high - low) * halton(self.dimension, interior)
        edges = [np.zeros((0, self.dimension))]
        along = halton(self.dimension - 1, boundary)
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


def _squares(residuals: jax.Array) -> jax.Array:
    """r² at each point, `[N]`, of residuals `[N]` or `[N, K]`."""
    return jnp.sum(residuals.reshape(len(residuals), -1) ** 2, axis=1)


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
