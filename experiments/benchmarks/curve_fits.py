"""The table of curve fits: correct digits from both starts of NIST's 27 problems.

Ours with its defaults, SciPy's MINPACK, and the Levenberg-Marquardt of Optimistix if it
is installed; the peers with exact derivatives and round-off tolerances. All in float64.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import leastsq

from experiments.benchmarks.markdown import Figure, Table
from experiments.benchmarks.nist import Regression, digits, load
from experiments.benchmarks.settings import CurveFitsSettings
from ngd_jax.contrib import curve_fit

__all__ = ["curve_fit_tables"]

_ENOUGH = 6.0  # digits
_MAX_STEPS = 10_000  # of the peers
_TOLERANCE = 1e-14

_Fit = Callable[[np.ndarray], tuple[Any, int]]
_NOTE = (
    "Digits are those of the worst parameter, 11 at most. MINPACK counts evaluations, "
    "the others steps. The first fit of a problem compiles; later ones are medians, "
    "of both starts. CPU times are sums over all problems."
)
_MISSING = "Optimistix is not installed (`pip install 'ngd-jax[nist_peer]'`)."


class _Outcome(NamedTuple):
    """Digits, steps, and CPU seconds of the first fit and of a later one."""

    digits: float
    steps: int
    first: float
    later: float


def curve_fit_tables(settings: CurveFitsSettings) -> list[Table]:
    """The individual fits, and their totals."""
    makers = {"ours": _ours, "MINPACK": _minpack}
    if importlib.util.find_spec("optimistix") is not None:
        makers["Optimistix"] = _optimistix
    rows, outcomes = [], {who: [] for who in makers}
    with jax.enable_x64(True):
        for name in settings.problems:
            problem = load(name)
            fits = {who: make(problem) for who, make in makers.items()}
            for number, start in enumerate(problem.starts, 1):
                cells = []
                for who, fit in fits.items():
                    outcome = _measure(problem, fit, start, settings.repeats)
                    outcomes[who].append(outcome)
                    cells += [f"{outcome.digits:.1f}", str(outcome.steps)]
                rows.append([name, problem.level, str(number), *cells])
    head = [cell for who in makers for cell in (f"{who}: digits", "steps")]
    missed = sum(found.digits < _ENOUGH for found in outcomes["ours"])
    notes = [_NOTE, *([] if "Optimistix" in makers else [_MISSING])]
    return [
        Table(
            "Certified digits of NIST's nonlinear regressions, float64",
            ["problem", "level", "start", *head],
            rows,
        ),
        Table(
            f"Totals of {len(rows)} fits",
            [
                "who",
                f"at least {_ENOUGH:.0f} digits",
                "fewest digits",
                "steps",
                "CPU s, first fits",
                "CPU s, later fits",
            ],
            [[who, *_totals(found)] for who, found in outcomes.items()],
            [Figure(f"Ours: fits with less than {_ENOUGH:.0f} digits", missed, 0)],
            notes,
        ),
    ]


def _totals(found: list[_Outcome]) -> list[str]:
    return [
        str(sum(one.digits >= _ENOUGH for one in found)),
        f"{min(one.digits for one in found):.1f}",
        str(sum(one.steps for one in found)),
        f"{sum(one.first for one in found):.1f}",
        f"{sum(one.later for one in found):.3f}",
    ]


def _measure(
    problem: Regression, fit: _Fit, start: np.ndarray, repeats: int
) -> _Outcome:
    seconds = []
    params, steps = np.full_like(start, np.nan), 0
    for _ in range(1 + repeats):
        began = time.process_time()
        params, steps = fit(start)
        seconds.append(time.process_time() - began)
    found = digits(params, problem.certified)
    return _Outcome(found, steps, seconds[0], float(np.median(seconds[1:])))


def _ours(problem: Regression) -> _Fit:
    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)

    def fit(start: np.ndarray) -> tuple[Any, int]:
        found = jax.block_until_ready(curve_fit(problem.f, x, y, start))
        return found.params, int(found.num_steps)

    return fit


def _residuals_of(problem: Regression) -> Callable[..., Any]:
    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)
    return lambda b, _=None: problem.f(x, *b) - y


def _minpack(problem: Regression) -> _Fit:
    """By `leastsq`, which `curve_fit` calls; it returns where the latter raises."""
    residuals = jax.jit(_residuals_of(problem))
    jacobian = jax.jit(jax.jacfwd(residuals))

    def fit(start: np.ndarray) -> tuple[Any, int]:
        found: Any = leastsq(
            lambda b: np.asarray(residuals(b)),
            start,
            Dfun=lambda b: np.asarray(jacobian(b)),
            full_output=True,
            ftol=_TOLERANCE,
            xtol=_TOLERANCE,
            gtol=_TOLERANCE,
            maxfev=_MAX_STEPS,
        )
        return found[0], found[2]["nfev"]

    return fit


def _optimistix(problem: Regression) -> _Fit:
    import optimistix  # pyright: ignore[reportMissingImports]

    solver = optimistix.LevenbergMarquardt(rtol=1e-10, atol=_TOLERANCE)
    residuals = _residuals_of(problem)

    @jax.jit
    def run(start: jax.Array) -> tuple[Any, Any]:
        found = optimistix.least_squares(
            residuals, solver, start, max_steps=_MAX_STEPS, throw=False
        )
        return found.value, found.stats["num_steps"]

    def fit(start: np.ndarray) -> tuple[Any, int]:
        params, steps = jax.block_until_ready(run(jnp.asarray(start)))
        return params, int(steps)

    return fit
