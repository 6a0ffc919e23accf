"""Regions of the plane that are no boxes, with points in them and on their boundary.

    inside: level(x) < 0,    union: min(a, b),    difference: max(a, -b)

By rejection: points are drawn from the box around a region, or along the curves that
bound its parts, and kept if they lie where they should. Knows nothing of equations.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.equations.points import halton

__all__ = ["Region", "disk", "polygon"]

# How near the boundary a point counts as on it, and how far away its neighbours are
# that tell a boundary from a seam inside: both in units of the size of the region.
_NEAR, _AWAY = 1e-6, 1e-3
_DIRECTIONS = np.asarray(
    [(math.cos(a), math.sin(a)) for a in np.arange(8) * np.pi / 4 + 0.1]
)
# Draws for each point that is kept.
_DRAWS = 20


@dataclasses.dataclass(frozen=True)
class Region:
    """A bounded region of the plane; `a | b`, `a & b` and `a - b` make new ones.

    Attributes:
      level: point `[2]` -> negative inside, positive outside, in units of length near
        the boundary (a signed distance, or a bound on it).
      curve: s in [0, 1) -> point at that part of the length of all curves that bound
        parts of the region. Not all of it need be boundary.
      length: of these curves.
      low: lower corner of a box that contains the region.
      high: its upper corner.

    Example:
      >>> ring = disk((0.0, 0.0), 1.0) - disk((0.3, 0.0), 0.4)
      >>> bool(ring.contains(jnp.asarray([0.3, 0.0])))
      False
    """

    level: Callable[[jax.Array], jax.Array]
    curve: Callable[[jax.Array], jax.Array]
    length: float
    low: tuple[float, float]
    high: tuple[float, float]

    def __or__(self, other: "Region") -> "Region":
        """Points of either region."""
        low = tuple(map(min, self.low, other.low))
        high = tuple(map(max, self.high, other.high))
        return self._with(other, jnp.minimum, low, high)

    def __and__(self, other: "Region") -> "Region":
        """Points of both regions."""
        low = tuple(map(max, self.low, other.low))
        high = tuple(map(min, self.high, other.high))
        return self._with(other, jnp.maximum, low, high)

    def __sub__(self, other: "Region") -> "Region":
        """Points of this region outside the other."""
        return self._with(other, lambda a, b: jnp.maximum(a, -b), self.low, self.high)

    def _with(
        self, other: "Region", join: Callable, low: tuple, high: tuple
    ) -> "Region":
        length = self.length + other.length
        share = self.length / length

        def curve(s: jax.Array) -> jax.Array:
            first, second = s / share, (s - share) / (1 - share)
            return jnp.where(s < share, self.curve(first), other.curve(second))

        def level(x: jax.Array) -> jax.Array:
            return join(self.level(x), other.level(x))

        return Region(level, curve, length, low, high)

    def contains(self, x: jax.Array) -> jax.Array:
        """Whether the point `[2]` lies inside; on the boundary it does not."""
        return self.level(x) < 0

    def is_boundary(self, x: jax.Array) -> jax.Array:
        """Whether the point `[2]` lies on the boundary, up to 1e-6 of the size.

        Where two parts of a union touch, the level is zero inside the region. So some
        neighbours of a point on the boundary must be inside, and some outside.
        """
        size = max(np.subtract(self.high, self.low))
        around = jax.vmap(self.level)(x + _AWAY * size * jnp.asarray(_DIRECTIONS))
        is_seam = (around.max() < _NEAR * size) | (around.min() > -_NEAR * size)
        return (jnp.abs(self.level(x)) <= _NEAR * size) & ~is_seam

    def draw(
        self, key: jax.Array, interior: int, boundary: int, layout: str
    ) -> tuple[jax.Array, jax.Array]:
        """Points inside, `[interior, 2]`, and on the boundary, `[boundary, 2]`.

        They are evenly spread over area and length with layout "halton", and uniform
        with "random". Points are NaN if fewer are found in twenty times as many draws,
        as in a region that fills less than a twentieth of its box.

        Raises:
          ValueError: for another layout.
        """
        low, high = jnp.asarray(self.low), jnp.asarray(self.high)
        keys = jax.random.split(key)

        def draw(key: jax.Array, dimension: int, count: int) -> jax.Array:
            match layout:
                case "halton":
                    return jnp.asarray(halton(dimension, _DRAWS * count))
                case "random":
                    return jax.random.uniform(key, (_DRAWS * count, dimension))
            raise ValueError(
                f"`layout` must be halton or random in a region, got {layout!r}."
            )

        inside = low + (high - low) * draw(keys[0], 2, interior)
        along = jax.vmap(self.curve)(draw(keys[1], 1, boundary)[:, 0])
        return (
            _first(interior, inside, jax.vmap(self.contains)(inside)),
            _first(boundary, along, jax.vmap(self.is_boundary)(along)),
        )


def _first(count: int, points: jax.Array, is_kept: jax.Array) -> jax.Array:
    """The first `count` of the points that are kept, NaN where there are fewer."""
    order = jnp.argsort(~is_kept, stable=True)[:count]
    return jnp.where(is_kept[order, None], points[order], jnp.nan)


def disk(center: tuple[float, float], radius: float) -> Region:
    """The points at a distance below `radius` from `center`."""
    middle = np.asarray(center)

    def level(x: jax.Array) -> jax.Array:
        return jnp.linalg.norm(x - middle) - radius

    def curve(s: jax.Array) -> jax.Array:
        angle = 2 * jnp.pi * s
        return radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)]) + middle

    low, high = (tuple((middle + sign * radius).tolist()) for sign in (-1, 1))
    return Region(level, curve, 2 * math.pi * radius, low, high)


def polygon(corners: Sequence[tuple[float, float]]) -> Region:
    """The inside of a closed line through `corners`, which must not cross itself."""
    starts = np.asarray(corners, float)
    edges = np.roll(starts, -1, axis=0) - starts
    lengths = np.linalg.norm(edges, axis=1)
    ends = np.cumsum(lengths)

    def level(x: jax.Array) -> jax.Array:
        away = x - starts
        part = jnp.clip((away * edges).sum(1) / lengths**2, 0, 1)
        distance = jnp.linalg.norm(away - part[:, None] * edges, axis=1).min()
        # A ray to the right crosses the line an odd number of times from inside.
        is_above = jnp.stack([away[:, 1], away[:, 1] - edges[:, 1]]) >= 0
        cross = edges[:, 0] * away[:, 1] - edges[:, 1] * away[:, 0]
        is_crossed = (is_above[0] != is_above[1]) & ((cross > 0) == is_above[0])
        return jnp.where(is_crossed.sum() % 2 == 1, -distance, distance)

    def curve(s: jax.Array) -> jax.Array:
        at = s * ends[-1]
        # Rounding may put `at` on the last end.
        index = jnp.minimum(jnp.searchsorted(ends, at, side="right"), len(ends) - 1)
        part = (at - jnp.asarray(ends - lengths)[index]) / jnp.asarray(lengths)[index]
        return jnp.asarray(starts)[index] + part * jnp.asarray(edges)[index]

    low, high = starts.min(0).tolist(), starts.max(0).tolist()
    return Region(level, curve, float(ends[-1]), tuple(low), tuple(high))
