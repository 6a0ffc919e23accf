"""Initial weights used in the literature on curvature methods."""

import jax
import jax.numpy as jnp

__all__ = ["sparse_weights"]

# Martens 2010: the number of nonzero incoming weights with which each unit starts.
_INCOMING = 15


def sparse_weights(key: jax.Array, inputs: int, outputs: int) -> jax.Array:
    """Returns weights `[inputs, outputs]`: N(0, 1) for 15 inputs of each unit, else 0.

    Units differ from each other and do not saturate, however many inputs there are.

    References:
      Martens, Deep learning via Hessian-free optimization, 2010, section 5.
    """
    value_key, place_key = jax.random.split(key)
    ranks = jnp.argsort(jax.random.uniform(place_key, (inputs, outputs)), axis=0)
    values = jax.random.normal(value_key, (inputs, outputs))
    return jnp.where(ranks < _INCOMING, values, 0.0)
