"""What is timed: one gradient, Fisher products, whole steps, on multilayer perceptrons.

All of it goes through the public API, as in a user's program.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from hydra.core.global_hydra import GlobalHydra

import ngd_jax as ngd
from experiments.config import compose_config, read_config
from experiments.optimizers import make_optimizer
from experiments.tasks import make_task, num_examples
from experiments.training import init_state, make_train_chunk
from ngd_jax.flax import linen_model_fn

__all__ = [
    "Problem",
    "count_parameters",
    "make_problem",
    "products",
    "program_step",
    "train_step",
]


class Problem(NamedTuple):
    """A classifier at random parameters, with a random batch.

    Attributes:
      model_fn: (params, batch) -> logits.
      loss_fn: (params, batch) -> mean cross-entropy.
      params: the parameters.
      batch: {"x": inputs, "y": labels}.
      vector: a tree like `params` to multiply with.
    """

    model_fn: Callable[[Any, Any], jax.Array]
    loss_fn: Callable[[Any, Any], jax.Array]
    params: Any
    batch: dict[str, jax.Array]
    vector: Any


class _Perceptron(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths[:-1]:
            x = jnp.tanh(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


def make_problem(widths: Sequence[int], batch_size: int) -> Problem:
    """A tanh network of the given widths, inputs first and classes last."""
    key = jax.random.key(0)
    init_key, x_key, y_key, vector_key = jax.random.split(key, 4)
    module = _Perceptron(tuple(widths[1:]))
    batch = {
        "x": jax.random.normal(x_key, (batch_size, widths[0])),
        "y": jax.random.randint(y_key, (batch_size,), 0, widths[-1]),
    }
    params = module.init(init_key, batch["x"])["params"]

    model_fn = linen_model_fn(module)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        logits = model_fn(params, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses.mean()

    vector = optax.tree.random_like(vector_key, params)
    return Problem(model_fn, loss_fn, params, batch, vector)


def count_parameters(problem: Problem) -> int:
    """The number of scalars in the parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(problem.params))


def products(problem: Problem, count: int) -> Callable[[Any, Any, Any], Any]:
    """(params, batch, vector) -> F applied `count` times, linearised once."""

    def apply(params: Any, batch: Any, vector: Any) -> Any:
        fisher = ngd.linearize_fisher(
            problem.model_fn, params, batch, ngd.Categorical()
        )
        for _ in range(count):
            vector = fisher.matvec(vector)
        return vector

    return apply


def program_step(optimizer: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The jitted training step of `experiments.train optimizer=...`, and its arguments.

    It gathers its batches, takes several steps, and reports loss, accuracy and KL; the
    KL of optimizers that do not report their own is measured, as in the program.
    """
    GlobalHydra.instance().clear()  # of the benchmark's own configuration
    config = read_config(compose_config([f"optimizer={optimizer}"]))
    task = make_task(config.task)
    tx = make_optimizer(config.optimizer, task)
    train_chunk = make_train_chunk(
        task,
        tx,
        batch_size=config.batch_size or num_examples(task.train),
        steps_per_dispatch=config.steps_per_dispatch,
        measure_kl=True,
    )
    state = init_state(task, tx, config.seed)
    return train_chunk, (state, task.train, jnp.int32(config.steps_per_dispatch))


def train_step(
    problem: Problem, tx: optax.GradientTransformation
) -> tuple[Callable[..., Any], Any]:
    """(params, opt_state, batch) -> the next two and the loss; and an `opt_state`."""
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(problem.loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
        return optax.apply_updates(params, updates), opt_state, value

    return step, tx.init(problem.params)
