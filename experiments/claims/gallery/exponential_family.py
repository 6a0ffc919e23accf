"""Mirror descent and variational inference: natural and mean parameters.

    natural parameters η, log-partition A, means μ = ∇A(η), Fisher F = ∇²A = ∂μ/∂η:
    F⁻¹ ∂L/∂η = ∂L/∂μ

so the natural gradient in η is the plain gradient in μ, without any matrix.
"""

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets

import ngd_jax as ngd
from experiments.claims.gallery.identity import (
    Identity,
    compiled,
    descend,
    equal,
    text_of,
    unequal,
)
from ngd_jax.types import ArrayLike, PyTree

__all__ = ["mirror", "variational"]

_MIRROR_RATE, _MIRROR_STEPS = 0.5, 20
_NOISE, _PRECISION = 0.7, 1.0


def natural_mirror(start, batch, log_rates_fn=lambda params: params):
    """Poisson rates observed through a blur: the model is the family itself."""

    def model_fn(params, _batch):
        return log_rates_fn(params)[None]  # one example

    def loss_fn(params, batch):
        rates = jnp.exp(log_rates_fn(params))
        return jnp.sum((batch["blur"] @ rates - batch["seen"]) ** 2) / 2

    tx = ngd.natural_gradient(
        _MIRROR_RATE, model_fn, ngd.Poisson(), damping=0.0, solver=ngd.Cholesky()
    )
    return descend(tx, loss_fn, start, batch, _MIRROR_STEPS)[0]


def exponentiated_gradient(rates, blur, seen):
    """Mirror descent with the entropy as mirror map: μ ← μ exp(-η ∂L/∂μ)."""
    path = []
    for _ in range(_MIRROR_STEPS):
        rates = rates * np.exp(-_MIRROR_RATE * blur.T @ (blur @ rates - seen))
        path.append(rates)
    return np.array(path)


def mirror(quick: bool) -> Identity:
    """On rates observed through a blur: every iterate, and in other coordinates.

    Condition: The parameters are the natural ones of an exponential family, without
    damping; then it holds for any rate. In other coordinates the two agree only in the
    limit of small steps.

    Source: Raskutti and Mukherjee 2015, theorem 1

    Measured on: {num_rates} Poisson rates seen through a blur, {_MIRROR_STEPS} steps
    """
    num_rates = 6 if quick else 30
    random = np.random.default_rng(0)
    distance = np.abs(np.subtract.outer(np.arange(num_rates), np.arange(num_rates)))
    blur = np.exp(-distance.astype(float))
    blur /= blur.sum(axis=1, keepdims=True)
    rates, start = random.uniform(0.5, 2, num_rates), random.uniform(0.5, 2, num_rates)
    seen = blur @ rates
    batch = {"blur": jnp.asarray(blur), "seen": jnp.asarray(seen)}
    truth = exponentiated_gradient(start, blur, seen)

    def run(start: ArrayLike, in_means: ArrayLike) -> jax.Array:
        def log_rates_fn(params: jax.Array) -> jax.Array:
            rates = jnp.where(in_means, params, 1.0)  # no log of log-rates
            return jnp.where(in_means, jnp.log(rates), params)

        return natural_mirror(start, batch, log_rates_fn)

    run = compiled(run)
    found, by_means = run(np.log(start), False), run(start, True)
    spread = max(truth.max(), start.max()) / min(truth.min(), start.min())
    name = "mirror descent, its iterates"
    return Identity(
        algorithm="mirror descent",
        ours=natural_mirror,
        textbook=exponentiated_gradient,
        equality=equal(
            name,
            np.exp(found),
            truth,
            num_rounded=num_rates * _MIRROR_STEPS,
            condition=float(spread),
        ),
        limit=unequal(
            "mirror descent, the means as parameters: difference of a step",
            by_means[0],
            truth[0],
            "first order only: 1 - x instead of exp(-x)",
        ),
        text=text_of(mirror, num_rates=num_rates),
    )


def log_partition(natural):
    """A = ½ hᵀP⁻¹h - ½ log |P| of a Gaussian, η = (h, -½P), h = Pm."""
    precision = -2 * natural["quadratic"]
    mean = jnp.linalg.solve(precision, natural["linear"])
    return (natural["linear"] @ mean - jnp.linalg.slogdet(precision)[1]) / 2


def kl_fn(natural, other):
    """A(η') - A(η) - ⟨∇A(η), η' - η⟩, the KL of any exponential family."""
    gap = jax.tree.map(jnp.subtract, other, natural)
    value, slope = jax.jvp(log_partition, (natural,), (gap,))
    return log_partition(other) - value - slope


def symmetric(params):
    """Keeps only the symmetric part of the quadratic parameters."""
    quadratic = params["quadratic"]
    return {"linear": params["linear"], "quadratic": (quadratic + quadratic.T) / 2}


def natural_inference(start, batch, natural_fn=symmetric):
    """One step of rate 1 on minus the evidence bound of a linear regression."""

    def loss_fn(params, batch):  # nats: minus expected log joint, minus entropy
        natural = natural_fn(params)
        covariance = jnp.linalg.inv(-2 * natural["quadratic"])
        mean = covariance @ natural["linear"]
        residuals = batch["y"] - batch["x"] @ mean
        spread = jnp.trace(batch["x"] @ covariance @ batch["x"].T)
        fit = (residuals @ residuals + spread) / _NOISE**2
        prior = _PRECISION * (mean @ mean + jnp.trace(covariance))
        return (fit + prior - jnp.linalg.slogdet(covariance)[1]) / 2

    def model_fn(params, _batch):  # one example: the Gaussian itself
        return jax.tree.map(lambda leaf: leaf[None], natural_fn(params))

    tx = ngd.natural_gradient(
        1.0,
        model_fn,
        ngd.FromKL(jax.vmap(kl_fn)),
        damping=0.0,
        solver=ngd.CG(max_steps=50, rtol=1e-13),  # from zero, stays in F's range
    )
    moved = descend(tx, loss_fn, start, batch)[0]
    return natural_fn(jax.tree.map(lambda leaf: leaf[-1], moved))


def exact_posterior(x, y):
    """P = XᵀX/σ² + αI and h = Xᵀy/σ², with mean P⁻¹h and covariance P⁻¹."""
    precision = x.T @ x / _NOISE**2 + _PRECISION * np.eye(x.shape[1])
    return {"linear": x.T @ y / _NOISE**2, "quadratic": -precision / 2}


def variational(quick: bool) -> Identity:
    """On the diabetes data: the whole posterior, and other coordinates.

    Condition: A conjugate model, with the natural parameters of the posterior's family
    as parameters, rate 1 and no damping; then it holds from any start. Without
    conjugacy, or in other coordinates, more than one step is needed.

    Source: Hoffman et al. 2013; Khan and Rue 2023, The Bayesian learning rule

    Measured on: Bayesian linear regression on the diabetes data, {patients} patients,
    {columns} columns, a Gaussian with full covariance, started at covariance 1 and a
    random mean
    """
    columns, y = map(np.asarray, sklearn.datasets.load_diabetes(return_X_y=True))
    chosen = columns[:, [2, 3, 8]] if quick else columns
    x = chosen / chosen.std(axis=0)
    y = (y - y.mean()) / y.std()
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    mean = np.random.default_rng(0).normal(size=x.shape[1])
    start = {"linear": jnp.asarray(mean), "quadratic": -0.5 * jnp.eye(len(mean))}
    truth = exact_posterior(x, y)

    def run(in_means: ArrayLike) -> PyTree:
        def natural_fn(params: PyTree) -> PyTree:
            natural = symmetric(params)
            linear = -2 * natural["quadratic"] @ natural["linear"]
            linear = jnp.where(in_means, linear, natural["linear"])
            return {**natural, "linear": linear}

        return natural_inference(start, batch, natural_fn)

    # With precision 1, the starting point is the same in both coordinates.
    run = compiled(run)
    found, elsewhere = run(False), run(True)
    # A step along the same tangent: δm = Σ (δh - δP m) = P' (m' - m), for Σ = 1.
    overshot = mean + -2 * truth["quadratic"] @ (_mean_of(truth) - mean)
    fisher = _fisher_of_unit_gaussian(mean)
    name = "variational inference"
    size = {"num_rounded": fisher.shape[0], "condition": float(np.linalg.cond(fisher))}
    return Identity(
        algorithm="variational inference",
        ours=natural_inference,
        textbook=exact_posterior,
        equality=equal(f"{name}, the posterior", found, truth, **size),
        limit=unequal(
            "variational inference in mean and precision, the mean: difference",
            _mean_of(elsewhere),
            _mean_of(truth),
            "other coordinates: exact in the precision, not in the mean",
        ),
        others=[
            equal(
                "variational inference in mean and precision, and theory",
                (_mean_of(elsewhere), elsewhere["quadratic"]),
                (overshot, truth["quadratic"]),
                **size,
            )
        ],
        text=text_of(variational, patients=len(x), columns=x.shape[1]),
    )


def _mean_of(natural: dict[str, np.ndarray]) -> np.ndarray:
    precision = -2 * np.asarray(natural["quadratic"])
    return np.linalg.solve(precision, np.asarray(natural["linear"]))


def _fisher_of_unit_gaussian(mean: np.ndarray) -> np.ndarray:
    """The covariance of w and of the pairs wᵢwⱼ, i ≤ j, for w from N(mean, 1)."""
    size = len(mean)
    # w = m + z: wᵢwⱼ = mᵢmⱼ + mᵢzⱼ + mⱼzᵢ + zᵢzⱼ, and z, zᵢzⱼ are uncorrelated.
    rows = [np.eye(size)]
    rows += [
        (mean[i] * np.eye(size)[j] + mean[j] * np.eye(size)[i])[None]
        for i in range(size)
        for j in range(i, size)
    ]
    linear = np.concatenate(rows)
    pairs = [1.0 + (i == j) for i in range(size) for j in range(i, size)]
    return linear @ linear.T + np.diag([0.0] * size + pairs)
