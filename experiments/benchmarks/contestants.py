"""The functions to time: a gradient, Fisher products and whole steps, on perceptrons.

One output means regression with unit variance; several are logits of as many classes.

Everything goes through the public API, as in a user's program.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hydra.core.global_hydra import GlobalHydra

import ngd_jax as ngd
from experiments.benchmarks.clocks import operation_count
from experiments.running.config import compose_config, read_config
from experiments.running.optimizers import make_optimizer
from experiments.tasks import make_task, num_examples
from experiments.tasks.supervised.classification import MLP
from experiments.tasks.supervised.training import init_state, make_train_chunk
from ngd_jax.flax import linen_model_fn

__all__ = [
    "Problem",
    "check_taken",
    "count_parameters",
    "make_problem",
    "natural_step",
    "price_of_products",
    "products",
    "program_step",
    "train_step",
    "widths_of",
]


class Problem(NamedTuple):
    """A model at random parameters, with a random batch.

    Attributes:
      model_fn: (params, batch) -> outputs.
      likelihood: what the outputs mean.
      output_loss_fn: (outputs, batch) -> mean negative log-likelihood.
      params: the parameters.
      batch: {"x": inputs, "y": labels}.
      vector: a tree like `params` to multiply with.
    """

    model_fn: Callable[[Any, Any], jax.Array]
    likelihood: ngd.Likelihood
    output_loss_fn: Callable[[Any, Any], jax.Array]
    params: Any
    batch: dict[str, jax.Array]
    vector: Any

    def loss_fn(self, params: Any, batch: Any) -> jax.Array:
        """The loss as a function of the parameters."""
        return self.output_loss_fn(self.model_fn(params, batch), batch)

    def linearize(self, params: Any, batch: Any) -> ngd.Fisher:
        """The exact Fisher."""
        return ngd.linearize_fisher(self.model_fn, params, batch, self.likelihood)


_INPUTS = 32


def make_problem(widths: Sequence[int], batch_size: int) -> Problem:
    """A tanh network of the given widths, inputs first and outputs last."""
    # By NumPy: every shape that JAX draws is a program to compile.
    rng = np.random.default_rng(0)
    module = MLP(tuple(widths[1:]))
    x = jnp.asarray(rng.normal(size=(batch_size, widths[0])), jnp.float32)
    if widths[-1] == 1:
        likelihood, y = ngd.Gaussian(), rng.normal(size=(batch_size, 1))
        y = y.astype(np.float32)
    else:
        likelihood = ngd.Categorical()
        y = rng.integers(widths[-1], size=batch_size, dtype=np.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    vector, draws = (
        jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes
        )
        for _ in range(2)
    )
    params = jax.tree.map(
        lambda leaf: leaf / np.sqrt(len(leaf)) if leaf.ndim == 2 else 0 * leaf, draws
    )

    def output_loss_fn(outputs: jax.Array, batch: Any) -> jax.Array:
        return -likelihood.log_prob(outputs, batch["y"]).mean()

    return Problem(
        model_fn=linen_model_fn(module),
        likelihood=likelihood,
        output_loss_fn=output_loss_fn,
        params=params,
        batch={"x": x, "y": jnp.asarray(y)},
        vector=vector,
    )


def widths_of(cell: Sequence[int]) -> tuple[int, ...]:
    """Widths of a network for [P, N, K]: two equal hidden layers, about P parameters.

    With i inputs and width h, P = h² + (i + 2 + K) h + K.
    """
    num_parameters, _, num_outputs = cell
    linear = _INPUTS + 2 + num_outputs
    constant = num_outputs - num_parameters
    width = (math.sqrt(linear**2 - 4 * constant) - linear) / 2
    return (_INPUTS, max(1, round(width)), max(1, round(width)), num_outputs)


def count_parameters(problem: Problem) -> int:
    """The number of scalars in the parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(problem.params))


def products(problem: Problem, count: int) -> Callable[[Any, Any, Any], Any]:
    """(params, batch, vector) -> F applied `count` times, linearised once."""

    def apply(params: Any, batch: Any, vector: Any) -> Any:
        fisher = problem.linearize(params, batch)
        for _ in range(count):
            vector = fisher.matvec(vector)
        return vector

    return apply


def price_of_products(problem: Problem) -> tuple[float, float]:
    """Operations of a lone and of a further product, in gradients, as compiled."""
    args = (problem.params, problem.batch, problem.vector)
    gradient = operation_count(jax.value_and_grad(problem.loss_fn), *args[:2])
    once, twice = (operation_count(products(problem, k), *args) for k in (1, 2))
    return once / gradient, (twice - once) / gradient


def program_step(optimizer: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The jitted training step of `experiments.train optimizer=...`, and its arguments.

    It gathers its batches, takes several steps, and reports loss, accuracy and KL; the
    KL of optimizers that do not report their own is measured, as in the program.
    """
    GlobalHydra.instance().clear()  # it holds the benchmark's own configuration
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
    """(params, opt_state, batch) -> new params, new state, loss; and an `opt_state`."""
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(problem.loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
        return optax.apply_updates(params, updates), opt_state, value

    return step, tx.init(problem.params)


def check_taken(opt_state: Any) -> ngd.NaturalGradientInfo:
    """Returns the report of a step.

    Raises:
      RuntimeError: the step was refused, so that its cost means nothing.
    """
    info = optax.tree.get(opt_state, "NaturalGradientInfo")
    status = ngd.StepStatus(int(info.status))
    if not status.is_taken:
        raise RuntimeError(status.message)
    return info


def natural_step(
    problem: Problem, solver: ngd.Solver, *, damping: float = 1e-3
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A training step to the radius 1e-2, and its arguments."""
    tx = ngd.natural_gradient(
        None,
        problem.model_fn,
        problem.likelihood,
        max_kl=1e-2,
        damping=damping,
        solver=solver,
        loss_fn=problem.output_loss_fn if solver.uses_coefficients else None,
    )
    step, opt_state = train_step(problem, tx)
    return step, (problem.params, opt_state, problem.batch)
