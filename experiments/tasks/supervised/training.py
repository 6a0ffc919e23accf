"""The training step, many per dispatch: one jitted function with donated state.

    batch(step) -> loss, gradient -> tx.update -> params        for num_steps steps

On a mesh, each device takes its part of the examples of every batch; parameters and
everything else are replicated. XLA's partitioner adds the sums between devices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import ngd_jax as ngd
from experiments.running.dispatch import fix_types, match_types, take_steps
from experiments.running.distributed import (
    place_examples,
    replicated,
    split_examples,
)
from experiments.running.optimizers import read_step_info, take_step
from experiments.tasks import Task, num_examples
from experiments.tasks.supervised.batches import (
    epoch_and_position,
    epoch_permutation,
    take_batch,
)

__all__ = ["TrainState", "init_state", "make_evaluate_fn", "make_train_chunk"]

# Folded into the key for the order of the batches. Epochs fold in their numbers, which
# never reach this one.
NOISE_STREAM = 2**31 - 1

PyTree = Any
Records = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that the next step needs, and thus everything in a checkpoint.

    Attributes:
      step: int32, steps taken.
      key: typed PRNG key for the order of the batches.
      params: parameters of the model.
      model_state: other state of the model (running averages); often empty.
      opt_state: state of the optimizer.
    """

    step: jax.Array
    key: jax.Array
    params: PyTree
    model_state: PyTree
    opt_state: PyTree


def init_state(
    task: Task,
    tx: optax.GradientTransformationExtraArgs,
    seed: int,
    *,
    mesh: Mesh | None = None,
) -> TrainState:
    """Returns the state before the first step; all randomness comes from `seed`.

    It is on every device of `mesh`, or on the default device.
    """
    init_key, data_key = jax.random.split(jax.random.key(seed))

    def init(init_key: jax.Array, data_key: jax.Array) -> TrainState:
        params, model_state = task.init_fn(init_key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            key=data_key,
            params=params,
            model_state=model_state,
            opt_state=tx.init(params),
        )

    # Under jit every leaf gets a buffer of its own, as donation requires; weak types
    # are removed, since a checkpoint would not restore them.
    init = jax.jit(init, out_shardings=replicated(mesh))
    return fix_types(init(init_key, data_key))


def make_train_chunk(
    task: Task,
    tx: optax.GradientTransformationExtraArgs,
    *,
    batch_size: int,
    steps_per_dispatch: int,
    measure_kl: bool,
    mesh: Mesh | None = None,
    is_streamed: bool = False,
) -> jax.stages.Wrapped:
    """Builds the jitted function that takes up to `steps_per_dispatch` steps.

    Args:
      task: the problem.
      tx: the optimizer.
      batch_size: examples in a batch; at most the size of the training set.
      steps_per_dispatch: capacity of one dispatch.
      measure_kl: whether to measure the KL of each step for optimizers that do not
        report it themselves (two more forward passes).
      mesh: the devices among which the examples of a batch are split, evenly or not;
        None for the device that holds the arguments.
      is_streamed: whether `data` is the stacked batches of the steps,
        `[steps_per_dispatch, batch_size, ...]`, instead of the training set.

    Returns:
      `train_chunk(state, data, num_steps, permutation=None) -> (state, records)`. It
      donates `state`, takes `num_steps <= steps_per_dispatch` steps, and returns
      records with a leading axis of length `steps_per_dispatch`, of which only the
      first `num_steps` are valid. `permutation` is that of the first step's epoch, if
      the caller has it: computing it can take as long as a step.
    """
    train_step = functools.partial(_train_step, task, tx, measure_kl)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=replicated(mesh))
    def train_chunk(
        state: TrainState,
        data: PyTree,
        num_steps: jax.Array,
        permutation: jax.Array | None = None,
    ) -> tuple[TrainState, Records]:
        size = num_examples(data)

        def next_batch(
            state: TrainState, permutation: jax.Array, index: jax.Array
        ) -> tuple[PyTree, jax.Array]:
            if is_streamed:
                return jax.tree.map(lambda leaf: leaf[index], data), permutation
            epoch, position = epoch_and_position(state.step, size, batch_size)
            # Sorting is expensive: reorder only at the start of an epoch.
            permutation = jax.lax.cond(
                position == 0,
                lambda: epoch_permutation(state.key, epoch, size),
                lambda: permutation,
            )
            return take_batch(data, permutation, position, batch_size), permutation

        def take_step(
            carry: tuple[TrainState, jax.Array], index: jax.Array
        ) -> tuple[tuple[TrainState, jax.Array], Records]:
            state, permutation = carry
            batch, permutation = next_batch(state, permutation, index)
            batch = split_examples(batch, mesh)
            state, record = train_step(state, batch)
            return (state, permutation), record

        if is_streamed:
            permutation = jnp.zeros(0, jnp.int32)
        elif permutation is None:
            first_epoch, _ = epoch_and_position(state.step, size, batch_size)
            permutation = epoch_permutation(state.key, first_epoch, size)
        carry = (state, permutation)
        (state, _), records = take_steps(
            take_step, carry, num_steps, steps_per_dispatch
        )
        return state, records

    return train_chunk


def make_evaluate_fn(
    task: Task, *, batch_size: int, mesh: Mesh | None = None
) -> Callable[[TrainState, PyTree], dict[str, float]]:
    """Builds `evaluate(state, data) -> {"loss": ..., metrics...}`, means over `data`.

    At most `batch_size` examples go through the model at once, split among the devices
    of `mesh`.
    """

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def evaluate_batch(params: PyTree, model_state: PyTree, batch: PyTree) -> Records:
        batch = split_examples(batch, mesh)
        outputs = task.predict(params, model_state, batch)
        loss = task.output_loss_fn(outputs, batch)
        return {"loss": loss, **task.metrics_fn(outputs, batch)}

    def evaluate(state: TrainState, data: PyTree) -> dict[str, float]:
        size = num_examples(data)
        whole = task.count(data)
        totals: dict[str, float] = {}
        for start in range(0, size, batch_size):
            end = min(start + batch_size, size)
            batch = jax.tree.map(lambda leaf, i=start, j=end: leaf[i:j], data)
            if isinstance(jax.tree.leaves(batch)[0], np.ndarray):
                batch = place_examples(batch, mesh)
            means = evaluate_batch(state.params, state.model_state, batch)
            weight = task.count(batch) / whole
            for name, mean in means.items():
                totals[name] = totals.get(name, 0.0) + weight * float(mean)
        return totals

    return evaluate


def _train_step(
    task: Task,
    tx: optax.GradientTransformationExtraArgs,
    measure_kl: bool,
    state: TrainState,
    batch: PyTree,
) -> tuple[TrainState, Records]:
    def loss_and_metrics(params: PyTree) -> tuple[jax.Array, Records]:
        outputs = task.model_fn(params, batch)
        return task.output_loss_fn(outputs, batch), task.metrics_fn(outputs, batch)

    params = state.params
    noise_key = jax.random.fold_in(state.key, NOISE_STREAM)
    batch = task.draw_fn(jax.random.fold_in(noise_key, state.step), batch)
    (value, metrics), grads = jax.value_and_grad(loss_and_metrics, has_aux=True)(params)
    new_params, opt_state, _ = take_step(
        tx, task.loss_fn, params, state.opt_state, batch, value, grads
    )
    record = {"loss": value, **metrics, **read_step_info(opt_state)}
    if measure_kl and "measured_kl" not in record:
        record["measured_kl"] = ngd.mean_kl(
            task.model_fn,
            params,
            new_params,
            batch,
            task.likelihood,
            weights=task.weights(batch),
        )
    new_state = TrainState(
        step=state.step + 1,
        key=state.key,
        params=new_params,
        model_state=task.update_model_state(params, state.model_state, batch),
        opt_state=opt_state,
    )
    # The loop over steps needs types that do not change.
    return match_types(new_state, state), record
