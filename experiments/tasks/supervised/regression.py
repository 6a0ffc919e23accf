"""Predicts the strength of concrete from its ingredients, with error bars.

    y ~ N(μ(x), σ(x)²)        the network outputs μ and log σ

Inputs and strengths are standardized by the training set, so the loss is in nats per
sample of standardized strength; the metric is in MPa. On request, a part of the
training set gets wrong labels; the test set never does.
"""

import math
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.model_selection import train_test_split

import ngd_jax as ngd
from experiments.running.settings import AT_LEAST_ONE, FRACTION, NON_NEGATIVE, POSITIVE
from experiments.tasks.data.concrete import load_concrete
from experiments.tasks.supervised.classification import MLP
from experiments.tasks.supervised.task import PyTree, Task

__all__ = ["add_outliers", "make_regression"]

TEST_SHARE = 0.2


def add_outliers(labels: np.ndarray, share: float, size: float) -> np.ndarray:
    """Returns `labels`, a share of them moved up or down by `size` deviations.

    Which ones are moved is part of the task and does not depend on the seed of a run.
    """
    random = np.random.default_rng(0)
    chosen = random.permutation(len(labels))[: round(share * len(labels))]
    moved = labels.copy()
    moved[chosen] += size * labels.std() * random.choice([-1.0, 1.0], len(chosen))
    return moved


def make_regression(
    hidden_sizes: Annotated[list[int], AT_LEAST_ONE],
    min_scale: Annotated[float, POSITIVE],
    outliers: bool,
    outlier_share: Annotated[float, FRACTION],
    outlier_size: Annotated[float, NON_NEGATIVE],
    data_dir: str | None,
) -> Task:
    """Builds the task from its settings.

    Args:
      hidden_sizes: widths of the hidden layers.
      min_scale: lower bound of σ, in standard deviations of the labels. Without it the
        likelihood has no maximum, and the error bars of memorised samples shrink to
        zero.
      outliers: whether a part of the training labels is wrong.
      outlier_share: the share of wrong labels.
      outlier_size: how far they are moved, up or down, in standard deviations of the
        labels.
      data_dir: a folder to search for the data first; null for none.
    """
    x, y = load_concrete(data_dir)
    split = train_test_split(x, y, test_size=TEST_SHARE, random_state=0)
    x_train, x_test, y_train, y_test = (np.asarray(part) for part in split)
    # By the clean labels, so that losses with and without outliers are comparable.
    scale = float(y_train.std())

    def prepare(x: np.ndarray, y: np.ndarray) -> PyTree:
        x = (x - x_train.mean(0)) / x_train.std(0)
        y = (y - y_train.mean()) / scale
        return {"x": x.astype(np.float32), "y": y.astype(np.float32)}

    labels = y_train
    if outliers:
        labels = add_outliers(y_train, outlier_share, outlier_size)
    train, test = prepare(x_train, labels), prepare(x_test, y_test)
    mlp: nn.Module = MLP((*hidden_sizes, 2))
    likelihood = ngd.DiagonalGaussian(event_ndims=0)
    floor = math.log(min_scale)

    def init_fn(key: jax.Array) -> tuple[PyTree, PyTree]:
        return mlp.init(key, jnp.zeros((1, train["x"].shape[1])))["params"], {}

    def model_fn(params: PyTree, batch: PyTree) -> PyTree:
        outputs: jax.Array = mlp.apply({"params": params}, batch["x"])  # pyright: ignore[reportAssignmentType]
        mean, excess = outputs[..., 0], outputs[..., 1]
        # Smooth, and close to the identity for σ well above the floor.
        log_scale = floor + jax.nn.softplus(excess - floor)
        return {"mean": mean, "log_scale": log_scale}

    def output_loss_fn(outputs: PyTree, batch: PyTree) -> jax.Array:
        return -jnp.mean(likelihood.log_prob(outputs, batch["y"]))

    def metrics_fn(outputs: PyTree, batch: PyTree) -> dict[str, jax.Array]:
        error = jnp.mean(jnp.abs(outputs["mean"] - batch["y"]))
        return {"absolute_error_mpa": scale * error}

    return Task(
        name="regression",
        train=train,
        test=test,
        init_fn=init_fn,
        model_fn=model_fn,
        likelihood=likelihood,
        output_loss_fn=output_loss_fn,
        metrics_fn=metrics_fn,
    )
