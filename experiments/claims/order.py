"""The order of the examples matters less.

    Vₖ = E over new segments k of Var(outputs after training),    k = 1 … S

A network learns online, seeing each example once. The stream is cut into segments; one
of them is drawn several times, while the others stay the same. The resulting variance
of the outputs is the influence of that segment.

Claimed: What a network learns online depends on the order of its examples, above all
the early ones; under the natural gradient it depends on it less.

Verdict: Reproduced at equal held-out loss: all segments together have less influence
under the natural gradient than under SGD, and so do the first and the last one. Equal
loss is a necessary condition: with its largest radius, the natural gradient learns
more, and depends on the first examples as much as SGD does. Adam is not far behind:
what helps is a step that is adapted to the curvature, and a diagonal does part of that.

Source: Pascanu and Bengio 2014, Revisiting natural gradient for deep networks

Note: It is important to compare at equal loss: with a smaller rate or radius, every
optimizer depends less on the order, and learns less. The last segment has the largest
influence under all of them, since nothing comes after it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import ngd_jax as ngd
from experiments.benchmarks.markdown import Table
from experiments.claims.claim import Evidence, check, literature
from experiments.claims.drawing import COLORS, finish, new_figure
from experiments.claims.networks import Layers, digits, mlp_params, model_fn
from experiments.claims.texts import claim_of, described, drawn, notes

__all__ = ["ORDER"]

_LIKELIHOOD = ngd.Categorical()
_BATCH_SIZE, _HELD_OUT, _NOISE = 32, 500, 0.1
_TRAINING_IMAGES = 1297


class _Sizes(NamedTuple):
    """The size of the experiment.

    Attributes:
      segments: S.
      steps: number of steps in a segment, each on its own batch.
      draws: number of draws of each segment.
      seeds: number of seeds, for initial parameters and streams.
    """

    segments: int
    steps: int
    draws: int
    seeds: int


class _Contestant(NamedTuple):
    """An optimizer, with the setting that determines how far it goes.

    Attributes:
      name: in words.
      setting: the name of the setting.
      values: the values of the setting.
      make: makes the optimizer from a value.
    """

    name: str
    setting: str
    values: Sequence[float]
    make: Callable[[Any], optax.GradientTransformation]


class _Result(NamedTuple):
    """The result of a contestant; the leading axis is over its settings.

    Attributes:
      loss: final loss on held-out examples, in nats.
      influence: of each segment, `[settings, S]`.
    """

    loss: np.ndarray
    influence: np.ndarray


def _loss_fn(params: Layers, batch: dict[str, jax.Array]) -> jax.Array:
    return -_LIKELIHOOD.log_prob(model_fn(params, batch), batch["y"]).mean()


def _natural(radius: Any) -> optax.GradientTransformation:
    return ngd.natural_gradient(
        None,
        model_fn,
        _LIKELIHOOD,
        max_kl=radius,
        damping=1e-2,
        solver=ngd.CG(max_steps=10),
    )


_CONTESTANTS = (
    _Contestant("SGD", "rate", (0.2, 0.5, 1.0), optax.sgd),
    _Contestant("Adam", "rate", (3e-3, 1e-2, 2e-2), optax.adam),
    _Contestant("natural gradient", "radius", (1e-3, 3e-3, 1e-2), _natural),
)


def demonstrate(quick: bool) -> Evidence:
    """Online learning of distorted digits by three optimizers.

    Digits with noise, shifted by up to a pixel, in a stream of {examples:,} examples
    that are each seen once, in {sizes.segments} segments of {sizes.steps} batches of
    {_BATCH_SIZE}. A 64-32-10 tanh network, float32. Each segment is redrawn
    {sizes.draws} times; the influence is the variance of the probabilities on
    {_HELD_OUT} held-out images, summed over classes, averaged over {sizes.seeds} seeds.
    Every optimizer runs with several settings, and the influences are compared at equal
    held-out loss.
    """
    sizes = _Sizes(5, 20, 3, 1) if quick else _Sizes(10, 30, 5, 2)
    contestants = _CONTESTANTS
    if quick:
        sgd, _, natural = contestants
        contestants = (
            sgd._replace(values=sgd.values[2:]),
            natural._replace(values=natural.values[:2]),
        )
    found = {each.name: _measure(each, sizes) for each in contestants}
    # Compare at the loss of the best run of plain gradient descent.
    best = int(np.argmin(found["SGD"].loss))
    loss, plain = found["SGD"].loss[best], found["SGD"].influence[best]
    natural = _at_loss(found["natural gradient"], loss)
    total, first, last = (
        natural.sum() / plain.sum(),
        natural[0] / plain[0],
        natural[-1] / plain[-1],
    )
    paper = "Pascanu and Bengio 2014, section 7"
    return Evidence(
        headline=(
            f"at the loss of the best SGD run, the influence of all segments together "
            f"is {total:.2f} times that under SGD; for the first segment {first:.2f} "
            f"times, for the last {last:.2f} times"
        ),
        setup=described(
            demonstrate,
            examples=sizes.segments * sizes.steps * _BATCH_SIZE,
            sizes=sizes,
        ),
        checks=[
            check(
                "influence of all segments, natural gradient over SGD",
                total,
                literature(None, 1, paper),
            ),
            check(
                "influence of the first segment, natural gradient over SGD",
                first,
                literature(None, 1, paper),
            ),
        ],
        tables=[_tabulate(contestants, found)],
        plots=[drawn("order", _draw, found, loss, sizes)],
        notes=notes(demonstrate),
    )


def _measure(contestant: _Contestant, sizes: _Sizes) -> _Result:
    images = digits(1797)
    training = {name: leaf[:_TRAINING_IMAGES] for name, leaf in images.items()}
    rest = {name: leaf[_TRAINING_IMAGES:] for name, leaf in images.items()}
    held_out = _draw_examples(np.random.default_rng(0), rest, (_HELD_OUT,))
    # For each segment: the draws to compare, and one to use by default.
    shape = (sizes.segments * (sizes.draws + 1), sizes.steps, _BATCH_SIZE)
    streams = [
        _draw_examples(np.random.default_rng([1, seed]), training, shape)
        for seed in range(sizes.seeds)
    ]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *streams)
    values = np.asarray(contestant.values, np.float32)
    run = jax.jit(functools.partial(_run_all, contestant.make, sizes))
    loss, influence = run(values, np.arange(sizes.seeds), stacked, held_out)
    return _Result(np.asarray(loss), np.asarray(influence))


def _run_all(
    make: Callable[[Any], optax.GradientTransformation],
    sizes: _Sizes,
    values: jax.Array,
    seeds: jax.Array,
    streams: dict[str, jax.Array],
    held_out: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Loss and influences for each setting, over all seeds, segments and draws."""

    def learn(value: Any, params: Layers, stream: Any, chosen: jax.Array) -> Any:
        tx = optax.with_extra_args_support(make(value))

        def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
            params, state = carry
            where = chosen[index // sizes.steps], index % sizes.steps
            batch = jax.tree.map(lambda leaf: leaf[where], stream)
            grads = jax.grad(_loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), None

        count = jnp.arange(sizes.segments * sizes.steps)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), count)
        outputs = model_fn(params, held_out)
        return jax.nn.softmax(outputs), _loss_fn(params, held_out)

    def run_seed(value: Any, seed: jax.Array, stream: Any) -> tuple[Any, Any]:
        params = mlp_params(jax.random.key(seed), [64, 32, 10])
        first = jnp.arange(sizes.segments) * (sizes.draws + 1)
        usual = first + sizes.draws

        def run_draw(segment: jax.Array, draw: jax.Array) -> tuple[Any, Any]:
            chosen = usual.at[segment].set(first[segment] + draw)
            return learn(value, params, stream, chosen)

        each_draw = jax.vmap(run_draw, in_axes=(None, 0))
        probabilities, losses = jax.vmap(each_draw, in_axes=(0, None))(
            jnp.arange(sizes.segments), jnp.arange(sizes.draws)
        )
        variance = probabilities.var(1, ddof=1)  # [segments, examples, classes]
        return losses.mean(), variance.sum(-1).mean(-1)

    each_seed = jax.vmap(run_seed, in_axes=(None, 0, 0))
    losses, influences = jax.vmap(each_seed, in_axes=(0, None, None))(
        values, seeds, streams
    )
    return losses.mean(1), influences.mean(1)


def _draw_examples(
    rng: np.random.Generator, images: dict[str, jax.Array], shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Pictures `[*shape, 64]` and labels: digits shifted by a pixel, with noise."""
    pictures, labels = (np.asarray(images[name]) for name in ("x", "y"))
    which = rng.integers(len(labels), size=shape)
    drawn = pictures[which].reshape(*shape, 8, 8)
    for axis in (-2, -1):
        shifts = rng.integers(-1, 2, size=(*shape, 1, 1))
        for shift in (-1, 1):
            drawn = np.where(shifts == shift, np.roll(drawn, shift, axis), drawn)
    drawn = drawn + _NOISE * rng.normal(size=drawn.shape)
    return {
        "x": drawn.reshape(*shape, 64).astype(np.float32),
        "y": labels[which].astype(np.int32),
    }


def _at_loss(result: _Result, loss: float) -> np.ndarray:
    """The influences at a given loss, interpolated between two settings.

    Outside the range of losses, those of the nearest setting.
    """
    order = np.argsort(result.loss)
    logs = np.log(result.influence[order])
    return np.exp([np.interp(loss, result.loss[order], column) for column in logs.T])


def _tabulate(contestants: Sequence[_Contestant], found: dict[str, _Result]) -> Table:
    rows = [
        [
            each.name,
            f"{each.setting} {value:g}",
            f"{loss:.3f}",
            f"{influence.sum():.2e}",
            f"{influence[0]:.1e}",
            f"{influence[len(influence) // 2]:.1e}",
            f"{influence[-1]:.1e}",
        ]
        for each in contestants
        for value, loss, influence in zip(each.values, *found[each.name], strict=True)
    ]
    return Table(
        "Held-out loss and influence of the segments",
        ["optimizer", "setting", "loss, nats", "all", "first", "middle", "last"],
        rows,
    )


def _draw(found: dict[str, _Result], loss: float, sizes: _Sizes) -> Figure:
    """Draws `order`.

    Left: influence of all segments over the final loss, with a point for each setting;
    lower left is better. Right: the influence of each segment, for each optimizer with
    the setting whose loss is closest to that of the best SGD run.
    """
    figure, (left, right) = new_figure(2, width=9.0, height=3.8)
    segments = np.arange(1, sizes.segments + 1)
    for (name, result), marker in zip(found.items(), "os^", strict=False):
        line, color = f"{marker}-", COLORS[name]
        left.plot(result.loss, result.influence.sum(1), line, color=color, label=name)
        nearest = int(np.argmin(np.abs(result.loss - loss)))
        label = f"{name}, loss {result.loss[nearest]:.2f}"
        right.plot(segments, result.influence[nearest], line, color=color, label=label)
    left.set_yscale("log")
    right.set_yscale("log")
    right.set_xticks(segments)
    finish(
        left,
        "Influence of the order",
        "held-out loss after training (nats)",
        "variance of the probabilities",
    )
    finish(
        right,
        "By the segment that is drawn anew",
        "segment",
        "variance of the probabilities",
    )
    return figure


ORDER = claim_of(demonstrate, x64=False)
