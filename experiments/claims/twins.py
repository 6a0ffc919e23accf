"""A sigmoid network and the same function as a tanh network, trained side by side.

    σ(x) = ½ (1 + tanh(x/2)),    so    T: W → W/2, b → b/2; V → V/2, c → c + ½ Σ V

maps the parameters of the first to those of the second, without changing the outputs. T
is linear, so the natural gradient of the second is T times that of the first and the
two remain the same function; the plain gradient is T⁻ᵀ times, and they drift apart.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from experiments.claims.networks import Layers, mlp, mlp_params
from experiments.claims.steps import in_turn, repeated, train

__all__ = [
    "POINTS",
    "RATE",
    "STEPS",
    "Drift",
    "Run",
    "drift",
    "drift_of_settings",
    "model_fn",
    "natural_gradient",
    "sigmoid_params_of",
    "starts",
    "tanh_params_of",
]

POINTS, STEPS, RATE = 400, 50, 0.1

_WIDTHS = [2, 3, 1]
_LIKELIHOOD = ngd.Gaussian()

Data = dict[str, jax.Array]


class Run(NamedTuple):
    """A start, and the settings of the natural gradient; all fields are arrays.

    Attributes:
      teacher: the parameters of the tanh network that generated the data.
      start: the initial parameters.
      rate: the learning rate.
      damping: λ.
      mapped: whether the damping of the tanh network is λ T⁻ᵀ T⁻¹ instead of λI.
      max_kl: the radius; infinite for none.
    """

    teacher: Any
    start: Any
    rate: Any = RATE
    damping: Any = 0.0
    mapped: Any = False
    max_kl: Any = np.inf


TxFn = Callable[[Run], optax.GradientTransformation]


class Drift(NamedTuple):
    """For every start: how far apart the networks are, and how well they learned.

    Attributes:
      difference: the largest difference of outputs, `[starts, steps]`.
      loss: of the tanh network after each step, `[starts, steps]`.
      condition: the largest condition number of its F along the path, `[starts]`; NaN
        if it was not requested.
    """

    difference: np.ndarray
    loss: np.ndarray
    condition: np.ndarray

    @property
    def largest(self) -> np.ndarray:
        """Largest difference over all steps; infinite if any is not a number."""
        return np.nan_to_num(self.difference, nan=np.inf, posinf=np.inf).max(1)


def tanh_params_of(sigmoid: Layers) -> Layers:
    """T: maps to the parameters with which a tanh network is the same function."""
    hidden, out = sigmoid
    return [
        {"w": hidden["w"] / 2, "b": hidden["b"] / 2},
        {"w": out["w"] / 2, "b": out["b"] + out["w"].sum(0) / 2},
    ]


def sigmoid_params_of(tanh: Layers) -> Layers:
    """T⁻¹."""
    hidden, out = tanh
    return [
        {"w": 2 * hidden["w"], "b": 2 * hidden["b"]},
        {"w": 2 * out["w"], "b": out["b"] - out["w"].sum(0)},
    ]


def model_fn(params: Layers, batch: Data) -> jax.Array:
    """Either network: the batch says which, so one compiled program runs both."""

    def activation(x: jax.Array) -> jax.Array:
        return jnp.where(batch["is_tanh"], jnp.tanh(x), jax.nn.sigmoid(x))

    return mlp(params, batch["x"], activation)


def starts(count: int) -> tuple[Run, Run]:
    """Starts near teachers, a different one for each, and random starts."""
    size = ravel_pytree(mlp_params(jax.random.key(0), _WIDTHS))[0].size
    teacher, noise = np.random.default_rng(1).normal(size=(2, count, size))
    return Run(teacher, teacher + 0.3 * noise), Run(teacher, noise)


def natural_gradient(run: Run) -> optax.GradientTransformation:
    """The optimizer for `run`; its numbers are arrays, so one program serves all."""

    def metric(vector: Layers) -> Layers:
        return _where(run.mapped, tanh_params_of(vector), vector)

    return ngd.natural_gradient(
        lambda _: run.rate,
        model_fn,
        _LIKELIHOOD,
        max_kl=lambda _: run.max_kl,
        damping=ngd.CovariantDamping(lambda _: run.damping, metric),
        solver=ngd.Cholesky(),
    )


def drift(tx_fn: TxFn, runs: Run, *, with_condition: bool) -> Drift:
    """Trains both networks from one function, for each of `runs`.

    Args:
      tx_fn: makes the optimizer of a run.
      runs: with one start in each row.
      with_condition: whether to compute the condition number of F.
    """
    _, unravel = ravel_pytree(mlp_params(jax.random.key(0), _WIDTHS))

    def observe(before: Layers, after: Layers, _state: Any, batch: Data) -> Any:
        seen = model_fn(after, batch), _loss_fn(after, batch)
        if not with_condition:
            return seen
        return *seen, ngd.dense_fisher(model_fn, before, batch, _LIKELIHOOD)

    def drift_of_one(run: Run, x: jax.Array) -> Any:
        batch = {"x": x, "is_tanh": jnp.asarray(True)}
        batch["y"] = model_fn(unravel(run.teacher), batch)

        def train_one(is_tanh: jax.Array) -> Any:
            tanh = unravel(run.start)
            params = _where(is_tanh, tanh, sigmoid_params_of(tanh))
            # The damping of the sigmoid network is always λI.
            tx = tx_fn(run._replace(mapped=run.mapped & is_tanh))
            batches = repeated(batch | {"is_tanh": is_tanh}, STEPS)
            return train(tx, _loss_fn, params, batches, observe)[1]

        outputs, *kept = jax.lax.map(train_one, jnp.asarray([False, True]))
        difference = jnp.abs(outputs[0] - outputs[1]).max((1, 2))
        return difference, *[leaf[1] for leaf in kept]

    x = jnp.asarray(np.random.default_rng(0).normal(size=(POINTS, _WIDTHS[0])))
    difference, loss, *fishers = in_turn(drift_of_one, _for_each_start(runs), x)
    unknown = np.full(len(loss), np.nan)
    return Drift(difference, loss, _condition(*fishers) if fishers else unknown)


def drift_of_settings(settings: dict[str, Run]) -> dict[str, Drift]:
    """The natural gradient with all settings from all starts, as one program.

    Args:
      settings: by name, each with its own starts.
    """
    full = [_for_each_start(runs) for runs in settings.values()]
    stacked = jax.tree.map(lambda *leaves: np.concatenate(leaves), *full)
    results = drift(natural_gradient, stacked, with_condition=True)
    ends = np.cumsum([len(runs.start) for runs in full])[:-1]
    parts = jax.tree.map(lambda leaf: np.split(leaf, ends), tuple(results))
    return {name: Drift(*part) for name, *part in zip(settings, *parts, strict=True)}


def _loss_fn(params: Layers, batch: Data) -> jax.Array:
    return jnp.mean((model_fn(params, batch) - batch["y"]) ** 2) / 2


def _for_each_start(runs: Run) -> Run:
    """Every field as an array with one entry for each start."""
    count = len(runs.start)
    return Run(*(leaf if np.ndim(leaf) else np.full(count, leaf) for leaf in runs))


def _condition(fishers: np.ndarray) -> np.ndarray:
    """The largest condition number along each path; infinite if F is singular."""
    is_finite = np.isfinite(fishers).all((-1, -2), keepdims=True)
    values = np.abs(np.linalg.eigvalsh(np.where(is_finite, fishers, 0.0)))
    smallest, largest = values.min(-1), values.max(-1)
    ratio = np.full(smallest.shape, np.inf)
    np.divide(largest, smallest, out=ratio, where=smallest > 0)
    return ratio.max(-1)


def _where(condition: Any, if_true: Layers, if_false: Layers) -> Layers:
    return jax.tree.map(lambda t, f: jnp.where(condition, t, f), if_true, if_false)
