"""The memory of a training step, planned from shapes."""

import jax
import jax.numpy as jnp
import pytest

import ngd_jax as ngd


def model_fn(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def loss_fn(outputs, batch):
    return jnp.mean(outputs**2)


@pytest.fixture
def problem():
    params = {"v": jnp.ones((64, 8)), "w": jnp.ones((32, 64))}
    return params, jnp.ones((16, 32))


def num_bytes(values):
    return sum(x.nbytes for x in jax.tree.leaves(values))


def transformation(solver):
    return ngd.natural_gradient(
        1.0, model_fn, ngd.Gaussian(), max_kl=0.1, solver=solver
    )


@pytest.mark.parametrize("loss_fn", [None, loss_fn])
def test_shapes_are_enough_for_a_plan(loss_fn, problem):
    params, x = problem
    tx = transformation(ngd.KFAC())
    shapes = jax.eval_shape(lambda: problem)
    found = ngd.describe(tx, *shapes, loss_fn=loss_fn, run=False)
    assert found.plan.parameters == num_bytes(params)
    assert found.plan.state == num_bytes(tx.init(params))
    assert found.checks == []
    assert [claim for *_, claim in found.parameters] == [
        "dense 64 → 8",
        "dense 32 → 64",
    ]
    assert found.plan == ngd.describe(tx, params, x, loss_fn=loss_fn, run=False).plan
    # With parameters and state donated, there is one copy of each, and a gradient.
    least = 2 * found.plan.parameters + found.plan.state
    assert least < found.plan.peak < 3 * least
    assert "Memory: parameters 10.2 kB, state " in str(found)
    assert "Checks" not in str(found)


def test_what_a_batch_adds_is_in_the_peak(problem):
    params, _ = problem
    tx = transformation(ngd.CG(2))
    sizes = (256, 512)
    batches = [jax.ShapeDtypeStruct((n, 32), jnp.float32) for n in sizes]
    few, many = (ngd.describe(tx, params, x, run=False).plan for x in batches)
    assert few[:2] == many[:2]
    # Inputs, and hidden units that the backward pass needs.
    assert many.peak - few.peak >= 256 * (32 + 64) * 4


def test_with_checks_there_is_no_peak(problem):
    found = ngd.describe(transformation(ngd.CG(2)), *problem)
    assert found.plan.peak is None
    assert found.checks
