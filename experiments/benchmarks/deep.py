"""A deep Transformer as one loop over its layers, for plans of memory and work.

    x + W₂ gelu(W₁ norm(x)) after x + attention(norm(x)), times L

in bfloat16 with float32 parameters, each layer computed again in the backward pass.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["Transformer"]


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A decoder for text.

    Attributes:
      depth: layers.
      width: of the stream between them; the hidden layers are four times as wide.
      num_heads: of attention.
      num_tokens: the size of the vocabulary.
      context: positions.
    """

    depth: int
    width: int
    num_heads: int = 8
    num_tokens: int = 256
    context: int = 64

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Parameters, float32; the first axis of a leaf in the stack counts layers."""
        width, hidden = self.width, 4 * self.width
        shapes = {
            "attention": (width, width),
            "down": (hidden, width),
            "key": (width, width),
            "query": (width, width),
            "up": (width, hidden),
            "value": (width, width),
        }
        stack = {
            name: jax.random.normal(key, (self.depth, *shape)) / shape[0] ** 0.5
            for name, shape in shapes.items()
        }
        for name in ("attention", "down"):
            stack[name] /= (2 * self.depth) ** 0.5
        norms = {
            "attention_norm": jnp.ones((self.depth, width)),
            "hidden_norm": jnp.ones((self.depth, width)),
        }
        bias = {"bias": jnp.zeros((self.depth, hidden))}
        return {
            "head": jax.random.normal(key, (width, self.num_tokens)) / width**0.5,
            "norm": jnp.ones(width),
            "places": 0.02 * jax.random.normal(key, (self.context, width)),
            "stack": stack | norms | bias,
            "tokens": 0.02 * jax.random.normal(key, (self.num_tokens, width)),
        }

    def __call__(self, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """Logits, float32, `[batch, context, num_tokens]`."""
        x = params["tokens"][tokens] + params["places"]
        layer = jax.checkpoint(self.layer, prevent_cse=False)
        x, _ = jax.lax.scan(
            lambda x, params: (layer(params, x), None),
            x.astype(jnp.bfloat16),
            params["stack"],
        )
        x = _norm(x, params["norm"]).astype(jnp.float32)
        return x @ params["head"]

    def layer(self, params: dict[str, Any], x: jax.Array) -> jax.Array:
        """One layer."""
        params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)
        shape = (*x.shape[:-1], self.num_heads, -1)
        normed = _norm(x, params["attention_norm"])
        query, key, value = (
            (normed @ params[name]).reshape(shape) for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + mixed.reshape(x.shape) @ params["attention"]
        hidden = _norm(x, params["hidden_norm"]) @ params["up"] + params["bias"]
        return x + jax.nn.gelu(hidden) @ params["down"]


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide**2, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + 1e-6)).astype(x.dtype) * scale


def loss_fn(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean cross-entropy of the next token."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], tokens[:, 1:]
    ).mean()
