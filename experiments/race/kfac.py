"""kfac-jax as a contestant, if it is installed and its tracer supports the model.

Version 0.0.8 cannot take a step with jax 0.9.2 or later, so it races in an environment
of its own, through the same program and into the same folder.
"""

import dataclasses
import time
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import optax

import ngd_jax as ngd
from experiments.race.contestants import Snapshot, batch_size_of
from experiments.running.settings import POSITIVE, ConfigError
from experiments.tasks import Task
from experiments.tasks.supervised.streaming import HostBatches
from experiments.tasks.supervised.training import TrainState, init_state

__all__ = ["KFACConfig", "KFACContestant", "KFACState"]

PyTree = Any

# Enough to compile what it does in every step, every fifth step, and the first.
_STEPS_TO_WARM_UP = 6


@dataclasses.dataclass
class KFACConfig:
    """Settings of `kfac_jax.Optimizer`; rate, momentum and damping are adaptive.

    Attributes:
      initial_damping: 1 in the README of kfac-jax.
    """

    initial_damping: Annotated[float, POSITIVE]


class KFACState(NamedTuple):
    """The state of a training run.

    Attributes:
      step: steps taken.
      params: parameters of the model.
      model_state: other state of the model.
      opt_state: of kfac-jax.
      key: for its random draws.
      batches: the batches of the steps.
    """

    step: int
    params: PyTree
    model_state: PyTree
    opt_state: Any
    key: jax.Array
    batches: HostBatches


class KFACContestant:
    """kfac-jax with the settings of its README.

    Args:
      task: the problem.
      optimizer: settings.
      data: the training set.
      batch_size: examples in a batch; None for all.
      max_dispatch: largest number of steps between two readings of the clock.

    Raises:
      ConfigError: kfac-jax is missing, lacks such a loss, or cannot take a step.
    """

    peak_bytes: int | None = None  # its compiled step, and so the plan, is out of reach

    def __init__(
        self,
        task: Task,
        optimizer: KFACConfig,
        data: PyTree,
        *,
        batch_size: int | None,
        max_dispatch: int,
    ):
        try:
            import kfac_jax  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(f"kfac-jax cannot be imported: {error}") from error
        self.max_dispatch = max_dispatch
        self._task, self._data = task, jax.tree.map(np.asarray, data)
        self._batch_size = batch_size_of(batch_size, data)
        self._update_model_state = jax.jit(task.update_model_state)
        register = _registration(task, kfac_jax)

        def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
            outputs = task.model_fn(params, batch)
            register(outputs)
            return task.output_loss_fn(outputs, batch)

        self._optimizer = kfac_jax.Optimizer(
            value_and_grad_func=jax.value_and_grad(loss_fn),
            l2_reg=0.0,
            value_func_has_aux=False,
            value_func_has_state=False,
            value_func_has_rng=False,
            use_adaptive_learning_rate=True,
            use_adaptive_momentum=True,
            use_adaptive_damping=True,
            initial_damping=optimizer.initial_damping,
            num_burnin_steps=0,  # those of its README fail without an iterator
            multi_device=False,
        )
        start = time.process_time()
        try:
            self.advance(self.start(0), _STEPS_TO_WARM_UP, 0.0)
        except Exception as error:  # its tracer raises many kinds
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"kfac-jax cannot take a step: {lines[0]}") from error
        self.compile_seconds = time.process_time() - start

    def start(self, seed: int) -> KFACState:
        """The state before the first step, with the initial parameters of the race."""
        first: TrainState = init_state(
            self._task, optax.with_extra_args_support(optax.identity()), seed
        )
        batches = HostBatches(
            self._data, first.key, batch_size=self._batch_size, capacity=1
        )
        params, key = first.params, jax.random.key_data(first.key)
        opt_state = self._optimizer.init(params, key, _one(batches, 0))
        return KFACState(0, params, first.model_state, opt_state, key, batches)

    def advance(
        self, state: KFACState, num_steps: int, progress: float
    ) -> tuple[KFACState, float]:
        """Takes steps, and returns the loss of the last one's batch."""
        del progress  # it chooses its rates itself
        stats: Any = {}
        for _ in range(num_steps):
            batch = _one(state.batches, state.step)
            model_state = state.model_state
            if jax.tree.leaves(model_state):
                model_state = self._update_model_state(state.params, model_state, batch)
            key, draw_key = jax.random.split(state.key)
            params, opt_state, stats = self._optimizer.step(
                state.params,
                state.opt_state,
                draw_key,
                batch=batch,
                global_step_int=state.step,
            )
            state = KFACState(
                state.step + 1, params, model_state, opt_state, key, state.batches
            )
        jax.block_until_ready(state.params)
        return state, float(stats["loss"])

    def snapshot(self, state: KFACState) -> Snapshot:
        """The current model."""
        # Its next step overwrites the parameters; evaluations are done by then.
        return Snapshot(state.params, state.model_state)


def _one(batches: HostBatches, step: int) -> PyTree:
    return jax.tree.map(lambda leaf: jax.numpy.asarray(leaf[0]), batches.take(step, 1))


def _registration(task: Task, kfac_jax: Any) -> Any:
    match task.likelihood:
        case ngd.Categorical() if task.weights_fn is None:
            return kfac_jax.register_softmax_cross_entropy_loss
        case ngd.Bernoulli():
            return kfac_jax.register_multi_bernoulli_predictive_distribution
    raise ConfigError(
        f"kfac-jax has no loss for {type(task.likelihood).__name__} outputs"
        f"{' of masked examples' if task.weights_fn is not None else ''}."
    )
