"""The classic deep autoencoder benchmark for curvature methods: 784-1000-...-784.

Logistic units, a linear code, Bernoulli pixels: the outputs are logits, the targets are
the images themselves, and the loss is the cross-entropy in nats per image (Hinton and
Salakhutdinov 2006, Martens 2010). First-order methods get stuck at the mean image for a
long time.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import ngd_jax as ngd
from experiments.running.settings import AT_LEAST_ONE, one_of
from experiments.tasks.supervised.images import (
    IMAGE_SETS,
    load_images,
    to_unit_interval,
)
from experiments.tasks.supervised.initialization import sparse_weights
from experiments.tasks.supervised.task import PyTree, Task

__all__ = ["Autoencoder", "make_autoencoder"]


class Autoencoder(nn.Module):
    """Layers of logistic units on both sides of a linear code.

    Attributes:
      widths: of the encoder's layers, the code last.
      is_sparse: whether the weights start sparse.
    """

    widths: Sequence[int]
    is_sparse: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits `[..., D]` of the reconstructions of `x`, `[..., D]`."""
        code = len(self.widths) - 1
        sizes = (*self.widths, *self.widths[-2::-1], x.shape[-1])
        kernel_init = _sparse if self.is_sparse else nn.initializers.lecun_normal()
        for index, size in enumerate(sizes):
            x = nn.Dense(size, kernel_init=kernel_init)(x)
            if index not in (code, len(sizes) - 1):
                x = jax.nn.sigmoid(x)
        return x


def make_autoencoder(
    data: Annotated[str, one_of(*IMAGE_SETS)],
    widths: Annotated[list[int], AT_LEAST_ONE],
    init: Annotated[str, one_of("dense", "sparse")],
    data_dir: str | None,
    cache_dir: str | None,
) -> Task:
    """Builds the task from its settings.

    Args:
      data: "fashion_mnist" or "mnist5k".
      widths: of the layers of the encoder, the code last; the decoder mirrors them.
      init: "dense", N(0, 1 / inputs), or "sparse", 15 weights N(0, 1) into each unit.
      data_dir: a folder to search for the data first; null for none.
      cache_dir: a folder for a memory-mapped copy of the pixels of fashion_mnist; null
        keeps them in memory.
    """
    parts = load_images(data, data_dir, cache_dir)
    train, test = ({"x": part["x"]} for part in parts)
    network = Autoencoder(tuple(widths), init == "sparse")
    likelihood = ngd.Bernoulli()

    def init_fn(key: jax.Array) -> tuple[PyTree, PyTree]:
        return network.init(key, jnp.zeros((1, train["x"].shape[1])))["params"], {}

    def model_fn(params: PyTree, batch: PyTree) -> jax.Array:
        return network.apply({"params": params}, to_unit_interval(batch["x"]))  # pyright: ignore[reportReturnType]

    def output_loss_fn(outputs: PyTree, batch: PyTree) -> jax.Array:
        return -jnp.mean(likelihood.log_prob(outputs, to_unit_interval(batch["x"])))

    def metrics_fn(outputs: PyTree, batch: PyTree) -> dict[str, jax.Array]:
        difference = jax.nn.sigmoid(outputs) - to_unit_interval(batch["x"])
        return {"squared_error": jnp.mean(jnp.sum(difference**2, axis=-1))}

    return Task(
        name="autoencoder",
        train=train,
        test=test,
        init_fn=init_fn,
        model_fn=model_fn,
        likelihood=likelihood,
        output_loss_fn=output_loss_fn,
        metrics_fn=metrics_fn,
    )


def _sparse(key: jax.Array, shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
    return sparse_weights(key, *shape).astype(dtype or jnp.float32)
