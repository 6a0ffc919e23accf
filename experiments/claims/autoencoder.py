"""On deep autoencoders it goes where gradient descent sits.

A deep network of logistic units first learns the mean of all images, where its gradient
almost vanishes: the plateau for which Hessian-free optimization was invented.

Claimed: On deep autoencoders, first-order methods are stuck at the error of the mean
image, while curvature methods get past it.

Verdict: True for SGD, even with momentum. Adam leaves the plateau, but needs many more
steps than the natural gradient for the same loss; in terms of time, it is as good on a
network this small.

Source: Martens 2010, Deep learning via Hessian-free optimization; Martens and Grosse
2015, Optimizing neural networks with Kronecker-factored approximate curvature

Note: In terms of time: the natural gradient takes {seconds:.1f} s for {steps} steps,
and reaches a loss of {loss:.2f}; in the same time, Adam reaches {same_seconds:.2f} on
this machine. On a small network Adam's steps are so cheap that it can afford many.

Note: All of these runs have the same start. From another one, the full experiment left
0.40 of the mean image's error after 150 steps of the natural gradient, at a loss that
Adam reached after 584 steps. From both starts, SGD is stuck and the natural gradient
gets past the plateau, but how many steps of Adam one of its steps is worth depends on
the start (20 from the first, 4 from the second), and even on round-off, by a fifth.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import ngd_jax as ngd
from experiments.benchmarks.markdown import Table
from experiments.claims.claim import Evidence, check, literature, seen
from experiments.claims.drawing import COLORS, finish, new_figure
from experiments.claims.networks import Layers, digits
from experiments.claims.texts import claim_of, described, drawn, notes

__all__ = ["AUTOENCODER"]

_LIKELIHOOD = ngd.Bernoulli()
_WIDTHS = [64, 100, 50, 25, 10, 25, 50, 100, 64]
_CODE = 3  # index of the layer that outputs the code; this layer is linear


class _Run(NamedTuple):
    """A training run.

    Attributes:
      name: the optimizer.
      settings: its settings in words.
      losses: before each step, nats per image.
      seconds: CPU seconds from the start to each step, without compiling.
      error: final error of the reconstructions, half the squared distance.
    """

    name: str
    settings: str
    losses: np.ndarray
    seconds: np.ndarray
    error: float


def model_fn(params: Layers, x: jax.Array) -> jax.Array:
    """Maps images in [0, 1] to logits of their reconstructions."""
    for index, layer in enumerate(params):
        x = x @ layer["w"] + layer["b"]
        if index not in (_CODE, len(params) - 1):
            x = jax.nn.sigmoid(x)
    return x


def _output_loss_fn(outputs: jax.Array, x: jax.Array) -> jax.Array:
    return -_LIKELIHOOD.log_prob(outputs, x).mean()


def _loss_fn(params: Layers, x: jax.Array) -> jax.Array:
    return _output_loss_fn(model_fn(params, x), x)


def _natural_gradient() -> optax.GradientTransformation:
    return ngd.natural_gradient(
        1.0,
        model_fn,
        _LIKELIHOOD,
        damping=ngd.LevenbergMarquardt(initial=1.0, increase=2.0, decrease=0.5),
        solver=ngd.CG(max_steps=30, rtol=0.0, warm_start=0.95),
        loss_fn=_output_loss_fn,
    )


def demonstrate(quick: bool) -> Evidence:
    """64-100-50-25-10-25-50-100-64 on the digits, with all of them in every step.

    {count} handwritten digits, all of them in every step; logistic units, a linear code
    of 10 numbers, Bernoulli pixels, weights N(0, 1/inputs), float32. Natural gradient:
    rate 1, Levenberg-Marquardt damping from 1, 30 products from a warm start. Adam and
    SGD use the best of a few rates.
    """
    x = digits(200 if quick else 500)["x"].astype(jnp.float32)
    steps, many = (60, 600) if quick else (150, 6000)
    runs = [
        _train(name, settings, tx, x, count)
        for name, settings, tx, count in (
            ("natural gradient", "λ₀ = 1, 30 products", _natural_gradient(), steps),
            ("Adam", "rate 0.01", optax.adam(1e-2), many),
            ("SGD", "rate 0.3, momentum 0.95", optax.sgd(0.3, 0.95, True), many),
        )
    ]
    natural, adam, sgd = runs
    mean_image = float(((x - x.mean(0)) ** 2).sum(-1).mean() / 2)
    reached = np.flatnonzero(adam.losses <= natural.losses[-1])
    adam_steps = reached[0] + 1 if len(reached) else np.inf
    same_seconds = float(np.interp(natural.seconds[-1], adam.seconds, adam.losses))
    needed = f"{adam_steps:,.0f}" if len(reached) else f"more than {many:,}"
    return Evidence(
        headline=(
            f"error relative to the mean image: SGD {sgd.error / mean_image:.3f} after "
            f"{many:,} steps, natural gradient {natural.error / mean_image:.2f} after "
            f"{steps}; Adam needs {needed} steps to reach the same loss"
        ),
        setup=described(demonstrate, count=len(x)),
        checks=[
            check(
                f"error of SGD after {many:,} steps over that of the mean image",
                sgd.error / mean_image,
                literature(0.95, 1.05, "it stays there, according to Martens 2010"),
            ),
            check(
                f"error of natural gradient after {steps} steps over that",
                natural.error / mean_image,
                literature(None, 0.5, "it gets past, according to Martens 2010"),
            ),
            check(
                "Adam's steps to the last loss of the natural gradient, over its own",
                adam_steps / steps,
                seen(
                    5.0,
                    None,
                    "measured before: 23, in quick runs 9, from another start 4",
                ),
            ),
        ],
        tables=[_tabulate(runs, mean_image)],
        plots=[drawn("autoencoder", _draw, runs, _mean_image_loss(x))],
        notes=notes(
            demonstrate,
            seconds=natural.seconds[-1],
            steps=steps,
            loss=natural.losses[-1],
            same_seconds=same_seconds,
        ),
    )


def _train(
    name: str,
    settings: str,
    tx: optax.GradientTransformation,
    x: jax.Array,
    steps: int,
    *,
    chunks: int = 15,
) -> _Run:
    tx = optax.with_extra_args_support(tx)

    def step(carry: Any, _: None, x: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        value, grads = jax.value_and_grad(_loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, batch=x, value=value)
        return (optax.apply_updates(params, updates), state), value

    def run(carry: Any, x: jax.Array) -> Any:
        return jax.lax.scan(
            lambda carry, _: step(carry, None, x), carry, length=steps // chunks
        )

    params = _start(jax.random.key(0))
    carry = params, tx.init(params)
    compiled: Callable[..., Any] = jax.jit(run).lower(carry, x).compile()
    losses, seconds, start = [], [0.0], time.process_time()
    for _ in range(chunks):
        carry, values = jax.block_until_ready(compiled(carry, x))
        losses.append(np.asarray(values))
        seconds.append(time.process_time() - start)
    at = np.linspace(0, chunks, steps, endpoint=False)
    reconstruction = jax.nn.sigmoid(model_fn(carry[0], x))
    return _Run(
        name,
        settings,
        np.concatenate(losses),
        np.interp(at, np.arange(chunks + 1), seconds),
        float(((reconstruction - x) ** 2).sum(-1).mean() / 2),
    )


@jax.jit
def _start(key: jax.Array) -> Layers:
    """Weights N(0, 1 / inputs), layer by layer, and zero biases."""
    layers = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(_WIDTHS)):
        w = jax.random.normal(jax.random.fold_in(key, index), (inputs, outputs))
        w = w / jnp.sqrt(inputs)
        layers.append({"w": w, "b": jnp.zeros(outputs)})
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), layers)


def _mean_image_loss(x: jax.Array) -> float:
    """The entropy of independent pixels, nats per image."""
    mean = np.clip(np.asarray(x, float).mean(0), 1e-12, 1 - 1e-12)
    return float(-(mean * np.log(mean) + (1 - mean) * np.log(1 - mean)).sum())


def _tabulate(runs: list[_Run], mean_image: float) -> Table:
    rows = [
        [
            run.name,
            run.settings,
            f"{len(run.losses):,}",
            f"{run.seconds[-1]:.2f}",
            f"{run.losses[-1]:.2f}",
            f"{run.error:.3f}",
        ]
        for run in runs
    ]
    head = ["optimizer", "settings", "steps", "CPU seconds", "loss, nats", "error"]
    return Table(
        f"After training; the error of the mean image is {mean_image:.3f}", head, rows
    )


def _draw(runs: list[_Run], mean_image_loss: float) -> Figure:
    """Draws `autoencoder`.

    The same runs over steps and over CPU seconds. The dotted line is the loss of the
    mean image, where SGD stays.
    """
    figure, (left, right) = new_figure(2, width=9.0, height=3.8)
    for run in runs:
        color = COLORS[run.name]
        left.plot(1 + np.arange(len(run.losses)), run.losses, color=color)
        right.plot(run.seconds, run.losses, color=color, label=run.name)
    for axis in (left, right):
        axis.axhline(
            mean_image_loss, ls=":", color=COLORS["theory"], label="the mean image"
        )
    left.set_xscale("log")
    finish(left, "By steps", "step", "loss (nats per image)", legend=False)
    finish(right, "By time", "CPU seconds", "loss (nats per image)")
    bottom = min(run.losses.min() for run in runs)
    for axis in (left, right):
        axis.set_ylim(bottom - 1, mean_image_loss + 3)
    return figure


AUTOENCODER = claim_of(demonstrate, x64=False, is_timed=True)
