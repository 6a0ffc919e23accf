"""Factors in blocks and in narrow dtypes, against masked and dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ngd_jax as ngd
from ngd_jax.kfac import KFAC, Kronecker, claims
from tests import reference
from tests.test_kfac import (
    COUNT,
    damped_product,
    inverse_of,
    line,
    line_problem,
    network_problem,
    normal,
)


def test_the_inverse_is_that_of_the_factors_without_what_is_between_blocks(x64, rng):
    params, x = line_problem(rng, "float64", 5)
    # Sides of 5 and a bias: two blocks of three, of inputs and of outputs.
    inverse, state = inverse_of(line, params, x, 0.1, ngd.Gaussian(), max_block=3)
    _, whole = inverse_of(line, params, x, 0.1, ngd.Gaussian())
    [pair] = [entry for entry in whole.averages if hasattr(entry, "rows")]
    mask = np.kron(np.eye(2), np.ones((3, 3)))
    # The parameters are in the order bias, weight; the 1 of a bias is the last input.
    order = [5, *range(5)]
    a = (pair.rows[0] * mask)[order][:, order]
    g = (pair.columns[0] * mask)[:5, :5]
    expected = np.linalg.inv(damped_product(a, g, 0.1))
    np.testing.assert_allclose(inverse, expected, atol=1e-12)
    [pair] = [entry for entry in state.averages if hasattr(entry, "rows")]
    assert pair.rows.values.shape == pair.columns.values.shape == (1, 2, 3, 3)


def test_blocks_as_large_as_the_sides_change_nothing(x64, rng):
    params, x = line_problem(rng, "float64", 3)
    found = [
        inverse_of(line, params, x, 0.1, ngd.Gaussian(), steps=2, **options)[0]
        for options in ({}, {"max_block": 5}, {"dtype": jnp.float64})
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("damping", [1e-8, 1e-2])
def test_a_rounded_inverse_is_positive_definite(damping, rng):
    """Although the factors are singular, and rounded have negative eigenvalues."""
    params = {
        "b": normal(rng, 3, dtype="float32"),
        "w": normal(rng, 30, 3, dtype="float32"),
    }
    x = normal(rng, COUNT, 30, dtype="float32") + 5
    inverse, state = inverse_of(
        line, params, x, damping, ngd.Gaussian(), dtype=jnp.bfloat16
    )
    assert np.isfinite(inverse).all()
    np.testing.assert_allclose(inverse, inverse.T, rtol=1e-3, atol=1e-5 * inverse.max())
    assert np.linalg.eigvalsh(inverse.astype(float)).min() > 0
    pairs = [entry for entry in state.averages if hasattr(entry, "rows")]
    [averages] = [np.asarray(pair.rows.values[0, 0], float) for pair in pairs]
    assert np.linalg.eigvalsh(averages).min() < -1e-3
    for entries in (state.averages, state.inverses):
        assert {leaf.dtype for leaf in jax.tree.leaves(entries[-1])} == {
            np.dtype(jnp.bfloat16)
        }


@pytest.mark.parametrize("options", [{"max_block": 2}, {"dtype": jnp.bfloat16}])
def test_steps_with_it_lower_the_loss(options, rng):
    params, x = network_problem(rng, "float32")
    y = jnp.asarray(rng.integers(0, 3, len(x)))

    def loss_fn(outputs, batch):
        picked = jax.nn.log_softmax(outputs)[jnp.arange(len(batch["y"])), batch["y"]]
        return -picked.mean()

    def model_fn(params, batch):
        return reference.network(params, batch["x"])

    tx = ngd.natural_gradient(
        1.0, model_fn, ngd.Categorical(), max_kl=0.1, solver=KFAC(**options)
    )
    batch = {"x": x, "y": y}

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(lambda p: loss_fn(model_fn(p, batch), batch))(
            params
        )
        updates, state = tx.update(grads, state, params, batch=batch)
        return jax.tree.map(jnp.add, params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(8):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]


def test_the_description_names_the_blocks(rng):
    params, x = network_problem(rng, "float32")
    fisher = ngd.linearize_fisher(reference.network, params, x, ngd.Categorical())
    found = " ".join(claims(fisher, max_block=2))
    assert found.count("in blocks of 2") == found.count("dense")
    assert "blocks" not in " ".join(claims(fisher, max_block=2048))


def test_what_does_not_go_together_raises():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))
    with pytest.raises(ValueError, match="leave out `max_block` and `dtype`"):
        Kronecker(sharding=sharding, max_block=4)
    with pytest.raises(ValueError, match="`dtype` must be a floating one"):
        KFAC(dtype=jnp.int8)
    with pytest.raises(ValueError, match="`max_block` must be"):
        KFAC(max_block=0)
