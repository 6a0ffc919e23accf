"""What a sharding says, and that placing changes no values; see test_sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ngd_jax import placement


def _sharding(*spec, kind=AxisType.Auto):
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(kind, kind))
    return NamedSharding(mesh, PartitionSpec(*spec))


def test_axes_are_those_of_the_first_entry():
    assert placement.axes_of(None) == ()
    assert placement.axes_of(_sharding()) == ()
    assert placement.axes_of(_sharding("data")) == ("data",)
    assert placement.axes_of(_sharding(("data", "model"))) == ("data", "model")
    assert placement.num_parts(None) == placement.num_parts(_sharding("data")) == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_placing_and_reshaping_keep_the_values(kind):
    values = jnp.arange(6.0).reshape(2, 3)
    sharding = _sharding("data", kind=kind)
    placed = jax.jit(lambda x: placement.place(x, sharding, "data"))(values)
    np.testing.assert_array_equal(placed, values)
    flat = jax.jit(lambda x: placement.reshape(x, (6,), sharding))(values)
    np.testing.assert_array_equal(flat, np.arange(6.0))
    np.testing.assert_array_equal(placement.reshape(values, (3, 2), None)[2], [4, 5])


def test_a_sharding_that_divides_nothing_raises():
    placement.check_sharding(None, "the rows")
    placement.check_sharding(_sharding("data"), "the rows")
    for spec in ((), (None,), ("data", "model")):
        with pytest.raises(ValueError, match="divide the rows as its only entry"):
            placement.check_sharding(_sharding(*spec), "the rows")
    with pytest.raises(TypeError, match="must be a NamedSharding, got 'data'"):
        placement.check_sharding("data", "the rows")
