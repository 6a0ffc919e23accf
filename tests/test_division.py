"""K-FAC's factors divided over devices: how much of state and work is on each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ngd_jax as ngd
from ngd_jax import placement
from ngd_jax.kfac.division import spec_of
from ngd_jax.kfac.groups import Block, groups_of
from ngd_jax.kfac.inverses import refreshed_inverses
from tests.marks import long_unless


def sharding(num_devices, *spec):
    mesh = AbstractMesh((num_devices,), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, P(*spec))


def transformer(depth, width):
    """The shapes of its matrices."""
    layer = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    return [*layer * depth, (width, 100)]


MODELS = {
    "transformer": transformer(8, 128),
    "eleven": [(256, 256)] * 11,
    "perceptron": [(784, 512), (512, 512), (512, 256), (256, 10)],
}


def numbers_on_one(params, where):
    """The numbers of the state on one device."""
    kronecker = ngd.Kronecker(sharding=where)
    state = jax.eval_shape(kronecker.init, params)
    groups = groups_of(params, kronecker.max_size, placement.num_parts(where))
    total = 0
    for entries in (state.averages, state.inverses):
        for group, entry in zip(groups, entries, strict=True):
            for leaf in jax.tree.leaves(entry):
                shape = leaf.shape
                if where is not None:
                    spec = spec_of(group, leaf.ndim, where)
                    shape = NamedSharding(where.mesh, spec).shard_shape(shape)
                total += np.prod(shape)
    return total


def operations(jaxpr):
    """Those of factorisations, solves and products, on one device."""
    total = 0
    for equation in jaxpr.eqns:
        inputs = [x.aval.shape for x in equation.invars]
        if equation.primitive.name == "cholesky":
            total += inputs[0][-1] ** 3 / 3
        elif equation.primitive.name == "triangular_solve":
            total += np.prod(inputs[1]) * inputs[0][-1]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            size = np.prod([inputs[0][axis] for axis in contracted])
            total += 2 * size * np.prod(equation.outvars[0].aval.shape)
        for name in ("jaxpr", "call_jaxpr"):
            inner = equation.params.get(name)
            if inner is not None:
                count = equation.params.get("length", 1)
                total += count * operations(getattr(inner, "jaxpr", inner))
    return total


def operations_of_refresh(params, where):
    groups = [
        group._replace(
            blocks=tuple(
                None if one.leaf < 0 else Block(one.leaf, one.room, None)
                for one in group.members
            )
        )
        for group in groups_of(params, 2048, placement.num_parts(where))
    ]
    state = jax.eval_shape(ngd.Kronecker(sharding=where).init, params)
    refresh = functools.partial(refreshed_inverses, groups, where, weights=None)
    damping = jax.ShapeDtypeStruct((), jnp.float32)
    return operations(jax.make_jaxpr(refresh)(state, damping).jaxpr)


@pytest.mark.parametrize(
    "name", long_unless(MODELS.keys() - {"transformer"}, MODELS.keys())
)
def test_state_and_work_of_eight_devices_are_an_eighth(name):
    zero = np.zeros((), np.float32)
    params = [np.broadcast_to(zero, shape) for shape in MODELS[name]]
    state = [numbers_on_one(params, x) for x in (None, sharding(8, "data"))]
    work = [operations_of_refresh(params, x) for x in (None, sharding(8, "data"))]
    assert state[1] <= 1.1 * state[0] / 8
    # Of rows, every device factorises all: a tenth of all operations.
    by_rows = {"transformer": 0.0, "eleven": 3 / 11, "perceptron": 1.0}[name]
    assert work[1] <= (1.1 / 8 + 0.1 * by_rows) * work[0]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("data", "must be a NamedSharding, got 'data'"),
        (sharding(8), "as its only entry"),
        (sharding(8, None, "data"), "as its only entry"),
    ],
)
def test_a_wrong_sharding_raises(where, message):
    with pytest.raises((TypeError, ValueError), match=f"`sharding` .*{message}"):
        placement.check_sharding(where, "the factors")
    if not isinstance(where, str):  # which beartype refuses earlier
        with pytest.raises(ValueError, match=f"`sharding` .*{message}"):
            ngd.Kronecker(sharding=where)
