"""Training on a stream of batches, some of which have wrong labels.

A teacher network of the same shape labels new inputs, with the noise that the
likelihood assumes; with probability 0.1, a batch has wrong labels. The experiment
records how far the model moves in each step, measured on separate clean inputs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ngd_jax as ngd
from experiments.claims.networks import Layers, model_fn
from experiments.claims.steps import in_turn, train
from ngd_jax.likelihoods import Likelihood

__all__ = [
    "BATCH",
    "CLASSIFICATION",
    "HELD_OUT",
    "PROBABILITY",
    "REGRESSION",
    "SHIFT",
    "Run",
    "Task",
    "Watched",
    "draw",
    "watch",
]

BATCH, PROBABILITY, HELD_OUT = 32, 0.1, 500
# Size of a wrong label in regression, in standard deviations of the noise.
SHIFT = 50.0

_INPUTS, _HIDDEN, _CLASSES = 8, 16, 3
# So that the signal stands out from the noise.
_TEACHER_SCALE = 3.0

Data = dict[str, jax.Array]


class Task(NamedTuple):
    """A learning problem; the first two functions are NumPy, the last one JAX.

    Attributes:
      likelihood: of the outputs.
      outputs: number of outputs.
      label_fn: (generator, the teacher's outputs) -> labels.
      spoil_fn: labels -> the same number of labels, all wrong.
      error_fn: (the teacher's outputs, the network's) -> the test error.
    """

    likelihood: Likelihood
    outputs: int
    label_fn: Callable[[np.random.Generator, np.ndarray], np.ndarray]
    spoil_fn: Callable[[np.ndarray], np.ndarray]
    error_fn: Callable[[jax.Array, jax.Array], jax.Array]


class Stream(NamedTuple):
    """The data of a seed, with a leading axis of seeds if there are several.

    Attributes:
      start: the initial parameters.
      x: inputs, `[steps, BATCH, inputs]`.
      y: their labels.
      wrong: a wrong label for each of them.
      is_outlier: which batches contain wrong labels, `[steps]`.
      held_out: clean inputs.
      truth: the teacher's outputs on them.
    """

    start: Layers
    x: np.ndarray
    y: np.ndarray
    wrong: np.ndarray
    is_outlier: np.ndarray
    held_out: np.ndarray
    truth: np.ndarray


class Run(NamedTuple):
    """One training run; all fields are arrays.

    Attributes:
      seed: the index of its stream.
      bad_labels: number of wrong labels in an outlier batch; 0 for no outliers.
      max_norm: norm at which gradients are clipped; infinite for no clipping.
      max_kl: the radius; infinite for none.
    """

    seed: Any
    bad_labels: Any
    max_norm: Any = np.inf
    max_kl: Any = np.inf


class Watched(NamedTuple):
    """Records of training runs, `[runs, steps]` each.

    Attributes:
      kl: the mean KL of the step on held-out inputs, nats per example.
      kl_on_batch: the same on its own batch.
      error: the test error after the step.
    """

    kl: np.ndarray
    kl_on_batch: np.ndarray
    error: np.ndarray


def _with_noise(rng: np.random.Generator, outputs: np.ndarray) -> np.ndarray:
    return outputs + rng.normal(size=outputs.shape)


def _from_softmax(rng: np.random.Generator, logits: np.ndarray) -> np.ndarray:
    return np.argmax(logits + rng.gumbel(size=logits.shape), axis=-1)


REGRESSION = Task(
    likelihood=ngd.Gaussian(),
    outputs=1,
    label_fn=_with_noise,
    spoil_fn=lambda labels: labels + SHIFT,
    error_fn=lambda truth, outputs: jnp.mean((outputs - truth) ** 2),
)
CLASSIFICATION = Task(
    likelihood=ngd.Categorical(),
    outputs=_CLASSES,
    label_fn=_from_softmax,
    spoil_fn=lambda labels: (labels + 1) % _CLASSES,
    error_fn=lambda truth, outputs: ngd.Categorical().kl(truth, outputs).mean(),
)


def draw(task: Task, seeds: Sequence[int], steps: int) -> Stream:
    """The streams of these seeds; in NumPy, so that nothing must be compiled."""
    streams = [_draw_one(task, seed, steps) for seed in seeds]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *streams)


def watch(
    task: Task,
    tx_fn: Callable[[Run], optax.GradientTransformation],
    streams: Stream,
    runs: Run,
) -> Watched:
    """Trains once for each of `runs`."""

    def loss_fn(params: Layers, batch: Data) -> jax.Array:
        outputs = model_fn(params, batch)
        return -task.likelihood.log_prob(outputs, batch["y"]).mean()

    def one(run: Run, streams: Stream) -> Watched:
        stream = jax.tree.map(lambda leaf: leaf[run.seed], streams)
        # In outlier batches, replace the first `bad_labels` labels by wrong ones.
        is_wrong = stream.is_outlier[:, None] & (jnp.arange(BATCH) < run.bad_labels)
        is_wrong = is_wrong.reshape(*is_wrong.shape, *[1] * (stream.y.ndim - 2))
        batches = {"x": stream.x, "y": jnp.where(is_wrong, stream.wrong, stream.y)}
        clean = {"x": stream.held_out}

        def observe(
            before: Layers, after: Layers, _state: Any, batch: Data
        ) -> tuple[jax.Array, ...]:
            kl, kl_on_batch = (
                ngd.mean_kl(model_fn, before, after, data, task.likelihood)
                for data in (clean, batch)
            )
            return kl, kl_on_batch, task.error_fn(stream.truth, model_fn(after, clean))

        return Watched(*train(tx_fn(run), loss_fn, stream.start, batches, observe)[1])

    return in_turn(one, Run(*np.broadcast_arrays(*runs)), streams)


def _draw_one(task: Task, seed: int, steps: int) -> Stream:
    rng = np.random.default_rng(seed)

    def network(scale: float) -> Any:
        sizes = [(_INPUTS, _HIDDEN), (_HIDDEN, task.outputs)]
        hidden, out = (
            {"w": rng.normal(size=size) / size[0] ** 0.5, "b": np.zeros(size[1])}
            for size in sizes
        )
        return [hidden, {"w": scale * out["w"], "b": out["b"]}]

    start, teacher = network(1.0), network(_TEACHER_SCALE)

    def outputs_of(x: np.ndarray) -> np.ndarray:
        hidden, out = teacher
        return np.tanh(x @ hidden["w"] + hidden["b"]) @ out["w"] + out["b"]

    x = rng.normal(size=(steps, BATCH, _INPUTS))
    y = task.label_fn(rng, outputs_of(x))
    held_out = rng.normal(size=(HELD_OUT, _INPUTS))
    return Stream(
        start=start,
        x=x,
        y=y,
        wrong=task.spoil_fn(y),
        is_outlier=rng.random(steps) < PROBABILITY,
        held_out=held_out,
        truth=outputs_of(held_out),
    )
