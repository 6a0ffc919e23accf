"""Adam: the diagonal of the empirical Fisher, to the power ½.

v ← β v + (1 - β) g²,   θ ← θ - η m / (√v + ε):   for batches of a single example,
g gᵀ is the empirical Fisher, g² its diagonal, and v the running mean of that
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

import ngd_jax as ngd
from experiments.claims.gallery.identity import (
    Identity,
    compiled,
    equal,
    text_of,
    unequal,
)
from experiments.claims.steps import train
from ngd_jax import dense
from ngd_jax.coordinates import unravel_real

__all__ = ["adam"]

_RATE = 1e-2
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class RootOfDiagonal(ngd.Solver):
    """d = g / (√(running mean of diag F) + λ): a user-defined solver."""

    decay: float = 0.999

    def init(self, params):
        return optax.tree.zeros_like(params), jnp.zeros((), jnp.int32)

    def solve(self, fisher, rhs, *, damping, state=()):
        mean, count = state
        diagonal = unravel_real(dense.diagonal(fisher), rhs.gradient)
        mean = optax.tree.update_moment(diagonal, mean, self.decay, order=1)
        debiased = optax.tree.bias_correction(mean, self.decay, count + 1)
        d = jax.tree.map(
            lambda g, v: g / (jnp.sqrt(v) + damping), rhs.gradient, debiased
        )
        unchecked = jnp.int32(ngd.SolverStatus.UNCHECKED)
        info = ngd.SolverInfo(jnp.zeros((), jnp.int32), jnp.array(jnp.inf), unchecked)
        return ngd.Solution(d, None, info, (mean, count + 1))


def model_fn(weights, batch):
    """Logistic regression: log-odds."""
    return batch["x"] @ weights


def natural_adam(weights, batches):
    """Averages the gradient first; the metric is the root of the diagonal."""
    tx = optax.chain(
        optax.ema(0.9),
        ngd.natural_gradient(
            _RATE,
            model_fn,
            ngd.Bernoulli(event_ndims=0),
            damping=1e-8,
            solver=RootOfDiagonal(decay=0.999),
            metric=ngd.Metric(kind="empirical", targets_fn=lambda batch: batch["y"]),
        ),
    )
    return train(tx, loss_fn, weights, batches, lambda _, moved, *__: moved)[1]


def optax_adam(weights, batches):
    """Adam as in Optax."""
    tx = optax.adam(_RATE, b1=0.9, b2=0.999, eps=1e-8)
    return train(tx, loss_fn, weights, batches, lambda _, moved, *__: moved)[1]


def loss_fn(weights, batch):
    """Mean negative log-likelihood."""
    likelihood = ngd.Bernoulli(event_ndims=0)
    return -likelihood.log_prob(model_fn(weights, batch), batch["y"]).mean()


def adam(quick: bool) -> Identity:
    """On the breast-cancer data, one patient at a time: compares every iterate.

    Condition: Batches of one example. The metric is the diagonal of the empirical
    Fisher, not of the Fisher, and to the power ½ instead of 1. On larger batches it is
    not even that: if the mean gradient of a batch of B examples is near zero, g² is
    about 1/B of the diagonal.

    Source: Kingma and Ba 2015, algorithm 1; Martens 2020, section 11; Kunstner et al.
    2019, section 2

    Measured on: logistic regression on {num_steps} patients of the breast-cancer data
    """
    num_steps = 100 if quick else 500
    columns, y = sklearn.datasets.load_breast_cancer(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(y))[:num_steps]
    x = ((columns - columns.mean(axis=0)) / columns.std(axis=0))[chosen]
    x, y = jnp.asarray(x), jnp.asarray(y[chosen], float)
    singles = {"x": x[:, None], "y": y[:, None]}
    start = jnp.zeros(x.shape[1])
    found = compiled(natural_adam)(start, singles)
    truth = compiled(optax_adam)(start, singles)

    batch = {"x": x[:_BATCH], "y": y[:_BATCH]}

    def diagonals(weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        arguments = (model_fn, weights, batch, ngd.Bernoulli(event_ndims=0))
        gradient = jax.grad(loss_fn)(weights, batch)
        empirical = ngd.fisher_diagonal(
            *arguments, kind="empirical", targets=batch["y"]
        )
        return gradient**2, empirical, ngd.fisher_diagonal(*arguments)

    squared, empirical, exact = compiled(diagonals)(truth[-1])
    name = "Adam, its iterates"
    return Identity(
        algorithm="Adam, RMSProp",
        ours=natural_adam,
        textbook=optax_adam,
        equality=equal(name, found, truth, num_rounded=num_steps * len(start)),
        limit=unequal(
            f"Adam, batches of {_BATCH}, g² and empirical diagonal: difference",
            squared,
            empirical,
            "the square of a mean is not the mean of squares",
        ),
        others=[
            unequal(
                "Adam, empirical and exact diagonal at its end: difference",
                empirical,
                exact,
                "residuals enter the empirical one (Kunstner et al. 2019)",
            )
        ],
        text=text_of(adam, num_steps=num_steps),
    )
