"""Networks in linen, in nnx and as plain functions, and what the tests share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import ngd_jax as ngd

X = jax.random.normal(jax.random.key(0), (16, 3))
LABELS = jnp.argmax(X @ jax.random.normal(jax.random.key(1), (3, 2)), axis=-1)
BATCH = {"x": X, "y": LABELS}


class LinenNet(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="hidden")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(self.rate, deterministic=not train)(nn.tanh(x))
        return nn.Dense(2, name="out")(x)

    def encode(self, x):
        return 2.0 * x


class NnxNet(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x, scale=1.0):
        x = self.dropout(nnx.tanh(self.norm(self.hidden(x))))
        return scale * self.out(x)

    def encode(self, x):
        return 2.0 * x


def plain_net(params, x, stats=None):
    """The same network in evaluation mode with `stats`, else in training mode."""
    x = x @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    if stats is None:
        mean, variance = x.mean(0), jnp.mean(x**2, 0) - x.mean(0) ** 2
    else:
        mean, variance = stats["mean"], stats["var"]
    x = (x - mean) / jnp.sqrt(variance + 1e-5)
    x = jnp.tanh(x * params["norm"]["scale"] + params["norm"]["bias"])
    return x @ params["out"]["kernel"] + params["out"]["bias"]


STATS = {"mean": jnp.array([0.1, -0.2, 0.3, 0.0]), "var": jnp.array([0.5, 1.0, 2.0, 1])}


def nnx_net(params, rate=0.0, stats=None):
    model = NnxNet(nnx.Rngs(params=0, dropout=1), rate)
    nnx.update(model, params)
    if stats is not None:
        nnx.update(model, {"norm": stats})
    return model


def assert_close(actual, expected, rtol=2e-4, atol=1e-6):
    actual, expected = (nnx.to_pure_dict(nnx.State(t)) for t in (actual, expected))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol, atol), actual, expected
    )


def step_of(model_fn, params, batch, **options):
    options = {"max_kl": 1e-2, "solver": ngd.CG(5)} | options
    tx = ngd.natural_gradient(None, model_fn, ngd.Categorical(), **options)

    def loss_fn(params):
        return cross_entropy(model_fn(params, batch), LABELS)

    @jax.jit
    def step(params):
        state = tx.init(params)
        return tx.update(jax.grad(loss_fn)(params), state, params, batch=batch)

    return step(params)


def cross_entropy(logits, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


class LinenMasked(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=False):
        w = self.param("w", nn.initializers.ones, (3,))
        return nn.Dropout(0.5, deterministic=deterministic)(x * w)


class NnxMasked(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jnp.ones(3))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, deterministic=None):
        return self.dropout(x * self.w[...], deterministic=deterministic)


class LinenTied(nn.Module):
    def setup(self):
        self.layer = nn.Dense(3)

    def __call__(self, x):
        return self.layer(nn.tanh(self.layer(x)))


class NnxTied(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.second = self.first

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))
