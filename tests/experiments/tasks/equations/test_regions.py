"""Regions: points are where the geometry says, and evenly spread."""

import jax
import numpy as np
import pytest

from experiments.tasks.equations.regions import disk, polygon

SQUARE = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
CORNER = [(0.0, -1.0), (1.0, -1.0), (1.0, 0.0), (0.0, 0.0)]
LSHAPE = [*SQUARE[:1], (0.0, -1.0), (0.0, 0.0), (1.0, 0.0), *SQUARE[2:]]
HALVES = [[(0.0, 0.0), (2.0, 0.0), (2.0, 1.0), (0.0, 1.0)], CORNER]

RING = disk((0.0, 0.0), 1.0) - disk((0.3, 0.0), 0.4)
REGIONS = {
    # Region, area, length of its boundary.
    "disk": (disk((0.5, -1.0), 2.0), 4 * np.pi, 4 * np.pi),
    "polygon": (polygon(LSHAPE), 3.0, 8.0),
    "difference": (polygon(SQUARE) - polygon(CORNER), 3.0, 8.0),
    "ring": (RING, 0.84 * np.pi, 2.8 * np.pi),
    "apart": (disk((0.0, 0.0), 1.0) | disk((3.0, 0.0), 1.0), 2 * np.pi, 4 * np.pi),
    "seam": (polygon(HALVES[0]) | polygon(HALVES[1]), 3.0, 8.0),
    "intersection": (polygon(SQUARE) & polygon(HALVES[0]), 1.0, 4.0),
}


def draw(region, interior, boundary, layout):
    """Points inside and on the boundary, and the levels of both."""

    @jax.jit
    def points(key):
        both = region.draw(key, interior, boundary, layout)
        return *both, *(jax.vmap(region.level)(x) for x in both)

    return map(np.asarray, points(jax.random.key(0)))


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("layout", ["halton", "random"])
@pytest.mark.parametrize("name", REGIONS)
def test_points_fill_the_region_and_its_boundary(name, layout):
    region, area, length = REGIONS[name]
    inside, boundary, depths, levels = draw(region, 400, 200, layout)
    assert inside.shape == (400, 2)
    assert boundary.shape == (200, 2)
    assert (depths < 0).all()
    np.testing.assert_allclose(levels, 0.0, atol=1e-12)
    # Quarters of the box hold their share, and no part of the boundary is missing.
    grid = np.stack(np.meshgrid(*np.linspace(region.low, region.high, 400).T), -1)
    grid = grid.reshape(-1, 2)
    is_inside = np.asarray(jax.jit(jax.vmap(region.contains))(grid))
    box = np.prod(np.subtract(region.high, region.low))
    np.testing.assert_allclose(is_inside.mean() * box, area, rtol=0.02)
    middle = np.add(region.low, region.high) / 2
    for quarter in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        share, expected = (
            ((x - middle) * quarter > 0).all(1).mean()
            for x in (inside, grid[is_inside])
        )
        np.testing.assert_allclose(share, expected, atol=0.09)
    reach = np.linalg.norm(boundary[:, None] - boundary, axis=-1)
    np.fill_diagonal(reach, np.inf)
    gap = 8 if layout == "random" else 3
    assert reach.min(axis=0).max() < gap * length / 200


def test_the_boundary_of_a_union_has_no_seam():
    """Two rectangles share an edge, which lies inside of their union."""
    _, boundary, _, _ = draw(REGIONS["seam"][0], 1, 500, "halton")
    x, y = boundary.T
    assert not ((np.abs(y) < 1e-9) & (x > 0.01) & (x < 0.99)).any()
    assert ((np.abs(y) < 1e-9) & (x > 1.01)).any()


def test_the_level_of_a_polygon_is_a_signed_distance():
    level = jax.jit(jax.vmap(polygon(LSHAPE).level))
    points = np.asarray(
        [[-0.5, 0.0], [0.5, -0.4], [2.0, 0.5], [-0.1, -0.1], [0.1, 0.1]]
    )
    expected = [-0.5, 0.4, 1.0, -0.1, -0.1]
    np.testing.assert_allclose(level(points), expected, rtol=1e-12)


def test_what_cannot_be_drawn_is_not_a_number_or_refused():
    narrow = disk((0.0, 0.0), 1.0) & disk((1.999, 0.0), 1.0)
    inside, _, levels, _ = draw(narrow, 50, 0, "random")
    is_missing = np.isnan(inside).any(axis=1)
    assert (levels[~is_missing] < 0).all()
    nothing = disk((0.0, 0.0), 1.0) - disk((0.0, 0.0), 1.0)
    assert np.isnan(next(draw(nothing, 5, 0, "halton"))).all()
    with pytest.raises(ValueError, match="`layout` must be halton or random in a reg"):
        RING.draw(jax.random.key(0), 4, 4, "grid")
