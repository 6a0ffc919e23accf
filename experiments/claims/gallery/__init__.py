"""Many known algorithms are natural gradient in disguise.

One file for each identity or pair of related ones. It contains the call of this
library, the textbook version in NumPy, and the difference if the condition is violated.

Claimed: Least squares, Newton's method for generalised linear models,
Levenberg-Marquardt, TRPO, the tabular natural policy gradient, K-FAC, Adam, stochastic
reconfiguration, mirror descent and variational inference are the natural gradient with
a particular choice of outputs, damping and solver.

Verdict: These are exact identities, up to round-off, each under a condition; without it
the two differ by a few per cent or far more. For TRPO the direction is the same, but
not the length; for K-FAC the identity covers only one layer; for Adam only batches of
one example, and with the empirical Fisher to the power ½, which is not the natural
gradient.

Source: Martens 2020, and the sources in the table

Note: `ngd.contrib.presets.trpo()` is `{preset}`.

Note: The code that ran, with the textbook version in NumPy:
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import ngd_jax as ngd
from experiments.benchmarks.markdown import Table
from experiments.claims.claim import Evidence
from experiments.claims.drawing import COLORS, finish, new_figure
from experiments.claims.gallery.adaptive import adam
from experiments.claims.gallery.exponential_family import mirror, variational
from experiments.claims.gallery.identity import Identity, call_in, descend, listing
from experiments.claims.gallery.kronecker import factored_layer
from experiments.claims.gallery.newton import Descent, reweighting
from experiments.claims.gallery.policies import policy_gradient, trpo
from experiments.claims.gallery.regression import gauss_newton, least_squares
from experiments.claims.gallery.wave_function import reconfiguration
from experiments.claims.texts import claim_of, described, drawn, notes

__all__ = ["GALLERY"]

_FLOOR = 1e-16  # the smallest difference that double precision can show


def demonstrate(quick: bool) -> Evidence:
    """Every identity on a small problem, and one of them as curves.

    Each algorithm as in its source, written in NumPy (Adam: from Optax), compared with
    one call of the library, in float64; the problems are in the second table.
    Differences are the largest absolute difference over the largest entry. Round-off is
    bounded by n ε κ, with n the length of the sums or of the chain of steps, ε =
    2.2e-16, and κ the condition number of the matrix in the solve.
    """
    generalised_linear, descent = reweighting()
    identities = [
        least_squares(),
        generalised_linear,
        gauss_newton(),
        trpo(quick),
        policy_gradient(quick),
        factored_layer(quick),
        adam(quick),
        reconfiguration(quick),
        mirror(quick),
        variational(quick),
    ]
    worst = max(identity.equality.measured for identity in identities)
    steps = len(descent.natural) - 1
    return Evidence(
        headline=(
            f"{len(identities)} algorithms are equivalent to a call of "
            f"`natural_gradient`, with a relative difference of at most {worst:.0e}; "
            f"Newton's gradient norm is {descent.natural[-1]:.0e} after {steps} steps, "
            f"while gradient descent takes {np.argmax(descent.plain < 1e-8):,} steps "
            f"to 1e-8"
        ),
        setup=described(demonstrate),
        checks=[
            check
            for identity in identities
            for check in (identity.equality, identity.limit, *identity.others)
        ],
        tables=[_calls(identities), _conditions(identities)],
        plots=[drawn("gallery", _draw, identities, descent)],
        notes=[
            *notes(demonstrate, preset=ngd.contrib.presets.trpo()),
            _listing("the steps", descend),
            *(
                _listing(each.algorithm, each.ours, each.textbook)
                for each in identities
            ),
        ],
    )


def _calls(identities: Sequence[Identity]) -> Table:
    return Table(
        "The algorithm, and the call that is the same",
        ["algorithm", "the call", "difference, relative", "expected", "source"],
        [
            [
                identity.algorithm,
                f"`{call_in(identity.ours)}`",
                f"{identity.equality.measured:.1e}",
                identity.equality.expected,
                identity.text.source,
            ]
            for identity in identities
        ],
    )


def _conditions(identities: Sequence[Identity]) -> Table:
    return Table(
        "When it holds, and what is left where it does not",
        ["algorithm", "condition", "without it", "measured on"],
        [
            [
                identity.algorithm,
                identity.text.condition,
                f"{identity.limit.name} {identity.limit.measured:.1e}",
                identity.text.setup,
            ]
            for identity in identities
        ],
    )


def _listing(name: str, *functions: Callable[..., Any]) -> str:
    code = listing(*functions)
    summary = f"<details><summary>{name}</summary>"
    return f"{summary}\n\n```python\n{code}\n```\n\n</details>"


def _draw(identities: Sequence[Identity], descent: Descent) -> Figure:
    """Draws `gallery`.

    Left: Newton's method, which here is the natural gradient, and gradient descent on
    logistic regression. Right: the difference between each algorithm and its call, also
    when the condition of the identity is violated.
    """
    figure, (left, right) = new_figure(2, width=9.0, height=4.6)
    _draw_descent(left, descent)
    _draw_errors(right, identities)
    return figure


def _draw_descent(axis: Axes, descent: Descent) -> None:
    # Label the curves directly, and end them where only round-off is left.
    curves = [
        (descent.plain, "gradient descent,\nrate 1/L", (60, 0.05), "SGD"),
        (descent.tuned, "rate 25/L", (270, 1e-10), "SGD, clipped"),
        (descent.natural, "natural\ngradient,\nNewton", (9, 2e-16), "natural gradient"),
    ]
    for norms, label, place, color in curves:
        shown = norms[: np.argmax(norms < _FLOOR) or None]
        style = "o-" if len(shown) < 10 else "-"
        axis.plot(shown, style, color=COLORS[color], markersize=4)
        axis.annotate(label, place, color=COLORS[color])
    axis.set_xscale("symlog", linthresh=10)
    axis.set_yscale("log")
    axis.set_xticks([0, 5, 10, 100, 1000], ["0", "5", "10", "100", "1,000"])
    x = "step, logarithmic from 10 on"
    finish(axis, "Logistic regression", x, "norm of the gradient")


def _draw_errors(axis: Axes, identities: Sequence[Identity]) -> None:
    rows = np.arange(len(identities))
    series = [
        ([max(each.equality.measured, _FLOOR) for each in identities], "o", "measured"),
        ([each.equality.high for each in identities], "|", "bound of round-off"),
        ([each.limit.measured for each in identities], "D", "without its condition"),
    ]
    colors = ["natural gradient", "theory", "SGD"]
    for (values, marker, label), color in zip(series, colors, strict=True):
        size = 12 if marker == "|" else 7
        style = {"color": COLORS[color], "markersize": size, "label": label}
        axis.plot(values, rows, marker, **style)
    axis.set_xscale("log")
    axis.set_yticks(rows, [each.algorithm for each in identities])
    axis.set_ylim(len(identities) - 0.5, -0.5)
    title = "How far from the textbook"
    finish(axis, title, "largest difference, relative", "", legend=False)
    axis.figure.legend(loc="outside lower right", ncols=3, frameon=False)


GALLERY = claim_of(demonstrate)
