"""The TrainState that forwards extra arguments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state as flax_train_state

import ngd_jax as ngd
from ngd_jax.flax import TrainState, linen_model_fn
from tests.flax.networks import (
    BATCH,
    LABELS,
    STATS,
    LinenNet,
    assert_close,
    cross_entropy,
)

# --- TrainState.


class StateWithStats(TrainState):
    batch_stats: Any = None


def test_train_state_replaces_fields_and_forwards_everything_else(params):
    received = {}

    def update(updates, state, params=None, **extra_args):
        received.update(extra_args)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda _: (), update)
    state = StateWithStats.create(apply_fn=None, params=params, tx=tx, batch_stats=1)
    state = state.apply_gradients(
        grads=params, batch=BATCH, value=3.0, batch_stats=2, anything=4
    )
    assert state.batch_stats == 2
    assert received == {"batch": BATCH, "value": 3.0, "anything": 4}
    assert isinstance(state, StateWithStats)
    assert state.step == 1


def test_train_state_equals_that_of_flax_with_plain_optimizers(params):
    tx = optax.adamw(1e-2)
    ours, theirs = (
        cls.create(apply_fn=None, params=params, tx=tx)
        for cls in (TrainState, flax_train_state.TrainState)
    )
    for _ in range(2):
        ours = ours.apply_gradients(grads=params, batch=BATCH)
        theirs = theirs.apply_gradients(grads=params)
    assert_close(ours.params, theirs.params, rtol=0, atol=0)
    assert ours.step == theirs.step == 2


def test_train_state_overwrites_with_gradients_as_flax_does():
    inner = {"w": jnp.ones(2)}
    params = {"params": inner, OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones(3)}}
    grads = {"params": inner, OVERWRITE_WITH_GRADIENT: {"scale": jnp.zeros(3)}}
    ours, theirs = (
        cls.create(apply_fn=None, params=params, tx=optax.adam(0.1))
        for cls in (TrainState, flax_train_state.TrainState)
    )
    ours = ours.apply_gradients(grads=grads, batch=BATCH)
    theirs = theirs.apply_gradients(grads=grads)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    np.testing.assert_array_equal(ours.params[OVERWRITE_WITH_GRADIENT]["scale"], 0)


@pytest.mark.long
@pytest.mark.usefixtures("optimized")
def test_train_state_equals_the_plain_transformation(params):
    model_fn = linen_model_fn(LinenNet(), collections=("batch_stats",), train=True)
    batch = BATCH | {"batch_stats": {"norm": STATS}}
    tx = ngd.natural_gradient(
        None, model_fn, ngd.Categorical(), max_kl=1e-2, solver=ngd.CG(5)
    )
    grads = jax.grad(lambda p: cross_entropy(model_fn(p, batch), LABELS))(params)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    step = jax.jit(lambda state: state.apply_gradients(grads=grads, batch=batch))
    state = step(state)
    update = jax.jit(lambda p: tx.update(grads, tx.init(p), p, batch=batch))
    updates, opt_state = update(params)
    assert_close(state.params, optax.apply_updates(params, updates), 1e-6, 1e-7)
    np.testing.assert_allclose(
        state.opt_state.info.measured_kl, opt_state.info.measured_kl, rtol=1e-5
    )


def test_train_state_serves_line_searches(params):
    model_fn = linen_model_fn(LinenNet(), collections=("batch_stats",), train=True)
    batch = BATCH | {"batch_stats": {"norm": STATS}}

    def value_fn(params, batch):
        return cross_entropy(model_fn(params, batch), batch["y"])

    tx = optax.chain(
        ngd.natural_gradient(
            1.0, model_fn, ngd.Categorical(), max_kl=0.5, solver=ngd.CG(5)
        ),
        optax.scale_by_backtracking_linesearch(15),
    )
    state = TrainState.create(apply_fn=None, params=params, tx=tx)

    @jax.jit
    def train_step(state):
        value, grad = jax.value_and_grad(value_fn)(state.params, batch)
        return state.apply_gradients(
            grads=grad, batch=batch, value=value, grad=grad, value_fn=value_fn
        )

    before = value_fn(state.params, batch)
    assert value_fn(train_step(state).params, batch) < before


@pytest.mark.parametrize("field", ["step", "params", "opt_state"])
def test_train_state_refuses_fields_that_the_step_sets(field):
    params = {"w": jnp.ones(2)}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1))
    assert field in {f.name for f in dataclasses.fields(state)}
    with pytest.raises(TypeError, match=f"sets .*{field}.* itself"):
        state.apply_gradients(grads=params, **{field: 1})
