"""Models that mix their examples, in all the ways that we know, and models that do not.

Each is `(params, batch) -> outputs` on the params and the batch of `make`.
"""

import jax
import jax.numpy as jnp


def make(rng, dtype="float64", num_examples=6):
    params = {
        "W": jnp.asarray(rng.normal(size=(3, 4)), dtype),
        "V": jnp.asarray(rng.normal(size=(4, 2)), dtype),
        "c": jnp.asarray(rng.normal(size=2), dtype),
    }
    batch = {
        "x": jnp.asarray(rng.normal(size=(num_examples, 3)), dtype),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(8), num_examples),
    }
    return params, batch


def _head(params, hidden):
    return hidden @ params["V"] + params["c"][None]


def batch_norm(params, batch):
    h = batch["x"] @ params["W"]
    h = (h - h.mean(0, keepdims=True)) / jnp.sqrt(h.var(0, keepdims=True) + 1e-5)
    return _head(params, jnp.tanh(h))


def batch_norm_before_a_zero_head(params, batch):
    """All outputs are equal, alone and in the batch; all derivatives differ."""
    return batch_norm({**params, "V": 0 * params["V"]} | _tangent(params), batch)


def _tangent(params):
    # Zero in value, with the derivative of the weight itself.
    return {"V": params["V"] - jax.lax.stop_gradient(params["V"])}


def batch_norm_with_a_large_offset(params, batch):
    """The outputs differ by less than their round-off in float32."""
    return 1e4 + batch_norm(params, batch)


def output_mean(params, batch):
    out = _head(params, jnp.tanh(batch["x"] @ params["W"]))
    return out - out.mean(0, keepdims=True)


def attention_over_examples(params, batch):
    h = batch["x"] @ params["W"]
    return _head(params, jax.nn.softmax(h @ h.T / 2) @ h)


def pairwise_differences(params, batch):
    h = jnp.tanh(batch["x"] @ params["W"])
    return _head(params, h - jnp.roll(h, 1, axis=0))


def norm_over_the_batch(params, batch):
    h = batch["x"] @ params["W"]
    return _head(params, h / jnp.linalg.norm(h, axis=0, keepdims=True))


def nothing_alone(params, batch):
    """Not a number for an example alone, and finite in a batch."""
    h = batch["x"] @ params["W"]
    return _head(params, h / h.std(0, keepdims=True))


def mixing_behind_a_large_scale(params, batch):
    """A head in units of 1e8 hides what is before it."""
    h = jnp.tanh(batch["x"] @ params["W"])
    h = h - h.mean(0, keepdims=True)
    return h @ jax.lax.stop_gradient(params["V"]) + 1e8 * params["c"][None]


def dropout(params, batch):
    """One key for the batch: what an example keeps depends on its place in it."""
    h = jnp.tanh(batch["x"] @ params["W"])
    keep = jax.random.bernoulli(batch["key"], 0.5, h.shape)
    return _head(params, jnp.where(keep, 2 * h, 0))


MIXING = {
    name: fn
    for name, fn in list(globals().items())
    if callable(fn) and not name.startswith("_") and name != "make"
}


def layer_norm(params, batch):
    h = batch["x"] @ params["W"]
    h = (h - h.mean(1, keepdims=True)) / jnp.sqrt(h.var(1, keepdims=True) + 1e-5)
    return _head(params, jnp.tanh(h))


def dropout_with_keys_of_examples(params, batch):
    h = jnp.tanh(batch["x"] @ params["W"])
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, h.shape[1:]))
    return _head(params, jnp.where(keep(batch["keys"]), 2 * h, 0))


def large_offset(params, batch):
    return 1e4 + _head(params, jnp.tanh(batch["x"] @ params["W"]))


SEPARABLE = {
    fn.__name__: fn for fn in (layer_norm, dropout_with_keys_of_examples, large_offset)
}
