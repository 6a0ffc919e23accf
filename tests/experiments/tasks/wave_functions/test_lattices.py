"""Bonds, symmetries and neighbourhoods, against loops over coordinates."""

import itertools

import numpy as np
import pytest

from experiments.tasks.wave_functions.lattices import Lattice


def steps_from(offsets, height, width):
    """Pairs (site, site + offset) on a periodic rectangle, each once."""
    pairs = set()
    for x, y in itertools.product(range(height), range(width)):
        for dx, dy in offsets:
            there = (x + dx) % height * width + (y + dy) % width
            pairs.add(frozenset((x * width + y, there)))
    return pairs


def as_sets(bonds):
    found = {frozenset(pair) for pair in bonds.tolist()}
    assert len(found) == len(bonds)
    return found


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (2, 2)])
def test_bonds_are_between_neighbours_and_diagonals(shape):
    lattice = Lattice(shape)
    assert as_sets(lattice.bonds(1)) == steps_from([(0, 1), (1, 0)], *shape)
    assert as_sets(lattice.bonds(2)) == steps_from([(1, 1), (1, -1)], *shape)


def test_bonds_of_a_ring_go_around():
    assert as_sets(Lattice((5,)).bonds(1)) == {
        frozenset((site, (site + 1) % 5)) for site in range(5)
    }


@pytest.mark.parametrize(
    ("shape", "size"), [((6,), 2), ((4, 4), 8), ((2, 3), 4), ((3, 3, 3), 48)]
)
def test_symmetries_are_a_group_that_keeps_the_bonds(shape, size):
    lattice = Lattice(shape)
    group = lattice.point_group
    translations = lattice.translations(shape)
    assert group.shape == (size, lattice.num_sites)
    np.testing.assert_array_equal(group[0], np.arange(lattice.num_sites))
    bonds = as_sets(lattice.bonds(1))
    both = group[:, translations].reshape(-1, lattice.num_sites)
    for permutation in both:
        assert {frozenset(permutation[list(pair)]) for pair in bonds} == bonds
    # Where all sides are above 2, no two elements are the same.
    elements = {tuple(row) for row in both}
    assert min(shape) == 2 or len(elements) == len(both)
    for one, other in itertools.product(both[:: max(1, size // 4)], repeat=2):
        assert tuple(one[other]) in elements


def test_translations_windows_and_differences_are_shifts():
    lattice = Lattice((4, 6))
    field = np.random.default_rng(0).normal(size=(4, 6))
    shifted = field.ravel()[lattice.translations((2, 3))].reshape(2, 3, 4, 6)
    seen = field.ravel()[lattice.windows(3)].reshape(4, 6, 3, 3)
    for dx, dy in itertools.product(range(2), range(3)):
        expected = np.roll(field, (-dx, -dy), axis=(0, 1))
        np.testing.assert_array_equal(shifted[dx, dy], expected)
        expected = np.roll(field, (1 - dx, 1 - dy), axis=(0, 1))
        np.testing.assert_array_equal(seen[:, :, dx, dy], expected)
    by_patches = field.ravel()[lattice.translations((4, 6), (2, 3))]
    assert by_patches.shape == (4, 24)
    np.testing.assert_array_equal(by_patches[3], np.roll(field, (2, 3), (0, 1)).ravel())
    differences = lattice.differences()
    assert differences[6 * 3 + 1, 6 * 1 + 2] == 6 * 2 + 5
    assert (np.diag(differences) == 0).all()


def test_patches_are_the_blocks_of_a_matrix():
    sites = np.arange(24).reshape(4, 6)
    blocks = [sites[i : i + 2, j : j + 2].ravel() for i in (0, 2) for j in (0, 2, 4)]
    np.testing.assert_array_equal(Lattice((4, 6)).patches(2), blocks)
    assert Lattice((4, 6)).coarse(2) == Lattice((2, 3))


def test_sublattices_alternate_along_all_bonds():
    lattice = Lattice((4, 6))
    one, other = lattice.bonds(1).T
    assert (lattice.sublattice[one] == -lattice.sublattice[other]).all()


def test_what_does_not_fit_a_lattice_is_named():
    with pytest.raises(ValueError, match=r"at least 1, got \(4, 0\)"):
        Lattice((4, 0))
    with pytest.raises(ValueError, match=r"even sides, got a lattice of \(3, 4\)"):
        _ = Lattice((3, 4)).sublattice
    with pytest.raises(ValueError, match=r"from 1 to 5 on .* \(4, 4\), got 6"):
        Lattice((4, 4)).bonds(6)
    with pytest.raises(ValueError, match=r"side 3 do not fill a lattice of \(4, 4\)"):
        Lattice((4, 4)).patches(3)
    with pytest.raises(ValueError, match=r"odd `width`, got 2"):
        Lattice((4, 4)).turned_windows(2)
