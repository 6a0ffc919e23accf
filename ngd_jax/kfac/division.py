"""The factors divided over devices: whole ones, or rows of every one.

    [K, n, n] on D devices:    K / D factors on each,  or  n / D rows of each factor

Whole factors divide the work without a remainder. Of those that are left over, each
device has its rows of A and of (A + ε)⁻¹: for the latter it gathers A, factorises it as
all others do, and solves for its own columns of I.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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
        if self.sharding is None:
            return
        if not isinstance(self.sharding, NamedSharding):
            raise TypeError(
                f"`sharding` must be a NamedSharding, got {self.sharding!r}."
            )
        if len(self.sharding.spec) != 1 or not self.axes:
            raise ValueError(
                f"`sharding` must name the mesh axes that divide the factors as its "
                f'only entry, as in P("data") or P(("data", "model")), got '
                f"{self.sharding.spec}."
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that divide the factors."""
        entry = None if self.sharding is None else self.sharding.spec[0]
        if entry is None:
            return ()
        return (entry,) if isinstance(entry, str) else tuple(entry)

    @property
    def num_devices(self) -> int:
        """How many parts there are."""
        if self.sharding is None:
            return 1
        return math.prod(self.sharding.mesh.shape[axis] for axis in self.axes)

    def divide(self, group: Group, values: PyTree) -> PyTree:
        """What belongs to the factors of a group, on their devices."""

        def place(x: Array) -> Array:
            return self._place(x, self.spec(group, x.ndim))

        return jax.tree.map(place, values)

    def share(self, group: Group, matrices: Array) -> Array:
        """Matrices `[K, rows, columns]` that the factors of a group multiply."""
        if group.is_by_rows:
            return self.gather(matrices)
        return self.divide(group, matrices)

    def gather(self, values: Array) -> Array:
        """The same values on every device."""
        return self._place(values, PartitionSpec())

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

    def _place(self, values: Array, spec: PartitionSpec) -> Array:
        if self.sharding is None:
            return values
        mesh = self.sharding.mesh
        sharding = NamedSharding(mesh, spec)
        if AxisType.Explicit in mesh.axis_types:
            return jax.sharding.reshard(values, sharding)
        return jax.lax.with_sharding_constraint(values, sharding)
