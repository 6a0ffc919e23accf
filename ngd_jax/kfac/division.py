"""The factors divided over devices: whole ones, or rows of every one.

    [K, n, n] on D devices:    K / D factors on each,  or  n / D rows of each factor

Whole factors divide the work without a remainder. Of those that are left over, each
device has its rows of A and of (A + ε)⁻¹: for the latter it gathers A, factorises it as
all others do, and solves for its own columns of I. The axes of the mesh that divide
them are the only entry of the specification of a sharding; without a sharding, factors
are whole wherever they are used.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from ngd_jax import placement
from ngd_jax.kfac.groups import Group
from ngd_jax.types import Array, PyTree

__all__ = ["divide", "map_factors", "spec_of"]


def divide(group: Group, values: PyTree, sharding: NamedSharding | None) -> PyTree:
    """What belongs to the factors of a group, on their devices."""

    def place(x: Array) -> Array:
        return placement.place(x, sharding, *spec_of(group, x.ndim, sharding))

    return jax.tree.map(place, values)


def map_factors(
    fn: Any, group: Group, side: Array, shift: Array, sharding: NamedSharding | None
) -> Array:
    """`fn(factor, shift, axes)` for each; `axes` divide its rows, if any do."""
    axes = placement.axes_of(sharding) if group.is_by_rows else ()

    def local(side: Array, shift: Array) -> Array:
        if len(side) == 1:
            return fn(side[0], shift[0], axes)[None]
        # One at a time: one program for all, and no batched LAPACK, which hung.
        return jax.lax.map(lambda one: fn(*one, axes), (side, shift))

    if sharding is None:
        return local(side, shift)
    side, shift = divide(group, (side, shift), sharding)
    specs = spec_of(group, 3, sharding), spec_of(group, 1, sharding)
    mapped = jax.shard_map(
        local, mesh=sharding.mesh, in_specs=specs, out_specs=specs[0]
    )
    return mapped(side, shift)


def spec_of(group: Group, ndim: int, sharding: NamedSharding | None) -> PartitionSpec:
    """What divides an array with that many axes among those of a group."""
    # A long side has only vectors, which are small.
    if not group.is_matrices or (group.is_by_rows and ndim != 3):
        return PartitionSpec()
    axes = placement.axes_of(sharding)
    return PartitionSpec(None, axes) if group.is_by_rows else PartitionSpec(axes)
