"""Equal parts of an array on the devices of a mesh, with any kind of axes.

    NamedSharding(mesh, P("data")):    part i of D on device i

Knows nothing of what the arrays mean.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ngd_jax.types import Array

__all__ = ["axes_of", "check_sharding", "num_parts", "place", "reshape", "slice_of"]


def check_sharding(sharding: Any, what: str) -> None:
    """Raises unless it is None or names mesh axes in a single entry.

    Args:
      sharding: what a user passed as `sharding`.
      what: what it divides, for the message.

    Raises:
      TypeError, ValueError: for anything else.
    """
    if sharding is None:
        return
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"`sharding` must be a NamedSharding, got {sharding!r}.")
    if len(sharding.spec) != 1 or not axes_of(sharding):
        raise ValueError(
            f"`sharding` must name the mesh axes that divide {what} as its only entry, "
            f'as in P("data") or P(("data", "model")), got {sharding.spec}.'
        )


def axes_of(sharding: NamedSharding | None) -> tuple[str, ...]:
    """The mesh axes of the first entry; none without a sharding."""
    entry = sharding.spec[0] if sharding is not None and len(sharding.spec) else None
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def num_parts(sharding: NamedSharding | None) -> int:
    """How many parts there are."""
    if sharding is None:
        return 1
    return math.prod(sharding.mesh.shape[axis] for axis in axes_of(sharding))


def place(values: Array, sharding: NamedSharding | None, *entries: Any) -> Array:
    """The same values, with each axis divided as its entry says, on that mesh.

    Args:
      values: any array.
      sharding: only its mesh counts; None leaves the values where they are.
      *entries: of a `PartitionSpec`; none for all values on every device.
    """
    return reshape(values, jnp.shape(values), sharding, *entries)


def reshape(
    values: Array, shape: tuple[int, ...], sharding: NamedSharding | None, *entries: Any
) -> Array:
    """The values in another shape, placed like that; see `place`."""
    if sharding is None:
        return jnp.reshape(values, shape)
    placed = NamedSharding(sharding.mesh, PartitionSpec(*entries))
    if AxisType.Explicit not in sharding.mesh.axis_types:
        values = jnp.reshape(values, shape)
        return jax.lax.with_sharding_constraint(values, placed)
    if jnp.shape(values) != shape:
        values = jax.lax.reshape(values, shape, out_sharding=placed)
    return jax.sharding.reshard(values, placed)


def slice_of(values: Array, axes: tuple[str, ...], axis: int = 0) -> Array:
    """This device's part along an axis, inside `jax.shard_map`."""
    size = values.shape[axis] // jax.lax.axis_size(axes)
    start = jax.lax.axis_index(axes) * size
    return jax.lax.dynamic_slice_in_dim(values, start, size, axis)
