"""Deep linear networks: the loss gap falls as e^(-2t).

    W = W₄ W₃ W₂ W₁,    dW/dt = -(W - W*),    loss - least loss ∝ e^(-2t)

The flow moves the product straight to the optimum, whatever the layers and the inputs,
as long as the layers can move it in every direction: while at most one is singular.

Claimed: Along the natural gradient flow, the loss of a deep linear network decreases
exponentially to its minimum, at a rate that depends neither on the depth nor on the
data.

Verdict: True for the flow, with the pseudo-inverse of F, from any start with layers
that are not singular; for steps, true to first order in the rate. False with damping.

Source: Bernacchia, Lengyel and Hennequin 2018, Exact natural gradient in deep linear
networks and application to the nonlinear case

Note: F is singular, with a rank of at most 25 for 100 parameters, and the claim is
about its pseudo-inverse. It does not hold with damping: a direction that the data
hardly determine moves at the rate σ / (σ + λ), with σ its eigenvalue of F.

Note: The claim is about the flow, and about short steps. One full step (η = 1) takes a
single layer to the least loss; but with these four layers, whose product is not linear
in them, it makes the gap {after_one:.1e} times as large (median). Even at the rate of
the plots, {departed} of {seeds} networks, with nearly singular layers, deviate from the
line by more than a tenth in their first step, and fall parallel to it from then on.
Longer steps need a radius or damping.

Note: The layers must be able to move the product in all directions, which they can
while at most one of them is singular; random square layers are not singular. All slopes
are fitted over the whole time, from the first step on.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import ngd_jax as ngd
from experiments.benchmarks.markdown import Table
from experiments.claims.claim import Check, Evidence, check, literature, theory
from experiments.claims.drawing import COLORS, finish, new_figure
from experiments.claims.texts import claim_of, described, drawn, notes
from ngd_jax.types import Batch

__all__ = ["DEEP_LINEAR"]

_LIKELIHOOD = ngd.Gaussian()
_LAYERS, _WIDTH, _EXAMPLES = 4, 5, 50
_INPUT_CONDITION = 100.0  # of the covariance of the inputs
_FLOW_TIME = 6.0
# F has rank at most 25, of 100. Starting from zero, conjugate gradients stay in its
# range, and converge to the shortest solution, so no damping is needed.
_SOLVER = ngd.CG(max_steps=60, rtol=1e-8)
_DAMPING = 0.0
_RATE = 0.02
_DAMPING_BESIDE = 0.1
_GRADIENT_RATES = 10.0 ** np.arange(-3, 0.1, 0.25)
_SLOWEST = -1.9  # a slope above this counts as slowed down by damping


def model_fn(params: jax.Array, batch: Batch) -> jax.Array:
    """The product of the layers, `[layers, 5, 5]`, applied to the inputs."""
    outputs = batch["x"]
    for layer in params:
        outputs = outputs @ layer.T
    return outputs


def loss_fn(params: jax.Array, batch: Batch) -> jax.Array:
    """Half the squared error, averaged over examples: nats, up to a constant."""
    return 0.5 * ((model_fn(params, batch) - batch["y"]) ** 2).sum(-1).mean()


def make_batch(seed: int) -> dict[str, jax.Array]:
    """Correlated inputs, and noisy targets from a random linear teacher."""
    rng = np.random.default_rng(seed)
    scales = _INPUT_CONDITION ** -np.linspace(0, 0.5, _WIDTH)
    axes = np.linalg.qr(rng.normal(size=(_WIDTH, _WIDTH)))[0]
    inputs = rng.normal(size=(_EXAMPLES, _WIDTH)) * scales @ axes.T
    teacher = rng.normal(size=(_WIDTH, _WIDTH)) / np.sqrt(_WIDTH)
    noise = 0.1 * rng.normal(size=(_EXAMPLES, _WIDTH))
    return {"x": jnp.asarray(inputs), "y": jnp.asarray(inputs @ teacher.T + noise)}


def least_loss(batch: dict[str, Any]) -> float:
    """The loss of linear regression."""
    x, y = np.asarray(batch["x"]), np.asarray(batch["y"])
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    return float(0.5 * ((x @ best - y) ** 2).sum(-1).mean())


def natural_losses(
    params: jax.Array, batch: Batch, rate: jax.Array, damping: jax.Array, *, steps: int
) -> tuple[jax.Array, jax.Array]:
    """The loss before each step and after the last, `[steps + 1]`.

    Also the loss after a full step, of rate 1, from each point, `[steps]`.
    """
    tx = ngd.scale_by_natural_gradient(
        model_fn, _LIKELIHOOD, damping=damping, solver=_SOLVER
    )

    def step(carry: tuple[jax.Array, Any], _: None) -> tuple[Any, Any]:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        direction: Any
        direction, state = tx.update(grads, state, params, batch=batch)
        by_full_step = loss_fn(params - direction, batch)
        return (params - rate * direction, state), (loss, by_full_step)

    (params, _), (losses, by_full_step) = jax.lax.scan(
        step, (params, tx.init(params)), length=steps
    )
    return jnp.append(losses, loss_fn(params, batch)), by_full_step


def gradient_losses(
    params: jax.Array, batch: Batch, rate: jax.Array, *, steps: int
) -> jax.Array:
    """The same for gradient descent."""

    def step(params: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return params - rate * grads, loss

    params, losses = jax.lax.scan(step, params, length=steps)
    return jnp.append(losses, loss_fn(params, batch))


def demonstrate(quick: bool) -> Evidence:
    """The loss gap along the flow from random layers to a random teacher.

    {seeds} networks of {_LAYERS} linear layers of {_WIDTH} × {_WIDTH}, random weights
    and random teachers with noise; {_EXAMPLES} examples whose inputs have a covariance
    of condition {_INPUT_CONDITION:g}; squared error. Full batch, time {_FLOW_TIME:g} in
    {steps} steps of η = {_RATE:g}, solved by conjugate gradients without damping,
    float64. Gradient descent: the best of {num_rates} rates for each network, with the
    same number of steps.
    """
    seeds = 2 if quick else 8
    batches = [make_batch(seed) for seed in range(seeds)]
    layers = np.random.default_rng(0).normal(size=(seeds, _LAYERS, _WIDTH, _WIDTH))
    params = jnp.asarray(layers / np.sqrt(_WIDTH))
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    least = np.array([least_loss(one) for one in batches])[:, None]

    # 1. The natural gradient at two rates, then damped.
    steps = round(_FLOW_TIME / _RATE)
    rates = np.array([2 * _RATE, _RATE, _RATE])
    dampings = np.array([_DAMPING, _DAMPING, _DAMPING_BESIDE])
    run = functools.partial(natural_losses, steps=steps)
    run = jax.vmap(jax.vmap(run, (0, 0, None, None)), (None, None, 0, 0))
    losses, by_full_step = jax.jit(run)(params, batch, rates, dampings)
    gaps = np.asarray(losses) - least
    after_one = np.median((by_full_step[1, :, 0] - least[:, 0]) / gaps[1, :, 0])

    # 2. Gradient descent at the best rate for each network.
    run = functools.partial(gradient_losses, steps=steps)
    run = jax.vmap(jax.vmap(run, (0, 0, None)), (None, None, 0))
    by_gradient = np.asarray(jax.jit(run)(params, batch, _GRADIENT_RATES)) - least
    ends = np.where(np.isfinite(by_gradient[..., -1]), by_gradient[..., -1], np.inf)
    by_gradient = by_gradient[ends.argmin(0), np.arange(seeds)]

    slopes = np.array([slope(gap, rate) for gap, rate in zip(gaps, rates, strict=True)])
    twice, once, damped = np.median(slopes, axis=1)
    checks: list[Check] = [
        check(
            f"slope of log gap against time at η = {_RATE:g}, median of {seeds}",
            once,
            theory(
                -2.04, -2.0, "2 log(1 - η) / η = -2.02 for one layer; within η of it"
            ),
        ),
        check(
            f"the same for η to 0, from η = {2 * _RATE:g} and {_RATE:g}",
            2 * once - twice,
            literature(
                -2.01, -1.99, "-2 (Bernacchia et al. 2018); error of second order in η"
            ),
        ),
        check(
            f"slope with damping λ = {_DAMPING_BESIDE:g}, median",
            damped,
            theory(_SLOWEST, 0.0, "slower: rates σ / (σ + λ)"),
        ),
    ]
    left_by_gradient = np.median(by_gradient[:, -1] / by_gradient[:, 0])
    left = np.median(gaps[1, :, -1] / gaps[1, :, 0])
    departed = int((gaps[1, :, 1] / gaps[1, :, 0] > 1.1 * np.exp(-2 * _RATE)).sum())
    rows = [
        [
            f"natural, η = {rate:g}, λ = {damping:g}",
            f"{np.median(some):.3f}",
            f"{some.min():.3f} to {some.max():.3f}",
        ]
        for rate, damping, some in zip(rates, dampings, slopes, strict=True)
    ]
    return Evidence(
        headline=(
            f"slope of the log loss gap over time: {once:.3f} at η = {_RATE:g}, "
            f"{2 * once - twice:.4f} for η → 0; gradient descent at its best rate "
            f"leaves {left_by_gradient:.0e} of the gap, the natural gradient {left:.0e}"
        ),
        setup=described(
            demonstrate, seeds=seeds, steps=steps, num_rates=len(_GRADIENT_RATES)
        ),
        checks=checks,
        tables=[
            Table(
                "Slope of the log loss gap over time",
                ["", "median", "least to largest"],
                rows,
            )
        ],
        plots=[drawn("deep_linear", _draw, gaps, by_gradient)],
        notes=notes(demonstrate, after_one=after_one, departed=departed, seeds=seeds),
    )


def slope(gaps: np.ndarray, rate: float) -> np.ndarray:
    """Slope of log gap over time, up to `_FLOW_TIME`, one for each row of `gaps`."""
    count = round(_FLOW_TIME / rate) + 1
    return np.polyfit(np.arange(count) * rate, np.log(gaps[:, :count]).T, 1)[0]


def _draw(gaps: np.ndarray, by_gradient: np.ndarray) -> Figure:
    """Draws `deep_linear`.

    Left: without damping, the loss gap of every network falls as e^(-2t), from the
    first step on, and damping slows it down. Right: gradient descent on the same
    networks, each at its best rate.
    """
    figure, (left, right) = new_figure(2, width=9.0, height=4.2)
    steps = np.arange(gaps.shape[-1])
    times = steps * _RATE
    natural = COLORS["natural gradient"]
    purple = "#807dba"
    relative = gaps[1:] / gaps[1:, :, :1]
    for rows, damping, color in zip(
        relative, (0.0, _DAMPING_BESIDE), (natural, purple), strict=True
    ):
        left.semilogy(times, rows.T, color=color, alpha=0.5, linewidth=1)
        left.semilogy([], [], color=color, label=f"natural gradient, λ = {damping:g}")
    left.semilogy(times, np.exp(-2 * times), "--", color="black", label="e^(-2t)")
    finish(
        left,
        "Along the flow",
        f"time t = η × steps (η = {_RATE:g})",
        "loss gap over that at the start",
    )
    first = by_gradient[:, :1]
    right.semilogy(steps, relative[0].T, color=natural, alpha=0.5, linewidth=1)
    right.semilogy(
        steps, (by_gradient / first).T, color=COLORS["SGD"], alpha=0.5, linewidth=1
    )
    right.semilogy([], [], color=natural, label=f"natural gradient, η = {_RATE:g}")
    right.semilogy([], [], color=COLORS["SGD"], label="gradient descent, best rate")
    finish(right, "Beside gradient descent", "steps", "loss gap over that at the start")
    return figure


DEEP_LINEAR = claim_of(demonstrate)
