"""A network whose dense layers are found, with every kind of likelihood."""

import functools

import jax
import jax.numpy as jnp

import ngd_jax as ngd

HEADS = ngd.Product(
    {"label": ngd.Categorical(), "size": ngd.Gaussian()},
    weights={"label": 2.0, "size": 0.5},
)
CASES = {
    "one output": (ngd.Gaussian(event_ndims=0), lambda z: z[:, 0]),
    "classes": (ngd.Categorical(), lambda z: z),
    "heads": (HEADS, lambda z: {"label": z[:, :2], "size": z[:, 2:]}),
    "covariance": (ngd.LogDensity(), lambda z: z[:, 0]),
    "covariance of many": (ngd.LogAmplitude(), lambda z: z[:, :2]),
}


def network(head, params, x):
    hidden = jnp.tanh(x @ params["first"] + params["bias"][None])
    hidden = jnp.tanh(hidden @ params["second"])
    return head(hidden @ params["last"])


def make(rng, dtype, offset=0.0):
    shapes = {"first": (9, 20), "bias": (20,), "second": (20, 20), "last": (20, 3)}
    params = {
        name: jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, dtype)
        for name, shape in shapes.items()
    }
    return params, jnp.asarray(rng.normal(size=(11, 9)) + offset, dtype)


def weighted_case(name, rng):
    """Model, likelihood, parameters, batch, and weights of which one is zero."""
    likelihood, head = CASES[name]
    params, x = make(rng, "float64")
    weights = jnp.asarray(rng.uniform(size=11)).at[3].set(0.0)
    if name == "covariance of many":
        weights = weights[:, None]
    return functools.partial(network, head), likelihood, params, x, weights


def widened(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)
