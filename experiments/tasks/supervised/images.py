"""The images of the tasks: stored as bytes, fed to the networks as numbers in [0, 1].

Bytes take a quarter of the memory, on the host and on the device, and of the transfer
between the two.
"""

import jax
import jax.numpy as jnp

from experiments.tasks.data.fashion_mnist import load_fashion_mnist
from experiments.tasks.data.mnist5k import load_mnist5k
from experiments.tasks.supervised.task import PyTree

__all__ = ["IMAGE_SETS", "load_images", "to_unit_interval"]

IMAGE_SETS = ("fashion_mnist", "mnist5k")


def load_images(
    name: str, data_dir: str | None, cache_dir: str | None = None
) -> tuple[PyTree, PyTree]:
    """Returns the training and the test set: pixels `x`, uint8 `[N, 784]`, labels `y`.

    Raises:
      ConfigError: the data is missing or damaged.
    """
    if name == "mnist5k":
        return load_mnist5k(data_dir)  # small: no need for a file on the disk
    return load_fashion_mnist(data_dir, cache_dir)


def to_unit_interval(pixels: jax.Array) -> jax.Array:
    """Converts bytes to floating-point numbers between 0 and 1."""
    return jnp.asarray(pixels, jnp.float32) / 255.0
