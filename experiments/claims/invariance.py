"""Swap sigmoid for tanh: the gradient changes, the natural gradient does not.

Claimed: If the same network is written with sigmoid units instead of tanh units,
gradient descent learns something else, while the natural gradient takes the same steps.

Verdict: Exactly true for any step size, since σ(x) = ½(1 + tanh(x/2)) amounts to a
linear map of the weights. Damping by λI breaks it, in proportion to λ; damping in the
mapped metric does not. Where F cannot be inverted in working precision, there is
nothing to compare.

Source: Amari 1998, Natural gradient works efficiently in learning; Martens 2020, New
insights and perspectives on the natural gradient method

Note: The invariance holds for any step size, since the map is linear; invariance to a
non-linear change of parameters holds only for small steps. Two things break it. The
first is damping by λI, which measures all parameters in the same unit; damping in a
metric that is mapped along with the parameters (`CovariantDamping`) does not break it.
The second is round-off where F is nearly singular, as at a random start, or after a
long undamped step: there the step is mostly noise, the path diverges, and the networks
differ by that noise. Training needs damping, so the claim carries over to practice only
with the mapped metric.
"""

import numpy as np
import optax
from matplotlib.figure import Figure

from experiments.benchmarks.markdown import Table
from experiments.claims.claim import Check, Evidence, check, seen, theory
from experiments.claims.drawing import COLORS, finish, new_figure
from experiments.claims.texts import claim_of, described, drawn, notes
from experiments.claims.twins import (
    POINTS,
    RATE,
    STEPS,
    Drift,
    drift,
    drift_of_settings,
    starts,
)

__all__ = ["INVARIANCE"]

_EPS = float(np.finfo(np.float64).eps)
# Up to this condition number of F, a solve keeps ten of the sixteen digits.
_WELL_CONDITIONED = 1e6
_SGD_RATE, _ADAM_RATE = 0.1, 0.01
_DAMPINGS = 10.0 ** np.arange(-9, -1)
_UNDAMPED = "natural gradient, undamped"
_OWN_UNDAMPED = "random start, undamped, rate 1"
_OWN_MAPPED = "random start, λ = 1e-3 in the mapped metric"
_BOUND = f"{STEPS} steps × ε × condition number"


def _power(value: float) -> str:
    """1e-9, not 1e-09."""
    return f"{value:.0e}".replace("e-0", "e-")


def _plain(damping: float) -> str:
    return f"λI, λ = {_power(damping)}"


def _mapped(damping: float) -> str:
    return f"λ = {_power(damping)} in the mapped metric"


def demonstrate(quick: bool) -> Evidence:
    """2-3-1 networks on a teacher's data: natural gradient, SGD and Adam.

    Networks with 2 inputs, 3 hidden units and one Gaussian output of unit variance,
    {POINTS} inputs drawn from N(0, 1), noiseless outputs of a tanh teacher with
    parameters from N(0, 1). {num_starts} starts, each at its own teacher plus 0.3 N(0,
    1); {num_well} of them are well-conditioned: the condition number of F stays below
    {_WELL_CONDITIONED:.0e} along the undamped path. The sigmoid network starts as the
    same function. {STEPS} full-batch steps with rate {RATE} unless stated otherwise, F
    + λI solved by Cholesky factorisation, float64.
    """
    near, own = starts(8 if quick else 24)
    dampings = _DAMPINGS[[0, 1, 5]] if quick else _DAMPINGS
    settings = {
        _UNDAMPED: near,
        "undamped, rate 0.3": near._replace(rate=0.3),
        "λ = 1e-4 in the mapped metric, rate 1, KL ≤ 1e-3": near._replace(
            rate=1.0, max_kl=1e-3, damping=1e-4, mapped=True
        ),
        _OWN_UNDAMPED: own._replace(rate=1.0),
        _OWN_MAPPED: own._replace(damping=1e-3, mapped=True),
    }
    for damping in dampings:
        settings[_plain(damping)] = near._replace(damping=damping)
        settings[_mapped(damping)] = near._replace(damping=damping, mapped=True)
    natural = drift_of_settings(settings)
    well = natural[_UNDAMPED].condition <= _WELL_CONDITIONED
    others = {
        f"SGD, rate {_SGD_RATE}": optax.sgd(_SGD_RATE),
        f"Adam, rate {_ADAM_RATE}": optax.adam(_ADAM_RATE),
    }
    first_order = {
        name: drift(lambda _, tx=tx: tx, near, with_condition=False)
        for name, tx in others.items()
    }
    results = natural | first_order
    natural_end, *ends = (
        np.median(results[name].difference[well, -1]) for name in (_UNDAMPED, *others)
    )
    return Evidence(
        headline=(
            f"after {STEPS} steps the outputs of the two networks differ by "
            f"{natural_end:.0e} under the natural gradient, {ends[0]:.2f} under SGD, "
            f"{ends[1]:.2f} under Adam"
        ),
        setup=described(
            demonstrate,
            POINTS=POINTS,
            RATE=RATE,
            num_starts=len(near.start),
            num_well=int(well.sum()),
        ),
        checks=_checks(natural, first_order, well),
        tables=[_table(results, well)],
        plots=[
            drawn("invariance", _draw, results, well, dampings),
            drawn("invariance_condition", _draw_condition, natural),
        ],
        notes=notes(demonstrate),
    )


def _checks(
    natural: dict[str, Drift], first_order: dict[str, Drift], well: np.ndarray
) -> list[Check]:
    def after_last_step(result: Drift) -> float:
        return float(np.median(result.difference[well, -1]))

    undamped, own = natural[_UNDAMPED], natural[_OWN_UNDAMPED]
    round_off = STEPS * _EPS * undamped.condition[well]
    small, smaller = (
        natural[_plain(damping)].largest[well] for damping in _DAMPINGS[:2]
    )
    slope = float(np.median(np.log10(smaller / small)))
    exact = "exact; round-off"
    return [
        check(
            "well-conditioned starts",
            float(well.sum()),
            seen(2, None, "there are some; set by hand"),
        ),
        *(
            check(
                f"{name}: loss after the last step over that after the first, median",
                float(np.median((result.loss[:, -1] / result.loss[:, 0])[well])),
                theory(
                    None,
                    1e-2,
                    "both networks move: (1 - rate)^98 = 3e-5 where F is that of the "
                    "loss",
                ),
            )
            for name, result in natural.items()
            if name in (_UNDAMPED, _mapped(1e-4))
        ),
        check(
            "undamped: largest difference of the outputs, median over these",
            float(np.median(undamped.largest[well])),
            theory(None, 1e-11, exact),
        ),
        check(
            "the same over steps × ε × condition number of F, largest",
            float((undamped.largest[well] / round_off).max()),
            theory(None, 1.0, "first-order bound on the error of a stable solve"),
        ),
        *(
            check(
                f"{name}: difference after {STEPS} steps, median",
                after_last_step(result),
                seen(
                    0.03,
                    3.0,
                    "measured before, independently: 0.25 to 0.32; of that order",
                ),
            )
            for name, result in first_order.items()
        ),
        check(
            f"{_plain(1e-4)}: difference after {STEPS} steps, median",
            after_last_step(natural[_plain(1e-4)]),
            seen(2e-4, 2e-2, "measured before, independently: 2e-3; of that order"),
        ),
        check(
            "power of λ that it grows with, from 1e-9 to 1e-8",
            slope,
            theory(0.9, 1.1, "λI is a perturbation of first order: 1"),
        ),
        *(
            check(
                f"{name}: largest difference, largest over all starts",
                float(result.largest.max()),
                theory(None, 1e-11, exact),
            )
            for name, result in natural.items()
            if name in (_mapped(1e-4), _OWN_MAPPED) or "KL" in name
        ),
        check(
            f"{_OWN_UNDAMPED}: largest difference, median",
            float(np.median(own.largest)),
            theory(
                1e-3, None, "F is singular to working precision: the step is round-off"
            ),
        ),
    ]


def _table(results: dict[str, Drift], well: np.ndarray) -> Table:
    rows = []
    for name, result in results.items():
        is_own = name in (_OWN_UNDAMPED, _OWN_MAPPED)
        chosen = np.full(len(well), is_own) | well
        largest = result.largest[chosen]
        rows.append(
            [
                name,
                "all" if is_own else "well-conditioned",
                f"{np.median(largest):.1e}",
                f"{np.max(largest):.1e}",
                f"{np.median(result.difference[chosen, -1]):.1e}",
                f"{np.median(result.loss[chosen, -1]):.1e}",
            ]
        )
    return Table(
        "Largest difference between the outputs of the two networks",
        [
            "optimizer",
            "starts",
            "over all steps, median",
            "largest",
            "after the last step, median",
            "loss after it, nats, median",
        ],
        rows,
    )


def _draw(results: dict[str, Drift], well: np.ndarray, dampings: np.ndarray) -> Figure:
    """Draws `invariance`.

    A sigmoid network and a tanh network that start as the same function. SGD and Adam
    drive them apart; under the natural gradient they stay the same, unless each is
    damped by λI in its own parameters. Lines are medians over the well-conditioned
    starts, bands range from the smallest to the largest.
    """
    figure, (left, right) = new_figure(2, width=9.0, height=4.2)
    lines = [
        (f"SGD, rate {_SGD_RATE}", "SGD", "-", "SGD"),
        (f"Adam, rate {_ADAM_RATE}", "Adam", "-", "Adam"),
        (_plain(1e-4), "natural gradient, fixed rate", "--", "natural, λI = 1e-4"),
        (_UNDAMPED, "natural gradient", "-", "natural, undamped"),
        (_mapped(1e-4), "theory", ":", "natural, λ mapped"),
    ]
    steps = np.arange(1, STEPS + 1)
    for name, color, style, label in lines:
        # A difference of exactly 0 cannot be shown on a logarithmic axis.
        chosen = np.maximum(results[name].difference[well], _EPS / 4)
        left.fill_between(
            steps, chosen.min(0), chosen.max(0), color=COLORS[color], alpha=0.15, lw=0
        )
        left.plot(steps, np.median(chosen, 0), style, color=COLORS[color], label=label)
    left.set_yscale("log")
    left.set_ylim(bottom=1e-17)
    finish(
        left,
        "The two networks drift apart, or do not",
        "step",
        "largest difference of the outputs",
    )
    for named, color, marker, label in (
        (_plain, "natural gradient, fixed rate", "o", "λI in both"),
        (_mapped, "natural gradient", "s", "λ in the mapped metric"),
    ):
        values = [np.median(results[named(d)].largest[well]) for d in dampings]
        right.loglog(
            dampings, values, "-", marker=marker, color=COLORS[color], label=label
        )
    finish(
        right,
        "What damping does to it",
        "damping λ",
        f"largest difference over {STEPS} steps",
    )
    return figure


def _draw_condition(natural: dict[str, Drift]) -> Figure:
    """Draws `invariance_condition`.

    The invariance is mathematically exact, and in floating point as accurate as the
    solve: the difference grows with the condition number of F.
    """
    figure, (axis,) = new_figure(width=7.0, height=4.2)
    limit = 1e20
    for name, color, marker in (
        (_UNDAMPED, "natural gradient", "o"),
        (_OWN_UNDAMPED, "SGD", "x"),
    ):
        axis.loglog(
            np.minimum(natural[name].condition, limit),
            natural[name].largest,
            marker,
            color=COLORS[color],
            label=name,
        )
    condition = np.geomspace(1e3, 1 / _EPS, 50)
    axis.loglog(
        condition, STEPS * _EPS * condition, "--", color=COLORS["theory"], label=_BOUND
    )
    finish(
        axis,
        "How exact the invariance is in float64",
        f"largest condition number of F on the way (at most {limit:.0e} drawn)",
        "largest difference of the outputs",
    )
    return figure


INVARIANCE = claim_of(demonstrate)
