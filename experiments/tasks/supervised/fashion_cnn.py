"""Fashion-MNIST with a convolutional network and batch normalisation.

In training, activations are normalised by the statistics of their batch, so the
examples of a batch depend on each other. Solvers that only need products, such as CG,
can handle this; those that use rows of the Jacobian need independent examples.

The running statistics, for evaluation, are the model state. The outputs in training
mode do not depend on them, so `model_fn` always reads the initial ones.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.running.settings import AT_LEAST_ONE, FRACTION
from experiments.tasks.supervised.classification import make_classifier
from experiments.tasks.supervised.convolution import Conv
from experiments.tasks.supervised.images import load_images, to_unit_interval
from experiments.tasks.supervised.task import PyTree, Task
from ngd_jax.flax import linen_model_fn

__all__ = ["CNN", "make_fashion_cnn"]

NUM_CLASSES = 10
SIDE = 28


class CNN(nn.Module):
    """Convolutions of stride 2, each with batch normalisation, and two dense layers.

    Attributes:
      channels: of the convolutions.
      hidden_size: width of the first dense layer.
      num_classes: width of the second one.
      statistics_decay: decay rate of the running statistics.
    """

    channels: Sequence[int]
    hidden_size: int
    num_classes: int
    statistics_decay: float

    @nn.compact
    def __call__(self, pixels: jax.Array, train: bool) -> jax.Array:
        """Returns the logits `[B, num_classes]` for images `[B, 784]` of bytes."""
        x = to_unit_interval(pixels).reshape(-1, SIDE, SIDE, 1)
        for size in self.channels:
            # No bias: the normalisation would cancel it.
            x = Conv(size, (3, 3), strides=2)(x)
            x = nn.BatchNorm(not train, momentum=self.statistics_decay)(x)
            x = nn.relu(x)
        x = nn.relu(nn.Dense(self.hidden_size)(x.reshape(len(x), -1)))
        return nn.Dense(self.num_classes)(x)


def make_fashion_cnn(
    channels: Annotated[list[int], AT_LEAST_ONE],
    hidden_size: Annotated[int, AT_LEAST_ONE],
    statistics_decay: Annotated[float, FRACTION],
    data_dir: str | None,
    cache_dir: str | None,
) -> Task:
    """Builds the task from its settings.

    Args:
      channels: of the convolutional layers, each of which halves the image size.
      hidden_size: width of the layer between the last of them and the classes.
      statistics_decay: decay rate of the running statistics of the batches.
      data_dir: a folder to search for the data first; null for none.
      cache_dir: a folder for a memory-mapped copy of the pixels; null keeps them in
        memory.
    """
    train, test = load_images("fashion_mnist", data_dir, cache_dir)
    network = CNN(tuple(channels), hidden_size, NUM_CLASSES, statistics_decay)
    images = jnp.zeros((1, SIDE * SIDE), jnp.uint8)
    shapes = jax.eval_shape(
        lambda: network.init(jax.random.key(0), images, train=False)["batch_stats"]
    )
    # Training mode does nothing with them except write new ones.
    unused = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    in_training = linen_model_fn(network, collections=("batch_stats",), train=True)

    def init_fn(key: jax.Array) -> tuple[PyTree, PyTree]:
        variables = network.init(key, images, train=False)
        return variables["params"], variables["batch_stats"]

    def model_fn(params: PyTree, batch: PyTree) -> Any:
        return in_training(params, {"x": batch["x"], "batch_stats": unused})

    def predict_fn(params: PyTree, model_state: PyTree, batch: PyTree) -> Any:
        variables = {"params": params, "batch_stats": model_state}
        return network.apply(variables, batch["x"], train=False)

    def update_model_state(
        params: PyTree, model_state: PyTree, batch: PyTree
    ) -> PyTree:
        variables = {"params": params, "batch_stats": model_state}
        _, updated = network.apply(
            variables, batch["x"], train=True, mutable=["batch_stats"]
        )
        return updated["batch_stats"]

    return make_classifier(
        "fashion_cnn",
        train,
        test,
        init_fn=init_fn,
        model_fn=model_fn,
        predict_fn=predict_fn,
        update_model_state=update_model_state,
    )
