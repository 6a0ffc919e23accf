"""Handwritten digits: scikit-learn's 8 x 8 images, ten classes, a Flax MLP.

The loss is the mean cross-entropy, which is minus the log-likelihood of the
categorical distribution whose logits are the network's outputs. The split (1437 to
train on, 360 to test on, the classes in equal proportions) is part of the task and
does not depend on the seed of a run.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits as load_sklearn_digits
from sklearn.model_selection import train_test_split

import ngd_jax as ngd
from experiments.settings import AT_LEAST_ONE
from experiments.tasks.task import PyTree, Task

__all__ = ["MLP", "DigitsConfig", "load_digits", "make_digits"]

NUM_CLASSES = 10
NUM_PIXELS = 64
NUM_TEST = 360
MAX_PIXEL = 16.0


@dataclasses.dataclass
class DigitsConfig:
    """Settings of the task `digits`.

    Attributes:
      name: "digits".
      hidden_sizes: widths of the hidden layers.
    """

    name: str
    hidden_sizes: Annotated[list[int], AT_LEAST_ONE]


class MLP(nn.Module):
    """A fully connected network with tanh between its layers.

    Attributes:
      sizes: widths of the layers, the outputs last.
    """

    sizes: Sequence[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the outputs `[..., sizes[-1]]` for inputs `[..., D]`."""
        for size in self.sizes[:-1]:
            x = jnp.tanh(nn.Dense(size)(x))
        return nn.Dense(self.sizes[-1])(x)


def load_digits() -> tuple[PyTree, PyTree]:
    """Returns the training and the test set: pixels `x` in [0, 1], labels `y`."""
    images, labels = load_sklearn_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (images / MAX_PIXEL).astype(np.float32),
        labels.astype(np.int32),
        test_size=NUM_TEST,
        stratify=labels,
        random_state=0,
    )
    return {"x": x_train, "y": y_train}, {"x": x_test, "y": y_test}


def make_digits(config: DigitsConfig) -> Task:
    """Builds the task from its settings."""
    train, test = load_digits()
    mlp = MLP((*config.hidden_sizes, NUM_CLASSES))

    def init_fn(key: jax.Array) -> tuple[PyTree, PyTree]:
        return mlp.init(key, jnp.zeros((1, NUM_PIXELS)))["params"], {}

    def model_fn(params: PyTree, batch: PyTree) -> jax.Array:
        return mlp.apply({"params": params}, batch["x"])  # pyright: ignore[reportReturnType]

    def output_loss_fn(outputs: PyTree, batch: PyTree) -> jax.Array:
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"])
        )

    def metrics_fn(outputs: PyTree, batch: PyTree) -> dict[str, jax.Array]:
        return {"accuracy": jnp.mean(jnp.argmax(outputs, axis=-1) == batch["y"])}

    return Task(
        name=config.name,
        train=train,
        test=test,
        init_fn=init_fn,
        model_fn=model_fn,
        likelihood=ngd.Categorical(),
        output_loss_fn=output_loss_fn,
        metrics_fn=metrics_fn,
    )
