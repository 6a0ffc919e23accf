"""The networks whose steps are priced: perceptrons, a CNN and causal Transformers.

All are classifiers at their initial parameters, with a random batch in `Problem`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import ngd_jax as ngd
from experiments.benchmarks.contestants import Problem
from experiments.tasks.supervised.classification import MLP
from ngd_jax.flax import linen_model_fn

__all__ = ["NETWORKS"]

_WIDTH, _NUM_HEADS, _VOCABULARY = 64, 4, 65


class _CNN(nn.Module):
    """Two convolutions with batch normalisation, always in training mode."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for channels in (16, 32):
            x = nn.Conv(channels, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


class _Block(nn.Module):
    """Attention to earlier tokens and a perceptron, each on normalised inputs."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        normed = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(_NUM_HEADS)(normed, mask=mask)
        hidden = nn.gelu(nn.Dense(4 * _WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dense(_WIDTH)(hidden)


class _Transformer(nn.Module):
    num_layers: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        normal = nn.initializers.normal(0.02)
        places = self.param("places", normal, (tokens.shape[1], _WIDTH))
        x = nn.Embed(_VOCABULARY, _WIDTH)(tokens) + places
        for _ in range(self.num_layers):
            x = _Block()(x)
        return nn.Dense(_VOCABULARY)(nn.LayerNorm()(x))


def _classifier(module: nn.Module, x: jax.Array) -> Problem:
    """A module with its initial variables, the batch `x` and random labels for it."""
    params_key, label_key = jax.random.split(jax.random.key(1))
    logits, variables = jax.jit(module.init_with_output)(params_key, x)
    params = variables.pop("params")
    labels = jax.random.randint(label_key, logits.shape[:-1], 0, logits.shape[-1])

    def output_loss_fn(outputs: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"])
        return losses.mean()

    return Problem(
        model_fn=linen_model_fn(module, collections=tuple(variables)),
        likelihood=ngd.Categorical(),
        output_loss_fn=output_loss_fn,
        params=params,
        batch={"x": x, "y": labels, **variables},
        vector=params,
    )


def _normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


def _transformer(num_layers: int) -> Problem:
    tokens = jax.random.randint(jax.random.key(0), (16, 32), 0, _VOCABULARY)
    return _classifier(_Transformer(num_layers), tokens)


# By the names in `settings.NETWORKS`.
NETWORKS: dict[str, Callable[[], Problem]] = {
    "mlp_small": lambda: _classifier(MLP((128, 64, 10)), _normal(256, 64)),
    "mlp": lambda: _classifier(MLP((512, 256, 10)), _normal(512, 784)),
    "mlp_large": lambda: _classifier(MLP((4096, 4096, 10)), _normal(1024, 784)),
    "cnn": lambda: _classifier(_CNN(), _normal(128, 28, 28, 1)),
    "transformer_2": lambda: _transformer(2),
    "transformer_4": lambda: _transformer(4),
    "transformer_8": lambda: _transformer(8),
}
