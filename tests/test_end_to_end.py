"""Digits, from pixels to a trained Flax network, by natural gradient and by Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import ngd_jax as ngd
from ngd_jax.flax import TrainState, linen_model_fn

NUM_STEPS = 25
MAX_KL = 3e-2


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.tanh(nn.Dense(20)(x)))


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[:512]
    return {
        "x": jnp.asarray(images[order] / 16.0, jnp.float32),
        "y": jnp.asarray(labels[order]),
    }


def train(tx, batch):
    """The losses, the states of the optimizer and the parameters after every step."""
    net = Network()
    model_fn = linen_model_fn(net)
    params = jax.jit(net.init)(jax.random.key(0), batch["x"])["params"]
    state = TrainState.create(apply_fn=net.apply, params=params, tx=tx(model_fn))

    def loss_fn(params):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model_fn(params, batch), batch["y"]
        )
        return losses.mean()

    def step(state, _):
        value, grads = jax.value_and_grad(loss_fn)(state.params)
        new_state = state.apply_gradients(grads=grads, batch=batch, value=value)
        kl = ngd.mean_kl(
            model_fn, state.params, new_state.params, batch, ngd.Categorical()
        )
        info = optax.tree.get(new_state.opt_state, "NaturalGradientInfo")
        return new_state, (value, kl, info)

    return jax.jit(lambda state: jax.lax.scan(step, state, length=NUM_STEPS))(state)


def test_natural_gradient_learns_digits_within_its_radius_and_beats_adam(digits):
    state, (values, kls, info) = train(
        lambda model_fn: ngd.natural_gradient(
            None, model_fn, ngd.Categorical(), max_kl=MAX_KL
        ),
        digits,
    )
    assert (np.asarray(kls) <= 1.05 * MAX_KL).all()
    assert (np.asarray(info.measured_kl) <= MAX_KL).all()
    np.testing.assert_array_equal(info.status, ngd.StepStatus.TAKEN)
    assert state.opt_state.count == NUM_STEPS
    logits = state.apply_fn({"params": state.params}, digits["x"])
    assert np.mean(np.argmax(logits, -1) == digits["y"]) > 0.95

    @jax.jit
    @jax.vmap
    def final_value_of_adam(rate):
        return train(lambda _: optax.adam(rate), digits)[1][0][-1]

    adam_values = final_value_of_adam(jnp.array([1e-3, 3e-3, 1e-2, 3e-2, 1e-1]))
    assert values[-1] < 0.5 * adam_values.min()
