"""The step size is a KL, not a length.

Claimed: A learning rate determines how far the parameters move; the natural gradient
takes as input how far the model should move, in nats, and moves it that far.

Verdict: True if the KL is measured. The length from the quadratic model, s = √(2·max_kl
/ dᵀFd), is right in most steps, but a thousand times too long in some where F is nearly
singular.

Source: Amari 1998; Schulman et al. 2015, Trust region policy optimization

Note: ½s²dᵀFd is accurate if the step is small in every direction; with almost no
damping, d goes far along directions in which F is almost zero, where the third order
dominates. So the prediction is good in most steps and far off in some, and a length
that must not be exceeded has to be measured. This costs the forward passes in the
table. The search takes at most 10: if the KL jumps over orders of magnitude along d, it
may end well inside the radius, but never outside.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import threadpoolctl
from matplotlib.figure import Figure

import ngd_jax as ngd
from experiments.benchmarks.markdown import Table
from experiments.claims.claim import Check, Evidence, check, promise, seen, theory
from experiments.claims.drawing import COLORS, finish, new_figure
from experiments.claims.networks import Layers, digits, mlp_params, model_fn
from experiments.claims.steps import in_turn, repeated, train
from experiments.claims.texts import claim_of, described, drawn, notes
from ngd_jax.types import PyTree

__all__ = ["FILL", "STEP_SIZE"]

_LIKELIHOOD = ngd.Categorical()
_WIDTHS = [64, 10, 10]
_RADII = (1e-3, 1e-4, 1e-5)
_SGD_RATES = (0.1, 0.3, 1.0)
_STEPS, _SGD_STEPS = 30, 300
_DAMPING, _HARDLY_ANY = 1e-3, 1e-9
# The share of the radius that the library promises to reach.
FILL = 0.92

Data = dict[str, jax.Array]


class _Steps(NamedTuple):
    """Records of steps, `[runs, steps]` each; inside a program, one number each.

    Attributes:
      kl: of the step, measured again outside the transformation, nats per example.
      guess: the KL of the step for which the quadratic model predicts `max_kl`.
      evaluations: number of forward passes in the search for the radius.
      loss: after the step.
    """

    kl: Any
    guess: Any
    evaluations: Any
    loss: Any


def _loss_fn(params: Layers, batch: Data) -> jax.Array:
    return -_LIKELIHOOD.log_prob(model_fn(params, batch), batch["y"]).mean()


def _kl(before: Layers, after: Layers, batch: Data) -> jax.Array:
    return ngd.mean_kl(model_fn, before, after, batch, _LIKELIHOOD)


def _start() -> Layers:
    return mlp_params(jax.random.key(0), _WIDTHS)


def _train(
    tx_fn: Callable[[PyTree], optax.GradientTransformation],
    settings: PyTree,
    batch: Data,
    steps: int,
    observe: Callable[[PyTree, Layers, Layers, Any, Data], Any],
) -> Any:
    """Takes full-batch steps with each of `settings`, in one compiled program."""

    def one(setting: PyTree, start: Layers, batch: Data) -> Any:
        batches = repeated(batch, steps)
        _, kept = train(
            tx_fn(setting), _loss_fn, start, batches, lambda *a: observe(setting, *a)
        )
        return kept

    return in_turn(one, settings, _start(), batch)


def _to_the_radius(runs: Sequence[tuple[float, float]], batch: Data) -> _Steps:
    """Natural gradient for pairs of a radius and a damping."""

    def tx_fn(setting: jax.Array) -> optax.GradientTransformation:
        max_kl, damping = setting
        return ngd.natural_gradient(
            None,
            model_fn,
            _LIKELIHOOD,
            max_kl=lambda _: max_kl,
            damping=lambda _: damping,
            solver=ngd.Cholesky(),
        )

    def observe(
        setting: jax.Array, before: Layers, after: Layers, state: Any, batch: Data
    ) -> _Steps:
        fisher = ngd.linearize_fisher(model_fn, before, batch, _LIKELIHOOD)
        direction = jax.tree.map(jnp.subtract, before, after)  # up to a factor
        scale = ngd.quadratic_step_scale(fisher.quadratic(direction), setting[0])
        guessed = jax.tree.map(lambda p, d: p - scale * d, before, direction)
        return _Steps(
            kl=_kl(before, after, batch),
            guess=_kl(before, guessed, batch),
            evaluations=state.info.num_kl_evaluations,
            loss=_loss_fn(after, batch),
        )

    # OpenBLAS factorises a matrix of this size with threads of its own, which spin
    # while they wait for each other: thirty times as slow if other programs are
    # running.
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        return _train(tx_fn, jnp.asarray(runs), batch, _STEPS, observe)


def _rank(batch: Data) -> tuple[int, int]:
    """The rank of F at the start, and the largest possible rank."""
    dense = jax.jit(lambda p, b: ngd.dense_fisher(model_fn, p, b, _LIKELIHOOD))
    matrix = np.asarray(dense(_start(), batch))
    dark = int((np.asarray(batch["x"]) == 0).all(0).sum())
    hidden = _WIDTHS[1]
    # Weights of pixels that are always dark, and a constant added to all logits.
    largest = len(matrix) - dark * hidden - (hidden + 1)
    return int(np.linalg.matrix_rank(matrix, hermitian=True)), largest


def demonstrate(quick: bool) -> Evidence:
    """64-10-10 on the digits: natural gradient to three radii, and SGD.

    {examples} handwritten digits, a 64-10-10 tanh network with softmax outputs,
    full-batch steps from one random start. {_STEPS} natural gradient steps to a radius,
    with the default damping, λ = {_DAMPING:g}, and with hardly any; F + λI solved by
    Cholesky factorisation. {_SGD_STEPS} steps of SGD. The KL of each step is measured
    again, outside the optimizer. float64.
    """
    batch = digits(100 if quick else 500)
    radii = _RADII[::2] if quick else _RADII
    runs = [(radius, _DAMPING) for radius in radii] + [(1e-3, _HARDLY_ANY)]
    if not quick:
        runs += [(1e-4, _HARDLY_ANY), (1e-5, _HARDLY_ANY), (1e-4, 1e-11)]
    natural = _to_the_radius(runs, batch)
    kl, loss = _train(
        optax.sgd,
        jnp.asarray(_SGD_RATES),
        batch,
        _SGD_STEPS,
        lambda _, before, after, _state, data: (
            _kl(before, after, data),
            _loss_fn(after, data),
        ),
    )
    rank, largest_rank = _rank(batch)
    orders = np.log10(kl.max(1) / kl.min(1))
    asked = np.array([radius for radius, _ in runs])[:, None]
    fills, ratios = natural.kl / asked, natural.guess / asked
    size = sum(a * b + b for a, b in itertools.pairwise(_WIDTHS))
    checks: list[Check] = [
        check(
            "largest measured KL of a step over its radius",
            fills.max(),
            promise(None, 1.0, "never beyond `max_kl`"),
        ),
        check(
            "smallest",
            fills.min(),
            promise(FILL, 1.0, f"at least {FILL:g} of `max_kl`"),
        ),
        *(
            check(
                f"KL of the guessed step over the radius, median of {_STEPS} steps at "
                f"{radius:g} nats, λ = {damping:g}",
                float(np.median(ratio)),
                seen(
                    0.9,
                    1.2,
                    "right to second order; measured before, independently: 1.02 to "
                    "1.09",
                ),
            )
            for (radius, damping), ratio in zip(runs, ratios, strict=True)
            if damping == _HARDLY_ANY
        ),
        check(
            "the same, largest",
            ratios.max(),
            seen(
                100,
                None,
                "measured before, independently: up to 1,700; of that order or larger",
            ),
        ),
        check(
            f"rank of F, of {size}",
            rank,
            theory(
                1,
                largest_rank,
                "at most this: weights of dark pixels, a constant added to all logits",
            ),
        ),
        *(
            check(
                f"SGD, rate {rate:g}: orders of magnitude between its KLs per step",
                order,
                seen(2, 8, "measured before, independently: 2 to 6"),
            )
            for rate, order in zip(_SGD_RATES, orders, strict=True)
        ),
    ]
    return Evidence(
        headline=(
            f"steps have {fills.min():.2f} to {fills.max():.4f} of the requested KL; "
            f"with the length from the quadratic model, up to {ratios.max():,.0f} "
            f"times; SGD's KL per step ranges over {orders.min():.1f} to "
            f"{orders.max():.1f} orders of magnitude"
        ),
        setup=described(demonstrate, examples=len(batch["y"])),
        checks=checks,
        tables=[
            _table_of_natural(natural, runs, fills, ratios),
            _table_of_sgd(kl, orders, loss),
        ],
        plots=[drawn("step_size", _draw, natural.kl, kl, runs, fills, ratios)],
        notes=notes(demonstrate),
    )


def _table_of_natural(
    natural: _Steps,
    runs: Sequence[tuple[float, float]],
    fills: np.ndarray,
    ratios: np.ndarray,
) -> Table:
    rows = [
        [
            f"{radius:g}",
            f"{damping:g}",
            f"{fill.min():.3f} to {fill.max():.3f}",
            f"{evaluations.mean():.1f}",
            f"{np.median(ratio):.2f}",
            f"{ratio.max():,.1f}",
            f"{(ratio > 2).sum()} of {_STEPS}",
        ]
        for (radius, damping), fill, ratio, evaluations in zip(
            runs, fills, ratios, natural.evaluations, strict=True
        )
    ]
    return Table(
        "Natural gradient to a radius",
        [
            "radius, nats",
            "λ",
            "measured over radius",
            "forward passes",
            "quadratic model: KL over radius, median",
            "largest",
            "more than twice the radius",
        ],
        rows,
    )


def _table_of_sgd(kl: np.ndarray, orders: np.ndarray, loss: np.ndarray) -> Table:
    return Table(
        f"SGD with a fixed rate, {_SGD_STEPS} steps",
        ["rate", "smallest KL of a step, nats", "largest", "orders", "loss at the end"],
        [
            [
                f"{rate:g}",
                f"{kl[index].min():.1e}",
                f"{kl[index].max():.1e}",
                f"{orders[index]:.1f}",
                f"{loss[index, -1]:.3f}",
            ]
            for index, rate in enumerate(_SGD_RATES)
        ],
    )


def _draw(
    natural: np.ndarray,
    sgd: np.ndarray,
    runs: Sequence[tuple[float, float]],
    fills: np.ndarray,
    ratios: np.ndarray,
) -> Figure:
    """Draws `step_size`.

    Left: the KL of each step; a dashed line is a requested radius. Right: the KL of the
    step that the quadratic model alone would take, and of our step, relative to the
    radius.
    """
    figure, (left, right) = new_figure(2, width=9.0, height=4.2)
    blue, orange = COLORS["natural gradient"], COLORS["SGD"]
    steps = np.arange(1, _STEPS + 1)
    first = sum(damping == _DAMPING for _, damping in runs)
    for (radius, _), kl in zip(runs[:first], natural[:first], strict=True):
        left.axhline(radius, color=COLORS["theory"], ls="--", lw=1)
        label = "natural gradient to a radius" if radius == _RADII[0] else None
        left.loglog(steps, kl, ".-", color=blue, label=label)
    for rate, kl, style in zip(_SGD_RATES, sgd, (":", "-.", "-"), strict=True):
        left.loglog(
            np.arange(1, _SGD_STEPS + 1),
            kl,
            style,
            color=orange,
            label=f"SGD, rate {rate:g}",
        )
    finish(left, "KL of each step", "step", "mean KL per example (nats)")
    shades, styles = ("#a63603", "#e6550d", "#fd8d3c", "#969696"), ("-", "--", ":", "-")
    for (radius, damping), ratio, color, style in zip(
        runs[first:], ratios[first:], shades, styles, strict=False
    ):
        label = f"guess: {radius:g} nats, λ = {damping:g}"
        right.semilogy(steps, ratio, style, color=color, label=label)
    label = "ours, measured"
    for fill in fills[first:]:
        right.semilogy(steps, fill, ".", color=blue, label=label)
        label = None
    right.axhline(1.0, color=COLORS["theory"], ls="--", lw=1)
    finish(
        right,
        "What the quadratic model alone would do",
        "step",
        "KL of the step over the radius",
    )
    return figure


STEP_SIZE = claim_of(demonstrate)
