"""The factors divided over devices: whole ones, or rows of every one.

    [K, n, n] on D devices:    K / D factors on each,  or  n / D rows of each factor

Whole factors divide the work without a remainder. Of those that are left over, each
device has its rows of A and of (A + ε)⁻¹: for the latter it gathers A, factorises it as
all others do, and solves for its own columns of I.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from ngd_jax import placement
from ngd_jax.kfac.groups import Group
from ngd_jax.types import Array, PyTree

__all__ = ["Division"]


@dataclasses.dataclass(frozen=True)
class Division:
    """Where the factors and inverses of a group are, and how they get there.

    Attributes:
      sharding: the mesh, and its axes that divide the factors, as the only entry of the
        specification; None for factors that are whole wherever they are used.

    Raises:
      ValueError, TypeError: for anything else.
    """

    sharding: Any

    def __post_init__(self) -> None:
        placement.check_sharding(self.sharding, "the factors")

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that divide the factors."""
        return placement.axes_of(self.sharding)

    @property
    def num_devices(self) -> int:
        """How many parts there are."""
        return placement.num_parts(self.sharding)

    def divide(self, group: Group, values: PyTree) -> PyTree:
        """What belongs to the factors of a group, on their devices."""

        def place(x: Array) -> Array:
            return placement.place(x, self.sharding, *self.spec(group, x.ndim))

        return jax.tree.map(place, values)

    def share(self, group: Group, matrices: Array) -> Array:
        """Matrices `[K, rows, columns]` that the factors of a group multiply."""
        if group.is_by_rows:
            return self.gather(matrices)
        return self.divide(group, matrices)

    def gather(self, values: Array) -> Array:
        """The same values on every device."""
        return placement.place(values, self.sharding)

    def map(self, fn: Any, group: Group, side: Array, shift: Array) -> Array:
        """`fn(factor, shift, axes)` for each; `axes` divide its rows, if any do."""
        axes = self.axes if group.is_by_rows else ()

        def local(side: Array, shift: Array) -> Array:
            if len(side) == 1:
                return fn(side[0], shift[0], axes)[None]
            # One at a time: one program for all, and no batched LAPACK, which hung.
            return jax.lax.map(lambda one: fn(*one, axes), (side, shift))

        if self.sharding is None:
            return local(side, shift)
        side, shift = self.divide(group, (side, shift))
        specs = self.spec(group, 3), self.spec(group, 1)
        mapped = jax.shard_map(
            local, mesh=self.sharding.mesh, in_specs=specs, out_specs=specs[0]
        )
        return mapped(side, shift)

    def spec(self, group: Group, ndim: int) -> PartitionSpec:
        """What divides an array with that many axes among those of a group."""
        if not group.is_matrices:
            return PartitionSpec()
        if not group.is_by_rows:
            return PartitionSpec(self.axes)
        # A long side has only vectors, which are small.
        return PartitionSpec(None, self.axes) if ndim == 3 else PartitionSpec()
