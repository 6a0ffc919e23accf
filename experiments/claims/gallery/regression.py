"""Least squares in one step, and Levenberg-Marquardt: Gauss-Newton in disguise.

    F = JᵀJ / N,    g = Jᵀr / N:    (F + λI)⁻¹ g = (JᵀJ + NλI)⁻¹ Jᵀr

for Gaussian outputs of unit variance, with residuals r = f - y.
"""

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

__all__ = ["gauss_newton", "least_squares"]

_DAMPING = 1e-3
_LM_STEPS = 15
_LM_START = np.array([1.0, 1.0, 0.0])


def one_step_of_regression(start, batch, damping=0.0):
    """From any point to the minimum, since the quadratic model is the loss itself."""

    def model_fn(weights, batch):
        return batch["x"] @ weights

    def loss_fn(weights, batch):
        return jnp.mean((model_fn(weights, batch) - batch["y"]) ** 2) / 2

    tx = ngd.natural_gradient(
        1.0,
        model_fn,
        ngd.Gaussian(event_ndims=0),
        damping=damping,
        solver=ngd.Cholesky(),
    )
    return descend(tx, loss_fn, start, batch)[0][-1]


def ordinary_least_squares(x, y):
    """By the singular value decomposition."""
    return np.linalg.lstsq(x, y, rcond=None)[0]


def least_squares() -> Identity:
    """On the diabetes data, with columns in units of their spread.

    Condition: A linear model, half the mean square as the loss, no damping. With the
    mean square itself, the step would be twice as long; with damping λ it is ridge
    regression, with Nλ, towards the starting point.

    Source: Martens 2020, section 9

    Measured on: diabetes data of scikit-learn, {examples} patients, 10 columns and one
    1
    """
    columns, targets = map(np.asarray, sklearn.datasets.load_diabetes(return_X_y=True))
    x = np.c_[columns / columns.std(axis=0), np.ones(len(columns))]
    start = np.random.default_rng(0).normal(size=x.shape[1], scale=100.0)
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(targets)}
    run = compiled(one_step_of_regression)
    found, damped = (run(start, batch, damping) for damping in (0.0, _DAMPING))

    # From w₀, damping gives ridge regression towards w₀, with Nλ.
    truth = ordinary_least_squares(x, targets)
    penalty = np.sqrt(len(x) * _DAMPING) * np.eye(len(start))
    ridge = ordinary_least_squares(np.r_[x, penalty], np.r_[targets, penalty @ start])
    name, condition = "least squares, one step", np.linalg.cond(x) ** 2
    size = {"num_rounded": len(start), "condition": float(condition)}
    return Identity(
        algorithm="least squares",
        ours=one_step_of_regression,
        textbook=ordinary_least_squares,
        equality=equal(name, found, truth, **size),
        limit=unequal(
            f"least squares, damped by {_DAMPING:g}: difference",
            damped,
            truth,
            "ridge regression towards the start, not least squares",
        ),
        others=[equal("ridge regression, the damped step", damped, ridge, **size)],
        text=text_of(least_squares, examples=len(x)),
    )


def natural_levenberg_marquardt(start, batch):
    """Damped natural gradient with Gaussian outputs: fits a curve to points."""

    def model_fn(params, batch):
        a, b, c = params
        return a * jnp.exp(-b * batch["time"]) + c

    def loss_fn(params, batch):
        return jnp.mean((model_fn(params, batch) - batch["y"]) ** 2) / 2

    tx = ngd.natural_gradient(
        1.0,
        model_fn,
        ngd.Gaussian(event_ndims=0),
        damping=ngd.LevenbergMarquardt(initial=1.0),
        solver=ngd.Cholesky(),
    )
    params, state = descend(tx, loss_fn, start, batch, _LM_STEPS)
    return params, state.info.damping


def residuals_and_jacobian(params, time, y):
    """For a e⁻ᵇᵗ + c fitted to y, with derivatives by a, b and c."""
    a, b, c = params
    decay = np.exp(-b * time)
    J = np.stack([decay, -a * time * decay, np.ones_like(time)], axis=1)
    return a * decay + c - y, J


def levenberg_marquardt(start, time, y):
    """(JᵀJ + λ'I) δ = -Jᵀr with λ' = Nλ; λ by actual over predicted reduction."""
    params, damping, path, dampings = start, 1.0, [], []
    for _ in range(_LM_STEPS):
        r, J = residuals_and_jacobian(params, time, y)
        dampings.append(damping)
        step = -np.linalg.solve(J.T @ J + len(y) * damping * np.eye(3), J.T @ r)
        moved = params + step
        new_r, _ = residuals_and_jacobian(moved, time, y)
        actual = (r @ r - new_r @ new_r) / 2
        foretold = -(r @ J @ step) - (J @ step) @ (J @ step) / 2
        if actual >= 0:
            params = moved
        if actual < foretold / 4:
            damping *= 3 / 2
        elif actual > foretold * 3 / 4:
            damping *= 2 / 3
        path.append(params)
    return np.array(path), np.array(dampings)


def gauss_newton() -> Identity:
    """On a noisy decaying curve: every iterate, and every λ.

    Condition: Gaussian outputs of unit variance. λ is in units of F, which is a mean
    over N examples, so Nλ is added to JᵀJ. This is not Newton's method: F does not
    contain the second derivatives of the model.

    Source: Martens 2020, section 9; Levenberg 1944; Marquardt 1963

    Measured on: a e⁻ᵇᵗ + c through {examples} points, {_LM_STEPS} steps
    """
    time = np.linspace(0.0, 4.0, 40)
    noise = 0.05 * np.random.default_rng(1).normal(size=time.shape)
    y = 2.5 * np.exp(-1.3 * time) + 0.5 + noise
    batch = {"time": jnp.asarray(time), "y": jnp.asarray(y)}
    run = compiled(natural_levenberg_marquardt)
    found, dampings = run(jnp.asarray(_LM_START), batch)
    truth, true_dampings = levenberg_marquardt(_LM_START, time, y)

    # A common mistake: adding λ to JᵀJ, which is a sum, as if it were a mean.
    r, J = residuals_and_jacobian(_LM_START, time, y)
    naive = _LM_START - np.linalg.solve(J.T @ J + np.eye(3), J.T @ r)
    name = "Levenberg-Marquardt, its iterates"
    condition = np.linalg.cond(J.T @ J / len(y) + true_dampings.min() * np.eye(3))
    size = {"num_rounded": 3 * _LM_STEPS, "condition": float(condition)}
    return Identity(
        algorithm="Levenberg-Marquardt",
        ours=natural_levenberg_marquardt,
        textbook=levenberg_marquardt,
        equality=equal(name, found, truth, **size),
        limit=unequal(
            "Levenberg-Marquardt, λ in place of Nλ: difference of a step",
            found[0],
            naive,
            "F is a mean over N examples, JᵀJ a sum",
        ),
        others=[equal("Levenberg-Marquardt, its λ", dampings, true_dampings, **size)],
        text=text_of(gauss_newton, examples=len(y)),
    )
