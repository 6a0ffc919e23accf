"""Weights that fit every network in these tests."""

import jax
import pytest

from tests.flax.networks import (
    LinenNet,
    X,
)


@pytest.fixture(scope="module")
def params():
    params = jax.jit(LinenNet().init)(jax.random.key(2), X)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noise = [
        0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(
        structure, [x + e for x, e in zip(leaves, noise, strict=True)]
    )
