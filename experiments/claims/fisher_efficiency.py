"""Online natural gradient is Fisher efficient.

    θ_t+1 = θ_t - F⁻¹g_t / (t + 20),    t·E‖θ_t - θ*‖²_F → d

No unbiased estimate from t examples has a smaller error than d / t (Cramér and Rao).
For linear regression on Gaussian inputs, the error at every step is also known in
closed form, and the experiment is checked against it.

Claimed: Natural gradient with the rate 1/t, seeing each example once, ends up as close
to the truth as the best unbiased estimate from all of them.

Verdict: True in the limit, t·E‖θ - θ*‖²_F → d, with the F of the population and the
rate 1/t. SGD with the same rate falls behind by the condition number; averaged SGD has
the same limit, but gets there later.

Source: Amari 1998, Natural gradient works efficiently in learning

Note: The average of the iterates of SGD has the same limit without F, if its rate falls
more slowly than 1/t (Polyak and Juditsky 1992); with a constant rate, as here, up to an
error of the order of that rate. It takes longer to get there: in the slowest direction,
it forgets its start after about 1 / (rate · smallest eigenvalue) = {memory:.0f} steps.

Note: The rate must be 1/t in the limit: a rate c/t has the limit c²d / (2c - 1), which
is smallest at c = 1. And F must be that of the population: here it comes from six
points whose second moments are those of the inputs.

Note: Measured before, independently: 5.97 at t = 3000, with 4,000 runs; their start was
not recorded. The standard error of 4,000 runs is 0.055.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import ngd_jax as ngd
from experiments.benchmarks.markdown import Table
from experiments.claims.claim import Check, Evidence, check, literature, theory
from experiments.claims.drawing import COLORS, finish, new_figure
from experiments.claims.texts import claim_of, described, drawn, notes

__all__ = ["FISHER_EFFICIENCY"]

_LIKELIHOOD = ngd.Gaussian()
_EIGENVALUES = 200.0 ** -np.linspace(0, 1, 6)  # of the covariance of the inputs
_DIMENSION = len(_EIGENVALUES)
# The rate 1 / (t + 20) is that of a running mean after 20 examples, so the runs start
# like that: around the truth, with the error that 20 examples would leave.
_HEAD_START = 20
_KEY_SEED = 0
_STANDARD_ERRORS = 4.0
_CONSTANT_RATE = 0.2


class Method(NamedTuple):
    """A method that uses one example at a time.

    Attributes:
      name: as shown to the reader.
      color: a key of `COLORS`.
      rate: rate[t] of the step after t examples, an array.
      eigenvalues: of the covariance of the inputs as the method sees them; for the
        natural gradient those of F⁻¹C, so all 1.
    """

    name: str
    color: str
    rate: np.ndarray
    eigenvalues: np.ndarray


def methods(steps: int) -> tuple[Method, Method, Method]:
    """Natural gradient, SGD at the same rates, SGD at rates for its slowest direction.

    The last has the rate 1/t that the direction of the smallest eigenvalue needs; it
    starts late enough to be stable.
    """
    t = np.arange(1, steps + 1)
    fastest = 1 / _EIGENVALUES.min()
    return (
        Method(
            "natural gradient, rate 1/(t + 20)",
            "natural gradient",
            1 / (t + _HEAD_START),
            np.ones(_DIMENSION),
        ),
        Method("SGD, rate 1/(t + 20)", "SGD", 1 / (t + _HEAD_START), _EIGENVALUES),
        Method(
            f"SGD, rate {fastest:.0f}/(t + {5 * fastest:.0f})",
            "SGD, clipped",
            fastest / (t + 5 * fastest),
            _EIGENVALUES,
        ),
    )


def expected_errors(method: Method, start: np.ndarray) -> np.ndarray:
    """E‖θ_t - θ*‖²_F for t = 1, 2, ...: the exact second moments, step by step.

    With a = θ - θ* and a ← a - η (x xᵀ a - x ε), for Gaussian x of covariance C in the
    coordinates of its eigenvectors, E (x xᵀ) A (x xᵀ) = 2 C A C + tr(C A) C gives

        mᵢ ← mᵢ - 2ηλᵢ mᵢ + η² (2λᵢ² mᵢ + λᵢ Σⱼ λⱼ mⱼ) + η² λᵢ,    mᵢ = E aᵢ²

    Args:
      method: the rates η and the eigenvalues λ.
      start: λᵢ mᵢ before the first step: the contribution of each direction to the
        error.
    """
    scales = method.eigenvalues
    moments = start / scales
    errors = []
    for rate in method.rate:
        error = scales @ moments
        spread = 2 * scales**2 * moments + scales * (error + 1)
        moments = moments - 2 * rate * scales * moments + rate**2 * spread
        errors.append(scales @ moments)
    return np.array(errors)


def model_fn(params: jax.Array, x: jax.Array) -> jax.Array:
    """All runs as one linear model: `[examples, d]` and `[d, runs]`."""
    return x @ params


def natural_gradient(rate: np.ndarray) -> optax.GradientTransformationExtraArgs:
    """F is C for every run, so one solve of d steps serves all of them."""
    return ngd.natural_gradient(
        lambda count: jnp.asarray(rate)[count],
        model_fn,
        _LIKELIHOOD,
        damping=0.0,
        solver=ngd.CG(max_steps=2 * _DIMENSION, rtol=1e-8),
    )


def simulate(key: jax.Array, runs: int, steps: int) -> np.ndarray:
    """The mean of ‖θ_t - θ*‖²_F over the runs, and its standard error: `[2, t, 4]`.

    For t = 1, 2, ... and for each of `methods`, then for the average of the iterates of
    SGD at a constant rate.
    """
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(_DIMENSION,) * 2))[0]
    root = jnp.asarray(basis * np.sqrt(_EIGENVALUES))  # x = root z, C = root rootᵀ
    # Examples whose second moments are exactly C: the F of the population.
    points = np.sqrt(_DIMENSION) * root.T
    natural, same, late = methods(steps)
    txs = (
        natural_gradient(natural.rate),
        optax.sgd(lambda count: jnp.asarray(same.rate)[count]),
        optax.sgd(lambda count: jnp.asarray(late.rate)[count]),
        optax.sgd(_CONSTANT_RATE),
    )
    txs = [optax.with_extra_args_support(tx) for tx in txs]

    def loss_fn(params: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        """Each run has its own example."""
        return 0.5 * jnp.sum((jnp.sum(x * params, axis=0) - y) ** 2)

    def error(params: jax.Array) -> jax.Array:
        return jnp.sum((root.T @ (params - truth)) ** 2, axis=0)

    def step(carry: Any, xs: Any) -> Any:
        all_params, states, mean = carry
        count, key = xs
        input_key, noise_key = jax.random.split(key)
        x = root @ jax.random.normal(input_key, (_DIMENSION, runs))
        y = jnp.sum(x * truth, axis=0) + jax.random.normal(noise_key, (runs,))
        moved, new_states = [], []
        for tx, params, state in zip(txs, all_params, states, strict=True):
            grads = jax.grad(loss_fn)(params, x, y)
            updates, state = tx.update(grads, state, params, batch=points)
            moved.append(optax.apply_updates(params, updates))
            new_states.append(state)
        mean = mean + (moved[-1] - mean) / (count + 1)
        errors = jnp.stack([error(params) for params in (*moved[:-1], mean)])
        return (moved, new_states, mean), (errors.mean(1), errors.std(1))

    truth_key, start_key, run_key = jax.random.split(key, 3)
    truth = jax.random.normal(truth_key, (_DIMENSION, 1))
    offset = jax.random.normal(start_key, (_DIMENSION, runs)) / np.sqrt(_HEAD_START)
    start = truth + jnp.linalg.solve(root.T, offset)

    @jax.jit
    def run(start: jax.Array, keys: jax.Array) -> Any:
        carry = ([start] * len(txs), [tx.init(start) for tx in txs], start)
        return jax.lax.scan(step, carry, (jnp.arange(steps), keys))[1]

    means, deviations = run(start, jax.random.split(run_key, steps))
    return np.stack([means, deviations / np.sqrt(runs)])


def demonstrate(quick: bool) -> Evidence:
    """Many runs at once, each with its own examples.

    Online linear regression with one Gaussian example per step, d = {_DIMENSION},
    covariance of condition {condition:.0f}, noise of unit variance; {runs:,} runs of
    {steps:,} steps, each on its own examples, float64. All start with the error that
    {_HEAD_START} examples would leave. ‖·‖²_F is twice the KL in nats.
    """
    runs, steps = (1000, 600) if quick else (4000, 3000)
    means, errors = simulate(jax.random.key(_KEY_SEED), runs, steps)
    t = np.arange(1, steps + 1)
    scaled, uncertain = (np.asarray(x).T * t for x in (means, errors))
    start = np.full(_DIMENSION, 1 / _HEAD_START)
    exact = np.stack([expected_errors(m, start) * t for m in methods(steps)])
    names = [method.name for method in methods(steps)]

    checks: list[Check] = [
        check(
            f"{name}: t·E‖θ - θ*‖²_F at t = {steps}",
            scaled[index, -1],
            theory(
                float(exact[index, -1] - _STANDARD_ERRORS * uncertain[index, -1]),
                float(exact[index, -1] + _STANDARD_ERRORS * uncertain[index, -1]),
                f"exact second moments, ± {_STANDARD_ERRORS:g} standard errors",
            ),
        )
        for index, name in enumerate(names)
    ]
    checks.append(
        check(
            f"natural gradient: the exact value at t = {steps} over d",
            exact[0, -1] / _DIMENSION,
            literature(0.98, 1.02, "goes to 1 as t grows (Amari 1998)"),
        )
    )
    shown = np.unique(np.geomspace(30, steps, 5).round().astype(int))
    labels = [*names, f"average of SGD, rate {_CONSTANT_RATE:g}"]
    rows = [
        [str(count)]
        + [
            f"{values[count - 1]:.2f} ± {error[count - 1]:.2f}"
            for values, error in zip(scaled, uncertain, strict=True)
        ]
        for count in shown
    ]
    table = Table("t·E‖θ - θ*‖²_F, with its standard error", ["t", *labels], rows)
    return Evidence(
        headline=(
            f"t·E‖θ - θ*‖²_F = {scaled[0, -1]:.2f} ± {uncertain[0, -1]:.2f} at t = "
            f"{steps} for d = {_DIMENSION}; SGD {scaled[1, -1]:.0f} at the same rate, "
            f"{scaled[2, -1]:.0f} at a rate for its slowest direction"
        ),
        setup=described(
            demonstrate, condition=1 / _EIGENVALUES.min(), runs=runs, steps=steps
        ),
        checks=checks,
        tables=[table],
        plots=[drawn("fisher_efficiency", _draw, t, scaled, uncertain, exact, labels)],
        notes=notes(demonstrate, memory=1 / (_CONSTANT_RATE * _EIGENVALUES.min())),
    )


def _draw(
    t: np.ndarray,
    scaled: np.ndarray,
    uncertain: np.ndarray,
    exact: np.ndarray,
    labels: list[str],
) -> Figure:
    """Draws `fisher_efficiency`.

    The error times the number of examples, over that number. The natural gradient
    approaches d = 6, the smallest value for any unbiased estimate (and from below,
    since it starts with the error that 20 examples would leave). Dotted: the exact
    expectation.
    """
    figure, (axis,) = new_figure(width=8.0, height=4.6)
    colors = [COLORS[method.color] for method in methods(1)] + [COLORS["Adam"]]
    for values, error, color, label in zip(
        scaled, uncertain, colors, labels, strict=True
    ):
        axis.loglog(t, values, color=color, label=label)
        axis.fill_between(
            t, values - 2 * error, values + 2 * error, color=color, alpha=0.2
        )
    for values in exact:
        axis.loglog(t, values, ":", color="black", linewidth=1)
    axis.axhline(_DIMENSION, color=COLORS["theory"], linestyle="--")
    axis.text(1.1 * t[0], 1.07 * _DIMENSION, f"Cramér-Rao: d = {_DIMENSION}")
    axis.set_xlim(t[0], t[-1])
    finish(
        axis,
        "What an example is worth",
        "examples seen, t",
        "t · mean of ‖θ - θ*‖²_F (twice the KL in nats)",
    )
    return figure


FISHER_EFFICIENCY = claim_of(demonstrate)
