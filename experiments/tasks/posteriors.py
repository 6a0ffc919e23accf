"""A Gaussian posterior by natural gradient, in its natural parameters.

    q = N(m, Λ⁻¹),    L = KL(q ‖ prior) - Σ E_q log p(yₙ | xₙᵀ w),    η = (Λ m, Λ)

The parameters are the natural parameters of q, and q itself is the model's output, with
a single example: its KL is in closed form, and `FromKL` derives the Fisher from it. On
a conjugate model one step with rate 1 gives the exact posterior. On logistic regression
(the breast cancer data of scikit-learn) a step with rate ρ moves Λ the fraction ρ of
the way to the precision of the prior plus Σ E_q[σ'] x xᵀ, so it stays positive
definite.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

import ngd_jax as ngd

__all__ = [
    "Gaussian",
    "fit",
    "free_energy",
    "linear_data",
    "log_likelihood_linear",
    "log_likelihood_logistic",
    "logistic_data",
    "start",
]

PyTree = Any
Data = tuple[jax.Array, jax.Array]
_NODES, _WEIGHTS = np.polynomial.hermite.hermgauss(32)


class Gaussian(NamedTuple):
    """q in natural parameters.

    Attributes:
      linear: Λ m, `[..., d]`.
      lower: the lower triangle of Λ, row by row, `[..., d (d + 1) / 2]`.
    """

    linear: jax.Array
    lower: jax.Array

    @property
    def precision(self) -> jax.Array:
        """Λ, `[..., d, d]`."""
        size = self.linear.shape[-1]
        rows, columns = np.tril_indices(size)
        shape = (*self.linear.shape, size)
        half = jnp.zeros(shape, self.lower.dtype).at[..., rows, columns].set(self.lower)
        above = jnp.swapaxes(half, -1, -2)
        return half + above - half * jnp.eye(size, dtype=half.dtype)

    @property
    def mean(self) -> jax.Array:
        """m, `[..., d]`."""
        return jnp.linalg.solve(self.precision, self.linear[..., None])[..., 0]


def kl(p: Gaussian, q: Gaussian) -> jax.Array:
    """KL(p ‖ q) in nats."""
    size = p.linear.shape[-1]
    ratio = jnp.linalg.solve(p.precision, q.precision)
    apart = p.mean - q.mean
    distance = jnp.einsum("...i,...ij,...j", apart, q.precision, apart)
    log_det = jnp.linalg.slogdet(ratio)[1]
    return (jnp.trace(ratio, axis1=-2, axis2=-1) - size - log_det + distance) / 2


def start(size: int, precision: float = 1.0) -> Gaussian:
    """N(0, I / precision): the prior and the starting point."""
    rows, columns = np.tril_indices(size)
    lower = jnp.where(jnp.asarray(rows == columns), float(precision), 0.0)
    return Gaussian(jnp.zeros(size), lower)


def log_likelihood_linear(
    mean: jax.Array, variance: jax.Array, y: jax.Array
) -> jax.Array:
    """E log N(y; z, 1) for z ~ N(mean, variance)."""
    return -((y - mean) ** 2 + variance + math.log(2 * math.pi)) / 2


def log_likelihood_logistic(
    mean: jax.Array, variance: jax.Array, y: jax.Array
) -> jax.Array:
    """E log σ(y z) for z ~ N(mean, variance), y = ±1, by Gauss-Hermite quadrature."""
    z = mean + jnp.sqrt(2 * variance) * jnp.asarray(_NODES)[:, None]
    weights = jnp.asarray(_WEIGHTS / math.sqrt(math.pi))
    return weights @ jax.nn.log_sigmoid(y * z)


def free_energy(
    log_likelihood: Any, q: Gaussian, prior: Gaussian, data: Data
) -> jax.Array:
    """L(η), the negative evidence bound in nats."""
    x, y = data
    covariance = jnp.linalg.inv(q.precision)
    variance = jnp.einsum("ni,ij,nj->n", x, covariance, x)
    return kl(q, prior) - jnp.sum(log_likelihood(x @ q.mean, variance, y))


def fit(
    log_likelihood: Any, data: Data, *, rate: float, num_steps: int
) -> tuple[Gaussian, jax.Array]:
    """Takes natural gradient steps from the prior N(0, I).

    Returns:
      q, and L before each step and at the end, `[num_steps + 1]`.
    """
    prior = start(data[0].shape[1])
    tx = ngd.natural_gradient(
        rate,
        lambda q, _data: jax.tree.map(lambda leaf: leaf[None], q),  # one example
        ngd.FromKL(kl),
        damping=0.0,
        solver=ngd.Cholesky(),
    )

    def loss_fn(q: Gaussian) -> jax.Array:
        return free_energy(log_likelihood, q, prior, data)

    def step(carry: tuple[Gaussian, PyTree], _: None) -> tuple[Any, jax.Array]:
        q, state = carry
        value, grads = jax.value_and_grad(loss_fn)(q)
        updates, state = tx.update(grads, state, q, batch=data)
        return (optax.apply_updates(q, updates), state), value

    @jax.jit
    def run() -> tuple[Gaussian, jax.Array]:
        (q, _), values = jax.lax.scan(step, (prior, tx.init(prior)), length=num_steps)
        return q, jnp.append(values, loss_fn(q))

    return run()


def logistic_data(num_features: int = 30) -> tuple[Data, Data]:
    """Training and test parts of the breast cancer data, standardised, plus a one."""
    bunch: Any = sklearn.datasets.load_breast_cancer()
    x = bunch.data[:, :num_features]
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    y = 2.0 * bunch.target - 1
    order = np.random.default_rng(0).permutation(len(y))
    train, test = order[: 3 * len(y) // 4], order[3 * len(y) // 4 :]
    return (
        (jnp.asarray(x[train]), jnp.asarray(y[train])),
        (jnp.asarray(x[test]), jnp.asarray(y[test])),
    )


def linear_data(seed: int = 0, size: int = 6, num_examples: int = 40) -> Data:
    """A random linear model with noise of standard deviation one."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(num_examples, size))
    y = x @ random.normal(size=size) + random.normal(size=num_examples)
    return jnp.asarray(x), jnp.asarray(y)
