"""One bad batch cannot wreck the network.

Claimed: A batch with a wrong label has a huge gradient, and gradient descent takes a
huge step; the natural gradient goes no further than the KL allows.

Verdict: True with a KL radius, false for a fixed learning rate times F⁻¹g, which goes
as far as SGD or further. With softmax outputs, a wrong label is no such problem for
SGD.

Source: Schulman et al. 2015, Trust region policy optimization

Note: F⁻¹ alone does not help: the Fisher matrix does not depend on the labels, so a
step with a fixed rate is just as proportional to the wrong residual as a step of SGD.
What limits the damage is the radius. Clipping also limits it, at a norm that has to be
tuned for each network and loss; so does Adam, in part.

Note: For SGD and the fixed rate, the theoretical ratio is for short steps at the
optimum. It is lower here because the clean steps after an outlier, which undo its
effect, are also long.

Note: With softmax outputs, SGD has no such problem: a residual is at most √2, however
wrong the label, and saturating units bound the rest. A batch with only wrong labels
does have an effect, since its residuals add up.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax
from matplotlib.figure import Figure

import ngd_jax as ngd
from experiments.benchmarks.markdown import Table
from experiments.claims.bad_batches import (
    BATCH,
    CLASSIFICATION,
    HELD_OUT,
    PROBABILITY,
    REGRESSION,
    SHIFT,
    Run,
    Stream,
    Task,
    Watched,
    draw,
    watch,
)
from experiments.claims.claim import Check, Evidence, check, promise, seen, theory
from experiments.claims.drawing import COLORS, finish, new_figure
from experiments.claims.networks import model_fn
from experiments.claims.texts import claim_of, described, drawn, notes

__all__ = ["OUTLIERS"]

_RADIUS = 1e-3
_RATE, _DAMPING = 0.1, 1e-2
_SGD_RATE, _MAX_NORM, _ADAM_RATE, _SOFTMAX_RATE = 0.1, 1.0, 0.01, 0.3
# The first steps go far whatever the labels are; the last ones show the outcome.
_SETTLED, _LAST = 100, 100

_SGD = "SGD"
_CLIPPED = "SGD, clipped"
_ADAM = "Adam"
_FIXED = "natural gradient, fixed rate"
_LIMITED = "natural gradient, KL ≤ 1e-3"
_BEFORE = {
    _SGD: "130; .75 (.12)",
    _CLIPPED: "8; .18 (.12)",
    _ADAM: "4; .24 (.10)",
    _FIXED: "169; .90 (.12)",
    _LIMITED: "1.3; .116 (.116)",
}

TxFn = Callable[[Run], optax.GradientTransformation]


class _Result(NamedTuple):
    """The result of one optimizer, over seeds.

    Attributes:
      with_outliers, without: the records, `[seeds, steps]`.
      ratio: mean KL of an outlier step over that of a clean one, `[seeds]`.
      errors: the final test error, a mean over the last steps and all seeds, with
        outliers and without.
    """

    with_outliers: Watched
    without: Watched
    ratio: np.ndarray
    errors: tuple[float, float]


def _clipped_sgd(run: Run) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(run.max_norm), optax.sgd(_SGD_RATE))


def _natural_gradient(task: Task) -> TxFn:
    def tx_fn(run: Run) -> optax.GradientTransformation:
        return ngd.natural_gradient(
            _RATE,
            model_fn,
            task.likelihood,
            max_kl=lambda _: run.max_kl,
            damping=_DAMPING,
            # F of 32 examples has rank 32 times the outputs: the solve is exact.
            solver=ngd.CG(max_steps=100, rtol=1e-6),
        )

    return tx_fn


def _compare(
    task: Task, tx_fn: TxFn, streams: Stream, settings: dict[str, dict[str, Any]]
) -> dict[str, _Result]:
    """Runs each of `settings` with and without outliers, in one compiled program."""
    seeds = range(len(streams.x))
    runs = [
        Run(seed, **({"bad_labels": 1} | setting | outliers))
        for setting in settings.values()
        for outliers in ({}, {"bad_labels": 0})
        for seed in seeds
    ]
    watched = watch(task, tx_fn, streams, Run(*map(np.array, zip(*runs, strict=True))))
    split = [np.split(leaf, len(runs) // len(seeds)) for leaf in watched]
    parts = [Watched(*part) for part in zip(*split, strict=True)]
    is_outlier = streams.is_outlier
    counted = np.arange(is_outlier.shape[1]) >= _SETTLED
    results = {}
    for name, bad, clean in zip(settings, parts[::2], parts[1::2], strict=True):
        far = _mean(bad.kl, is_outlier & counted)
        ratio = far / _mean(bad.kl, ~is_outlier & counted)
        errors = [float(part.error[:, -_LAST:].mean()) for part in (bad, clean)]
        results[name] = _Result(bad, clean, ratio, (errors[0], errors[1]))
    return results


def _mean(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The mean over the chosen steps, for each seed."""
    return np.where(chosen, values, 0.0).sum(1) / chosen.sum(1)


def demonstrate(quick: bool) -> Evidence:
    """8-16-1 with Gaussian outputs, and 8-16-3 with softmax outputs.

    Regression: new inputs from N(0, 1), labelled by an 8-16-1 tanh teacher plus N(0,
    1), so σ = 1; the network is also 8-16-1, with a Gaussian output of that width.
    {steps} steps on batches of {BATCH}; with probability {PROBABILITY:g}, one label of
    the batch is {SHIFT:g}σ too large. SGD with rate {_SGD_RATE:g}, the same with
    clipping at norm {_MAX_NORM:g}, Adam with rate {_ADAM_RATE:g}, natural gradient with
    rate {_RATE:g} and λ = {_DAMPING:g}, with and without a radius of {_RADIUS:g} nats.
    KL and error on {HELD_OUT} clean inputs; the error is the mean square distance to
    the teacher over the last {_LAST} steps; ratios leave out the first {_SETTLED}.
    {num_seeds} seeds, float64. Classification: the same with 3 classes drawn from the
    teacher's softmax, the next class as a wrong label, and SGD with rate
    {_SOFTMAX_RATE:g}; the error is the KL to the teacher in nats.
    """
    seeds, steps = (range(2), 300) if quick else (range(4), 600)
    streams = draw(REGRESSION, seeds, steps)
    results = (
        _compare(
            REGRESSION,
            _clipped_sgd,
            streams,
            {_SGD: {}, _CLIPPED: {"max_norm": _MAX_NORM}},
        )
        | _compare(REGRESSION, lambda _: optax.adam(_ADAM_RATE), streams, {_ADAM: {}})
        | _compare(
            REGRESSION,
            _natural_gradient(REGRESSION),
            streams,
            {_FIXED: {}, _LIMITED: {"max_kl": _RADIUS}},
        )
    )
    classes = draw(CLASSIFICATION, seeds, steps)
    one, all_wrong = {"bad_labels": 1}, {"bad_labels": BATCH}
    softmax = _compare(
        CLASSIFICATION,
        lambda _: optax.sgd(_SOFTMAX_RATE),
        classes,
        {"SGD, 1 label": one, f"SGD, all {BATCH} labels": all_wrong},
    )
    if not quick:
        softmax |= _compare(
            CLASSIFICATION,
            _natural_gradient(CLASSIFICATION),
            classes,
            {
                f"{_FIXED}, all {BATCH} labels": all_wrong,
                f"{_LIMITED}, all {BATCH} labels": all_wrong | {"max_kl": _RADIUS},
            },
        )
    limited = results[_LIMITED]
    return Evidence(
        headline=(
            f"an outlier step has {results[_SGD].ratio.mean():.0f} times the KL of a "
            f"clean one under SGD, {results[_FIXED].ratio.mean():.0f} times under the "
            f"natural gradient with a fixed rate, {limited.ratio.mean():.1f} times "
            f"with KL ≤ {_RADIUS:g}, where the test error is {limited.errors[0]:.3f} "
            f"with outliers, {limited.errors[1]:.3f} without"
        ),
        setup=described(
            demonstrate, PROBABILITY=PROBABILITY, steps=steps, num_seeds=len(seeds)
        ),
        checks=_checks(results, softmax),
        tables=[
            _table(results, "Regression: one label off by 50σ", _BEFORE),
            _table(softmax, "Classification: wrong labels in an outlier batch", {}),
        ],
        plots=[drawn("outliers", _draw, results, streams.is_outlier)],
        notes=notes(demonstrate),
    )


def _checks(results: dict[str, _Result], softmax: dict[str, _Result]) -> list[Check]:
    def harm(result: _Result) -> float:
        """The error with outliers over that without."""
        return result.errors[0] / result.errors[1]

    # One residual r among those of a batch, whose mean has the variance σ²/batch.
    at_optimum = (
        f"1 + r²/{BATCH}σ² = {1 + SHIFT**2 / BATCH:.0f} for short steps at the "
        f"optimum, r = {SHIFT:g}σ; of that order"
    )
    before = "measured before, independently"
    ranges = {
        _SGD: theory(20, 320, at_optimum),
        _CLIPPED: seen(1, 24, f"{before}: 8; of that order"),
        _ADAM: seen(1, 12, f"{before}: 4; of that order"),
        _FIXED: theory(20, 320, at_optimum),
        _LIMITED: seen(0.5, 2, f"the radius; {before}: 1.3"),
    }
    sgd_one, sgd_all = list(softmax.values())[:2]
    return [
        *(
            check(
                f"{name}: KL of an outlier step over that of a clean one",
                results[name].ratio.mean(),
                expected,
            )
            for name, expected in ranges.items()
        ),
        check(
            f"{_LIMITED}: largest KL of a step on its own batch, nats",
            results[_LIMITED].with_outliers.kl_on_batch.max(),
            promise(None, _RADIUS, "never beyond `max_kl`"),
        ),
        check(
            f"{_SGD}: test error with outliers over that without",
            harm(results[_SGD]),
            seen(1.5, 24, f"{before}: 6.2; of that order"),
        ),
        check(
            f"{_FIXED}: test error with outliers over that without",
            harm(results[_FIXED]),
            seen(1.9, 30, f"{before}: 7.5; of that order"),
        ),
        check(
            f"{_LIMITED}: test error with outliers over that without",
            harm(results[_LIMITED]),
            seen(0.8, 1.25, f"{before}: 1.0"),
        ),
        check(
            "softmax, SGD, 1 wrong label: KL of an outlier step over a clean one",
            sgd_one.ratio.mean(),
            theory(0.5, 2, f"1 + r²/{BATCH}σ², and r² is at most 2: of the order of 1"),
        ),
        check(
            "softmax, SGD, 1 wrong label: error with outliers over that without",
            harm(sgd_one),
            seen(
                0.8, 1.25, "residuals are bounded; a margin of a quarter, set by hand"
            ),
        ),
        check(
            f"softmax, SGD, all {BATCH} labels wrong: KL of an outlier step over a "
            f"clean one",
            sgd_all.ratio.mean(),
            seen(
                2,
                2 * BATCH,
                f"residuals add up, to {BATCH} times the noise; bounds set by hand",
            ),
        ),
    ]


def _table(results: dict[str, _Result], title: str, before: dict[str, str]) -> Table:
    head = [
        "optimizer",
        "KL of an outlier step over a clean one (smallest to largest seed)",
        "test error with outliers",
        "without",
    ]
    if before:
        head.append("measured before, independently")
    rows = []
    for name, result in results.items():
        ratio, errors = result.ratio, result.errors
        row = [
            name,
            f"{ratio.mean():.1f} ({ratio.min():.1f} to {ratio.max():.1f})",
            *(f"{error:.3f}" for error in errors),
        ]
        rows.append(row + ([before[name]] if before else []))
    return Table(title, head, rows)


def _draw(results: dict[str, _Result], is_outlier: np.ndarray) -> Figure:
    """Draws `outliers`.

    Left: test error during part of a training run; a grey line marks a batch with a
    wrong label. Right: how far each step moves the model; only with a radius (for the
    KL on the batch) do outlier steps look like all others.
    """
    figure, (left, right) = new_figure(2, width=9.0, height=4.4)
    steps = np.arange(is_outlier.shape[1])
    shown, counted = steps[150:250], steps >= _SETTLED
    jitter = np.random.default_rng(0).uniform(-0.3, 0.3, len(steps))
    for step in shown[is_outlier[0, shown]]:
        left.axvline(step, color="0.8", lw=1.5, zorder=0)
    for place, (name, result) in enumerate(results.items()):
        color = COLORS["natural gradient" if name == _LIMITED else name]
        # Error after step n belongs to the batch of step n.
        left.semilogy(
            shown, result.with_outliers.error[0, shown], color=color, label=name
        )
        for chosen, style in (
            (counted & ~is_outlier[0], {"color": "0.7", "s": 4}),
            (counted & is_outlier[0], {"color": color, "s": 12, "marker": "D"}),
        ):
            right.scatter(
                place + jitter[chosen], result.with_outliers.kl[0, chosen], **style
            )
    finish(
        left,
        "Test error",
        "step (grey line: a batch with a wrong label)",
        "mean square distance to the teacher",
    )
    right.set_yscale("log")
    label = "the radius, which holds on the batch of the step"
    right.axhline(_RADIUS, color=COLORS["theory"], ls="--", lw=1, label=label)
    right.set_xticks(range(len(results)), _SHORT, fontsize="small")
    finish(
        right,
        "KL of each step: clean (grey), outlier (colour)",
        "optimizer",
        f"mean KL on {HELD_OUT} other inputs (nats)",
    )
    return figure


_SHORT = ["SGD", "SGD,\nclipped", "Adam", "natural,\nfixed rate", "natural,\nKL ≤ 1e-3"]

OUTLIERS = claim_of(demonstrate)
