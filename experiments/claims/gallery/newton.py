"""Newton's method and iteratively reweighted least squares, for canonical links.

    ∇² loss = Xᵀ diag(p (1 - p)) X / N + λI = F + λI

with natural parameters as outputs: then the second derivatives of the negative
log-likelihood by the outputs do not depend on the targets, so the Hessian equals its
own expectation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

import ngd_jax as ngd
from experiments.claims.claim import check, seen, theory
from experiments.claims.gallery.identity import (
    Identity,
    compiled,
    descend,
    equal,
    text_of,
    unequal,
)

__all__ = ["Descent", "reweighting"]

_PENALTY = 0.01
_STEPS = 8
# Rates of gradient descent, in units of 1/L, with L a bound on the curvature: the rate
# that is safe everywhere, and one found by trial, which works because the loss is
# flatter along this path; with 30 it no longer converges.
_RATES = (1.0, 25.0)
_GRADIENT_STEPS = 4000
_SMALL = 1e-8
_BEFORE = 3785


class Descent(NamedTuple):
    """The gradient norms before each step.

    Attributes:
      natural: by natural gradient.
      plain: by gradient descent with the rate 1/L.
      tuned: with the rate 25/L, found by trial.
    """

    natural: np.ndarray
    plain: np.ndarray
    tuned: np.ndarray


def penalised_loss(weights, batch):
    """Mean negative log-likelihood plus an L2 penalty on the weights."""
    outputs = batch["x"] @ weights
    nats = -ngd.Bernoulli(event_ndims=0).log_prob(outputs, batch["y"]).mean()
    return nats + _PENALTY * jnp.vdot(weights, weights) / 2


def natural_newton(start, batch):
    """The penalty's curvature λI acts as the damping: F + λI is the Hessian."""

    def model_fn(weights, batch):  # log-odds, the canonical link
        return batch["x"] @ weights

    tx = ngd.natural_gradient(
        1.0,
        model_fn,
        ngd.Bernoulli(event_ndims=0),
        damping=_PENALTY,
        solver=ngd.Cholesky(),
    )
    return descend(tx, penalised_loss, start, batch, _STEPS)[0]


def reweighted_least_squares(start, x, y):
    """Weights p (1 - p), working targets Xw + (y - p) / (p (1 - p))."""
    w, path = start, []
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-x @ w))
        weights = p * (1 - p)
        targets = x @ w + (y - p) / weights
        gram = (x.T * weights) @ x / len(x) + _PENALTY * np.eye(len(w))
        w = np.linalg.solve(gram, (x.T * weights) @ targets / len(x))
        path.append(w)
    return np.array(path)


def reweighting() -> tuple[Identity, Descent]:
    """On the breast-cancer data: every iterate, with gradient descent to compare.

    Condition: A generalised linear model with its canonical link; the L2 penalty acts
    as the damping. With another link, it is Fisher scoring, not Newton's method.

    Source: Nelder and Wedderburn 1972; McCullagh and Nelder 1989, section 2.5

    Measured on: logistic regression on the breast-cancer data of scikit-learn,
    {patients} patients, 30 standardised columns and one 1, L2 penalty {_PENALTY:g}
    """
    columns, y = sklearn.datasets.load_breast_cancer(return_X_y=True)
    x = (columns - columns.mean(axis=0)) / columns.std(axis=0)
    x = np.c_[x, np.ones(len(x))]
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y, float)}
    start = jnp.zeros(x.shape[1])
    found = np.asarray(compiled(natural_newton)(start, batch))
    truth = reweighted_least_squares(np.zeros(x.shape[1]), x, y)

    norms = _descents(found, x, np.asarray(y), start, batch)
    below = int(np.argmax(norms.plain < _SMALL))
    tuned_below = int(np.argmax(norms.tuned < _SMALL))
    hessian, fisher = compiled(_with_another_link)(0.1 * found[0], batch)
    largest = np.linalg.eigvalsh(x.T @ x / len(x))[-1] / 4 + _PENALTY
    name = "Newton, its iterates"
    before = "measured before, independently"
    return Identity(
        algorithm="Newton, IRLS",
        ours=natural_newton,
        textbook=reweighted_least_squares,
        equality=equal(
            name,
            found,
            truth,
            num_rounded=_STEPS * len(start),
            condition=float(largest / _PENALTY),
        ),
        limit=unequal(
            "complementary log-log link, F and Hessian: difference",
            fisher,
            hessian,
            "not canonical: the Hessian depends on the targets, F does not",
        ),
        others=[
            check(
                f"natural gradient: norm of the gradient after {_STEPS} steps",
                norms.natural[_STEPS],
                seen(None, 1e-12, f"{before}: 1e-13; Newton's method is quadratic"),
            ),
            check(
                f"gradient descent, rate 1/L: steps to a norm of {_SMALL:g}",
                below,
                seen(0.99 * _BEFORE, 1.01 * _BEFORE, f"{before}: {_BEFORE:,}"),
            ),
            check(
                f"gradient descent, rate {_RATES[1]:g}/L, found by trial: the same",
                tuned_below,
                theory(
                    _STEPS + 1,
                    below,
                    "first order: linear where Newton's method is quadratic",
                ),
            ),
        ],
        text=text_of(reweighting, patients=len(x)),
    ), norms


def _descents(
    found: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    start: jax.Array,
    batch: dict[str, jax.Array],
) -> Descent:
    largest = np.linalg.eigvalsh(x.T @ x / len(x))[-1] / 4 + _PENALTY

    def plain(rate: jax.Array) -> jax.Array:
        tx = optax.sgd(rate)
        return descend(tx, penalised_loss, start, batch, _GRADIENT_STEPS)[0]

    def norms_on(path: np.ndarray) -> np.ndarray:
        path = np.r_[np.zeros((1, len(start))), path]
        residuals = 1 / (1 + np.exp(-path @ x.T)) - y
        return np.linalg.norm(residuals @ x / len(x) + _PENALTY * path, axis=1)

    safe, tuned = np.asarray(jax.jit(jax.vmap(plain))(jnp.array(_RATES) / largest))
    return Descent(norms_on(found), norms_on(safe), norms_on(tuned))


def _with_another_link(
    weights: jax.Array, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Hessian of the mean negative log-likelihood, and F, with p = 1 - exp(-eᶻ)."""
    likelihood = ngd.Bernoulli(event_ndims=0)

    def model_fn(weights: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        return jnp.log(jnp.expm1(jnp.exp(batch["x"] @ weights)))

    def nats(weights: jax.Array) -> jax.Array:
        return -likelihood.log_prob(model_fn(weights, batch), batch["y"]).mean()

    fisher = ngd.dense_fisher(model_fn, weights, batch, likelihood)
    return jax.hessian(nats)(weights), fisher
