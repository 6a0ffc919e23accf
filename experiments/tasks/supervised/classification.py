"""What all classifiers share: loss, accuracy, likelihood, and an MLP.

The loss is the mean cross-entropy, which is minus the log-likelihood of the
categorical distribution whose logits are the network's outputs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import ngd_jax as ngd
from experiments.tasks.supervised.task import PyTree, Task

__all__ = ["MLP", "make_classifier", "make_mlp_classifier"]


class MLP(nn.Module):
    """A fully connected network with tanh between its layers.

    Attributes:
      sizes: widths of the layers, the outputs last.
      first_scale: multiplies the initial weights of the first layer; 1 suits inputs of
        size one.
    """

    sizes: Sequence[int]
    first_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the outputs `[..., sizes[-1]]` for inputs `[..., D]`."""
        for index, size in enumerate(self.sizes[:-1]):
            scale = self.first_scale if index == 0 else 1.0
            x = jnp.tanh(nn.Dense(size, kernel_init=_lecun_normal(scale))(x))
        return nn.Dense(self.sizes[-1])(x)


def make_classifier(
    name: str,
    train: PyTree,
    test: PyTree,
    *,
    init_fn: Callable[[jax.Array], tuple[PyTree, PyTree]],
    model_fn: Callable[[PyTree, PyTree], jax.Array],
    **options: Any,
) -> Task:
    """Builds the task of predicting the labels `y` from the logits of `model_fn`.

    Args:
      name: of the task.
      train: the training set, with the labels under "y".
      test: the test set, likewise.
      init_fn: as in `Task`.
      model_fn: as in `Task`.
      **options: other attributes of `Task`.
    """

    def output_loss_fn(outputs: PyTree, batch: PyTree) -> jax.Array:
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"])
        )

    def metrics_fn(outputs: PyTree, batch: PyTree) -> dict[str, jax.Array]:
        return {"accuracy": jnp.mean(jnp.argmax(outputs, axis=-1) == batch["y"])}

    return Task(
        name=name,
        train=train,
        test=test,
        init_fn=init_fn,
        model_fn=model_fn,
        likelihood=ngd.Categorical(),
        output_loss_fn=output_loss_fn,
        metrics_fn=metrics_fn,
        **options,
    )


def make_mlp_classifier(
    name: str,
    train: PyTree,
    test: PyTree,
    *,
    sizes: Sequence[int],
    inputs_fn: Callable[[jax.Array], jax.Array] = lambda x: x,
    first_scale: float = 1.0,
) -> Task:
    """Builds the task of predicting the labels `y` from `inputs_fn(x)` by an MLP.

    Args:
      name: of the task.
      train: the training set: inputs `x`, labels `y`.
      test: the test set, likewise.
      sizes: widths of the layers, the number of classes last.
      inputs_fn: maps `x` as it is stored to the inputs of the network.
      first_scale: as in `MLP`.
    """
    mlp = MLP(tuple(sizes), first_scale)
    num_inputs = train["x"].shape[1]

    def init_fn(key: jax.Array) -> tuple[PyTree, PyTree]:
        return mlp.init(key, jnp.zeros((1, num_inputs)))["params"], {}

    def model_fn(params: PyTree, batch: PyTree) -> jax.Array:
        return mlp.apply({"params": params}, inputs_fn(batch["x"]))  # pyright: ignore[reportReturnType]

    return make_classifier(name, train, test, init_fn=init_fn, model_fn=model_fn)


def _lecun_normal(scale: float) -> Callable[..., Any]:
    # `variance_scaling` takes a variance, so the scale enters squared.
    return nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")
