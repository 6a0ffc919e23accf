"""The nonlinear regressions of NIST, with certified results and two starts each.

Statistical Reference Datasets of the National Institute of Standards and Technology,
in the public domain: 27 problems. `nist.json` beside this file has the data, the
starts, and the certified parameters, standard deviations and sums of squares, to eleven
digits. The models are here, as functions f(x, *b).
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["NAMES", "Regression", "digits", "load"]


class Regression(NamedTuple):
    """One problem.

    Attributes:
      f: the curve, f(x, *b) -> `[M]`.
      x: `[M]`, or `[K, M]` for K predictors.
      y: `[M]`.
      starts: two of them, `[2, P]`, the second nearer.
      certified: the parameters, `[P]`.
      deviations: their standard deviations.
      residual_sum: the sum of squares.
      level: lower, average or higher: the intended difficulty.
    """

    f: Callable[..., jax.Array]
    x: np.ndarray
    y: np.ndarray
    starts: np.ndarray
    certified: np.ndarray
    deviations: np.ndarray
    residual_sum: float
    level: str


def digits(params: Any, certified: np.ndarray) -> float:
    """Correct digits of the worst parameter, -log₁₀ of its relative error; at most 11.

    The certified values have no more digits. A value that is not finite has none.
    """
    error = np.max(np.abs(np.asarray(params) / certified - 1))
    return float(-np.log10(max(error, 1e-11))) if np.isfinite(error) else -np.inf


def load(name: str) -> Regression:
    """One of `NAMES`."""
    case = _cases()[name]
    x, y = np.array(case["x"]), np.array(case["y"])
    return Regression(
        f=_MODELS[name],
        x=x[0] if len(x) == 1 else x,
        y=np.log(y) if name == "Nelson" else y,  # its model is for log y
        starts=np.array(case["starts"]),
        certified=np.array(case["certified"]),
        deviations=np.array(case["deviations"]),
        residual_sum=case["residual_sum"],
        level=case["level"],
    )


@functools.cache
def _cases() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("nist.json").read_text())


def _saturation(x: Any, a: Any, rate: Any) -> Any:
    return a * (1 - jnp.exp(-rate * x))


def _chwirut(x: Any, a: Any, b: Any, c: Any) -> Any:
    return jnp.exp(-a * x) / (b + c * x)


def _peak(x: Any, height: Any, center: Any, width: Any) -> Any:
    return height * jnp.exp(-(((x - center) / width) ** 2))


def _gauss(x: Any, *b: Any) -> Any:
    return b[0] * jnp.exp(-b[1] * x) + _peak(x, *b[2:5]) + _peak(x, *b[5:8])


def _cubics(x: Any, *b: Any) -> Any:
    above = b[0] + x * (b[1] + x * (b[2] + x * b[3]))
    return above / (1 + x * (b[4] + x * (b[5] + x * b[6])))


def _lanczos(x: Any, *b: Any) -> Any:
    terms = zip(b[::2], b[1::2], strict=True)
    return sum(a * jnp.exp(-rate * x) for a, rate in terms)


def _enso(x: Any, *b: Any) -> Any:
    def wave(period: Any, cosine: Any, sine: Any) -> Any:
        phase = 2 * jnp.pi * x / period
        return cosine * jnp.cos(phase) + sine * jnp.sin(phase)

    return b[0] + wave(12, b[1], b[2]) + wave(*b[3:6]) + wave(*b[6:9])


_MODELS: dict[str, Callable[..., Any]] = {
    "Bennett5": lambda x, a, b, c: a * (b + x) ** (-1 / c),
    "BoxBOD": _saturation,
    "Chwirut1": _chwirut,
    "Chwirut2": _chwirut,
    "DanWood": lambda x, a, b: a * x**b,
    "ENSO": _enso,
    "Eckerle4": lambda x, a, b, c: a / b * jnp.exp(-(((x - c) / b) ** 2) / 2),
    "Gauss1": _gauss,
    "Gauss2": _gauss,
    "Gauss3": _gauss,
    "Hahn1": _cubics,
    "Kirby2": lambda x, *b: (
        (b[0] + x * (b[1] + x * b[2])) / (1 + x * (b[3] + x * b[4]))
    ),
    "Lanczos1": _lanczos,
    "Lanczos2": _lanczos,
    "Lanczos3": _lanczos,
    "MGH09": lambda x, a, b, c, d: a * (x**2 + x * b) / (x**2 + x * c + d),
    "MGH10": lambda x, a, b, c: a * jnp.exp(b / (x + c)),
    "MGH17": lambda x, *b: b[0] + b[1] * jnp.exp(-x * b[3]) + b[2] * jnp.exp(-x * b[4]),
    "Misra1a": _saturation,
    "Misra1b": lambda x, a, b: a * (1 - (1 + b * x / 2) ** -2),
    "Misra1c": lambda x, a, b: a * (1 - (1 + 2 * b * x) ** -0.5),
    "Misra1d": lambda x, a, b: a * b * x / (1 + b * x),
    "Nelson": lambda x, a, b, c: a - b * x[0] * jnp.exp(-c * x[1]),
    "Rat42": lambda x, a, b, c: a / (1 + jnp.exp(b - c * x)),
    "Rat43": lambda x, a, b, c, d: a / (1 + jnp.exp(b - c * x)) ** (1 / d),
    "Roszman1": lambda x, a, b, c, d: a - b * x - jnp.arctan(c / (x - d)) / jnp.pi,
    "Thurber": _cubics,
}

NAMES = tuple(_MODELS)
