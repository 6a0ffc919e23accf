"""Periodic lattices: a ring, a square, a box, and the permutations that keep them.

Sites are numbered in C order of their coordinates. A symmetry g is a row of site
numbers: (g s)ᵢ = s[gᵢ].
"""

import dataclasses
import itertools
import math

import numpy as np

__all__ = ["Lattice"]


@dataclasses.dataclass(frozen=True)
class Lattice:
    """A box with periodic boundaries: (16,) is a ring, (4, 4) a square.

    Attributes:
      shape: number of sites along each axis.

    Raises:
      ValueError: there are no axes, or one has no site.

    Example:
      >>> square = Lattice((4, 4))
      >>> [len(square.bonds(order)) for order in (1, 2)]
      [32, 32]
      >>> square.translations((4, 4)).shape, square.point_group.shape
      ((16, 16), (8, 16))
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1:
            raise ValueError(
                f"`shape` of a lattice must have sides of at least 1, got {self.shape}."
            )

    @property
    def num_sites(self) -> int:
        """L."""
        return math.prod(self.shape)

    @property
    def coordinates(self) -> np.ndarray:
        """Of each site, `[L, axes]`."""
        return np.stack(np.unravel_index(np.arange(self.num_sites), self.shape), -1)

    @property
    def sublattice(self) -> np.ndarray:
        """±1 by the parity of a site's coordinates, `[L]`.

        Raises:
          ValueError: a side is odd, so that neighbours may have one sign.
        """
        if any(side % 2 for side in self.shape):
            raise ValueError(
                f"Two sublattices need even sides, got a lattice of {self.shape}."
            )
        return 1 - 2 * (self.coordinates.sum(axis=-1) % 2)

    def bonds(self, order: int = 1) -> np.ndarray:
        """Pairs of `order`-th neighbours, each pair once, `[B, 2]`.

        First neighbours have the least distance around the boundaries, second ones the
        next.
        """
        apart = np.abs(self.coordinates[:, None] - self.coordinates)
        squares = (np.minimum(apart, np.array(self.shape) - apart) ** 2).sum(axis=-1)
        distances = np.unique(squares)
        if not 1 <= order < len(distances):
            raise ValueError(
                f"`order` must be from 1 to {len(distances) - 1} on a lattice of "
                f"{self.shape}, got {order}."
            )
        return np.argwhere(np.triu(squares == distances[order]))

    def translations(
        self, ends: tuple[int, ...], steps: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """Translations by range(0, end, step) sites along each axis, `[T, L]`.

        Args:
          ends: along each axis.
          steps: likewise; None for 1.
        """
        steps = steps or tuple(1 for _ in ends)
        along = zip(ends, steps, strict=True)
        shifts = itertools.product(*(range(0, end, step) for end, step in along))
        return np.stack([self._sites(self.coordinates + shift) for shift in shifts])

    @property
    def rotations(self) -> np.ndarray:
        """The point group as matrices that act on coordinates, `[P, d, d]`.

        Reflections of axes and exchanges of equally long ones: two on a ring, eight on
        a square, the identity first.
        """
        shape, axes = np.array(self.shape), np.eye(len(self.shape), dtype=int)
        orders = itertools.permutations(range(len(shape)))
        signs = itertools.product((1, -1), repeat=len(shape))
        return np.stack(
            [
                axes[list(order)] * np.array(sign)[:, None]
                for order, sign in itertools.product(orders, signs)
                if (shape[list(order)] == shape).all()
            ]
        )

    @property
    def point_group(self) -> np.ndarray:
        """The same as permutations of the sites, `[P, L]`."""
        return np.stack(
            [self._sites(self.coordinates @ turn.T) for turn in self.rotations]
        )

    def windows(self, width: int) -> np.ndarray:
        """The `width`ᵈ sites around each site, in C order, `[L, width**d]`."""
        return self._sites(self.coordinates[:, None] + self._window(width))

    def turned_windows(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the inverse of each g of the point group takes windows and the group.

        Args:
          width: of the windows, odd, so that the site is in the middle.

        Returns:
          The numbers in the window of g⁻¹ x for its sites x, `[P, width**d]`; and the
          numbers in the group of g⁻¹ h, `[P, P]`.

        Raises:
          ValueError: an even width.
        """
        if width % 2 == 0:
            raise ValueError(f"A window that turns has an odd `width`, got {width}.")
        window, turns = self._window(width), self.rotations
        inverse = np.swapaxes(turns, 1, 2)
        sites = np.einsum("gij,xj->gxi", inverse, window)
        products = np.einsum("gij,hjk->ghik", inverse, turns)
        return (
            (sites[:, :, None] == window).all(axis=-1).argmax(axis=-1),
            (products[:, :, None] == turns).all(axis=(-1, -2)).argmax(axis=-1),
        )

    def _window(self, width: int) -> np.ndarray:
        offsets = np.arange(width) - (width - 1) // 2
        return np.array(list(itertools.product(offsets, repeat=len(self.shape))))

    def patches(self, width: int) -> np.ndarray:
        """Disjoint cubes of `width`ᵈ sites, in C order, `[patches, width**d]`.

        Raises:
          ValueError: `width` does not divide the sides.
        """
        coarse = self.coarse(width)
        cube = np.array(list(itertools.product(range(width), repeat=len(self.shape))))
        return self._sites(width * coarse.coordinates[:, None] + cube)

    def coarse(self, width: int) -> "Lattice":
        """The lattice of the patches."""
        if any(side % width for side in self.shape):
            raise ValueError(
                f"Patches of side {width} do not fill a lattice of {self.shape}."
            )
        sides = tuple(side // width for side in self.shape)
        return Lattice(sides)

    def differences(self) -> np.ndarray:
        """The number of the site at xᵢ - xⱼ, for all pairs (i, j), `[L, L]`."""
        return self._sites(self.coordinates[:, None] - self.coordinates)

    def _sites(self, coordinates: np.ndarray) -> np.ndarray:
        """The sites at these coordinates, taken modulo the sides."""
        wrapped = np.moveaxis(coordinates % np.array(self.shape), -1, 0)
        return np.asarray(np.ravel_multi_index(tuple(wrapped), self.shape))
