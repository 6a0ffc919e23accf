"""Shared weights, recurrence, attention, convolution; Flax's own optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import ngd_jax as ngd
from ngd_jax.flax import TrainState, linen_model_fn, nnx_model_fn
from tests.flax.networks import (
    BATCH,
    LABELS,
    LinenTied,
    NnxNet,
    NnxTied,
    X,
    assert_close,
    cross_entropy,
    nnx_net,
    step_of,
)

# --- Architectures.


@pytest.mark.long
def test_shared_weights_are_one_parameter(params):
    linen_params = LinenTied().init(jax.random.key(0), X)["params"]
    model = NnxTied(nnx.Rngs(0))
    nnx.update(model, {"first": linen_params["layer"]})

    def plain_fn(params, batch):
        layer = params["layer"]
        x = jnp.tanh(batch["x"] @ layer["kernel"] + layer["bias"])
        return x @ layer["kernel"] + layer["bias"]

    expected, _ = step_of(plain_fn, linen_params, BATCH)
    from_linen, _ = step_of(linen_model_fn(LinenTied()), linen_params, BATCH)
    assert_close(from_linen, expected)
    from_nnx, _ = step_of(nnx_model_fn(model), nnx.state(model, nnx.Param), BATCH)
    assert_close(nnx.to_pure_dict(from_nnx)["first"], expected["layer"])


class LinenLSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(nn.LSTMCell(4))(x[..., None])[:, -1])


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x[..., None])
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2)(x))
        return nn.Dense(2)(x.mean(1))


class LinenConv(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Conv(4, (2,))(x[..., None])).reshape(16, -1))


class NnxLSTM(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(1, 4, rngs=rngs))
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.rnn(x[..., None])[:, -1])


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(1, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x[..., None])
        return self.out(self.norm(x + self.attention(x)).mean(1))


class NnxConv(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (2,), rngs=rngs)
        self.out = nnx.Linear(12, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.conv(x[..., None])).reshape(16, -1))


# Those that take long to compile: without the default solver.
@pytest.mark.long
@pytest.mark.parametrize(
    ("module", "options"),
    [
        (LinenLSTM, {"solver": ngd.CG(5)}),
        (LinenAttention, {"solver": ngd.CG(5)}),
        (LinenConv, {}),
    ],
)
def test_linen_training_by_train_state_reduces_the_loss(module, options):
    net = module()
    model_fn = linen_model_fn(net)
    tx = ngd.natural_gradient(None, model_fn, ngd.Categorical(), max_kl=1e-2, **options)
    params = jax.jit(net.init)(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)

    @jax.jit
    def train_step(state, batch):
        def loss_fn(params):
            return cross_entropy(model_fn(params, batch), batch["y"])

        value, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads, batch=batch, value=value), value

    values = []
    for _ in range(9):
        state, value = train_step(state, BATCH)
        values.append(float(value))
        assert state.opt_state.info.status == ngd.StepStatus.TAKEN
        assert 0.9 * 1e-2 <= state.opt_state.info.measured_kl <= 1e-2
    assert values[-1] < 0.75 * values[0]


@pytest.mark.long
@pytest.mark.parametrize("module", [NnxLSTM, NnxAttention, NnxConv])
def test_nnx_training_by_nnx_optimizer_reduces_the_loss(module):
    model = module(nnx.Rngs(0))
    model_fn = nnx_model_fn(model)
    tx = ngd.natural_gradient(
        None, model_fn, ngd.Categorical(), max_kl=1e-2, solver=ngd.CG(5)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    traces = []

    @nnx.jit
    def train_step(model, optimizer, batch):
        traces.append(1)

        def loss_fn(model):
            return cross_entropy(model(batch["x"]), batch["y"])

        value, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads, batch=batch)
        return value

    values = [float(train_step(model, optimizer, BATCH)) for _ in range(9)]
    info = optax.tree.get(optimizer.opt_state, "NaturalGradientInfo")
    assert info.status.get_value() == ngd.StepStatus.TAKEN
    assert 0.9 * 1e-2 <= info.measured_kl.get_value() <= 1e-2
    assert values[-1] < 0.75 * values[0]
    assert len(traces) == 1


@pytest.mark.long
def test_nnx_optimizer_makes_the_updates_of_the_plain_transformation(params):
    model = nnx_net(params)
    model_fn = nnx_model_fn(model)
    tx = ngd.natural_gradient(
        0.5, model_fn, ngd.Categorical(), max_kl=1e-2, solver=ngd.CG(5)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: cross_entropy(model(X), LABELS))(model)
    # Evaluated before: the optimizer moves the model.
    update = jax.jit(tx.update)
    expected, _ = update(nnx.to_pure_dict(grads), tx.init(params), params, batch=BATCH)
    expected = optax.apply_updates(params, expected)
    nnx.jit(lambda model, optimizer: optimizer.update(model, grads, batch=BATCH))(
        model, optimizer
    )
    assert_close(nnx.state(model, nnx.Param), expected, rtol=1e-5)
    assert optimizer.step.get_value() == 1
    # Nothing traced is left behind, neither in the model nor in model_fn.
    np.testing.assert_allclose(
        model_fn(expected, BATCH), model(X), rtol=1e-4, atol=1e-6
    )


@pytest.mark.long
def test_nnx_optimizer_runs_without_jit_too():
    model = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
    tx = ngd.natural_gradient(
        1.0, nnx_model_fn(model), ngd.Gaussian(), damping=0.0, solver=ngd.Cholesky()
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    weights = jnp.array([[1.0, -1.0], [2.0, 0.0], [3.0, 0.5]])
    loss_fn = lambda model: jnp.sum((model(X) - X @ weights) ** 2) / 32  # noqa: E731
    optimizer.update(model, nnx.grad(loss_fn)(model), batch={"x": X})
    np.testing.assert_allclose(model.kernel.get_value(), weights, rtol=1e-4, atol=1e-5)


def test_filters_other_than_param_train_their_part_only():
    class Adapter(nnx.Param):
        pass

    model = NnxNet(nnx.Rngs(0))
    model.out.kernel = Adapter(model.out.kernel.get_value())
    model_fn = nnx_model_fn(model, wrt=Adapter)
    tx = ngd.natural_gradient(
        None, model_fn, ngd.Categorical(), max_kl=1e-2, solver=ngd.CG(5)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=Adapter)
    grads = nnx.grad(
        lambda model: cross_entropy(model(X), LABELS),
        argnums=nnx.DiffState(0, Adapter),
    )(model)
    before = model.hidden.kernel.get_value()
    moved = model.out.kernel.get_value()
    nnx.jit(lambda model, optimizer: optimizer.update(model, grads, batch=BATCH))(
        model, optimizer
    )
    np.testing.assert_array_equal(before, model.hidden.kernel.get_value())
    assert not np.array_equal(moved, model.out.kernel.get_value())
