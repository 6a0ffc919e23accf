"""The small networks and the data of the experiments."""

import itertools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets

__all__ = ["Layers", "digits", "mlp", "mlp_params", "model_fn"]

Layers = list[dict[str, jax.Array]]


def mlp_params(key: jax.Array, widths: list[int]) -> Layers:
    """Weights N(0, 1 / inputs) and zero biases, a dict for each layer."""
    # A single draw for all: every shape that is drawn is a program to compile.
    weights = jax.random.normal(
        key, (sum(a * b for a, b in itertools.pairwise(widths)),)
    )
    layers, start = [], 0
    for inputs, outputs in itertools.pairwise(widths):
        end = start + inputs * outputs
        w = weights[start:end].reshape(inputs, outputs) / np.sqrt(inputs)
        layers.append({"w": w, "b": jnp.zeros(outputs)})
        start = end
    return layers


def mlp(
    params: Layers,
    x: jax.Array,
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
) -> jax.Array:
    """A multilayer perceptron with linear outputs: `[N, inputs]` to `[N, outputs]`."""
    for layer in params[:-1]:
        x = activation(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def model_fn(params: Layers, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The outputs of a tanh network for the inputs of a batch."""
    return mlp(params, batch["x"])


def digits(count: int) -> dict[str, jax.Array]:
    """Handwritten digits of scikit-learn: `x` `[count, 64]` in [0, 1], `y` labels."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(labels))[:count]
    return {"x": jnp.asarray(images[chosen] / 16), "y": jnp.asarray(labels[chosen])}
