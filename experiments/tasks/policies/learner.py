"""The learner of the task `trpo`: a step updates policies on their rollouts."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from experiments.running.config import TrainConfig, check_without_data
from experiments.running.learner import Advance, Records, Rows
from experiments.running.optimizers import (
    check_optimizer,
    make_optimizer,
    read_step_info,
)
from experiments.running.screen import Column
from experiments.running.settings import ConfigError
from experiments.tasks.policies.environments import make_environment
from experiments.tasks.policies.evaluation import make_evaluate_fn, run_episode
from experiments.tasks.policies.export import export_policy
from experiments.tasks.policies.networks import make_policy_fn, make_value_fn
from experiments.tasks.policies.observations import normalizing
from experiments.tasks.policies.pictures import can_draw, draw_curves, draw_frames
from experiments.tasks.policies.settings import PolicyConfig, PPOConfig
from experiments.tasks.policies.training import (
    Parts,
    PolicyState,
    init_state,
    make_train_chunk,
)
from experiments.tasks.policies.updates import (
    PolicyUpdate,
    make_clipped_update,
    make_whole_update,
    policy_task,
)
from experiments.tasks.policies.values import make_value_fit

__all__ = ["PolicyLearner", "make_parts"]

PyTree = Any

# Folded into the key of a run for evaluations; step numbers never reach it.
EVALUATION_STREAM = 2**31 - 1


class PolicyLearner:
    """Trains one or many agents as `config` says; see `Learner`.

    Raises:
      ConfigError: settings that contradict each other, or gymnax is not installed.
    """

    train_data = None

    def __init__(self, config: TrainConfig):
        task: PolicyConfig = config.task
        self._config = config
        self._num_agents = task.num_agents
        self._parts = make_parts(config)
        self._policy_fn = normalizing(self._parts.policy_fn)
        self._train_chunk = make_train_chunk(
            self._parts, task.num_agents, config.steps_per_dispatch
        )
        self._returns = make_evaluate_fn(
            self._parts.environment,
            self._policy_fn,
            num_agents=task.num_agents,
            num_episodes=task.eval_episodes,
            batch_size=config.eval_batch_size,
        )
        key = jax.random.key(config.seed)
        self._evaluation_key = jax.random.fold_in(key, EVALUATION_STREAM)
        self.first_state = init_state(self._parts, config.seed, task.num_agents)
        solves = (
            Column("residual", "solver_residual", ".1e"),
            Column("accepted", "accepted", ".0%"),
        )
        # The value function may use a natural gradient of its own.
        info = read_step_info(self.first_state.agents.opt_state)
        is_solved = "solver_residual" in info
        self.columns = (
            Column("return", "return", ".1f"),
            *(solves if is_solved else ()),
            Column("entropy", "entropy", ".2f"),
            Column("value R²", "explained_variance", ".2f"),
            Column("test return", "test_return", ".1f"),
        )

    @contextlib.contextmanager
    def start(self, state: PolicyState) -> Iterator[Advance]:
        """Yields the compiled `advance(state, num_steps)`."""
        train_chunk = self._train_chunk.lower(state, np.int32(0)).compile()

        def advance(state: PolicyState, num_steps: int) -> tuple[PolicyState, Records]:
            return train_chunk(state, np.int32(num_steps))

        yield advance

    def evaluate(self, state: PolicyState) -> dict[str, Any]:
        """Evaluates greedy episodes: their mean return, and the lowest one.

        With several agents, also the median and the lowest of the agents' means.
        """
        returns = np.asarray(self._returns(state.agents.policy, self._evaluation_key))
        values = {"test_return": returns.mean(), "test_return_lowest": returns.min()}
        if self._num_agents > 1:
            means = returns.mean(axis=1)
            values["test_return_median_agent"] = np.median(means)
            values["test_return_lowest_agent"] = means.min()
        return values

    def draw(self, state: PolicyState, records: Rows, folder: Path, title: str) -> None:
        """Draws the curves, and frames of an episode if they can be drawn.

        Also writes the policy. With several agents, the policy and the episode are
        those of the first.
        """
        environment = self._parts.environment
        title = f"{environment.name}, {title}"
        draw_curves(
            records,
            folder / "curves.png",
            title,
            steps_per_update=self._parts.settings.num_envs * self._parts.num_steps,
        )
        agent = state.agents
        if self._num_agents > 1:
            agent = jax.tree.map(lambda leaf: leaf[0], agent)
        export_policy(environment, agent.params, agent.used, folder)
        if not can_draw(environment.name):
            return
        observations, running, total = jax.jit(run_episode, static_argnums=(0, 1))(
            environment, self._policy_fn, agent.policy, self._evaluation_key
        )
        observations = np.asarray(observations)[np.asarray(running)]
        draw_frames(
            environment.name,
            observations * np.asarray(environment.observation_scale),
            folder / "episode.png",
            f"{title}: one greedy episode, return {float(total):.0f}",
        )


def make_parts(config: TrainConfig) -> Parts:
    """Assembles the parts of an agent.

    Raises:
      ConfigError: settings that contradict each other, or gymnax is not installed.
    """
    _check(config)
    task: PolicyConfig = config.task
    assert config.batch_size is not None
    environment = make_environment(
        task.env, task.observation_scale, squash_actions=task.squash_actions
    )
    init_policy, policy_fn = make_policy_fn(
        environment, task.hidden_sizes, task.initial_scale
    )
    init_value, value_fn = make_value_fn(environment, task.value.hidden_sizes)
    model = policy_task(policy_fn, init_policy, environment.likelihood)
    init_optimizer, update = _make_update(config, model)
    init_value_optimizer, fit = make_value_fit(task.value, value_fn)
    return Parts(
        settings=task,
        environment=environment,
        num_steps=config.batch_size // task.num_envs,
        init_policy=init_policy,
        policy_fn=policy_fn,
        init_optimizer=init_optimizer,
        update=update,
        init_value=init_value,
        value_fn=value_fn,
        init_value_optimizer=init_value_optimizer,
        fit=fit,
    )


def _make_update(config: TrainConfig, model: Any) -> tuple[Any, PolicyUpdate]:
    optimizer = check_optimizer(config.optimizer)
    if isinstance(optimizer, PPOConfig):
        adam = optax.adam(optimizer.learning_rate)
        return adam.init, make_clipped_update(
            adam,
            model,
            clip=optimizer.clip,
            epochs=optimizer.epochs,
            minibatch_size=optimizer.minibatch_size,
            measure_kl=config.measure_kl,
        )
    tx = make_optimizer(config.optimizer, model)
    return tx.init, make_whole_update(tx, model, measure_kl=config.measure_kl)


def _check(config: TrainConfig) -> None:
    check_without_data(config)
    task: PolicyConfig = config.task
    size = config.batch_size
    if size is None or size % task.num_envs:
        raise ConfigError(
            f"`batch_size` must be a multiple of task.num_envs={task.num_envs}: the "
            f"environment steps between two updates of the policy; got {size}."
        )
    minibatches = {}
    if task.value.method == "adam":
        minibatches["task.value.minibatch_size"] = task.value.minibatch_size
    optimizer = check_optimizer(config.optimizer)
    if isinstance(optimizer, PPOConfig):
        minibatches["optimizer.minibatch_size"] = optimizer.minibatch_size
    for name, minibatch_size in minibatches.items():
        if size % minibatch_size:
            raise ConfigError(
                f"`{name}` must divide batch_size={size}, got {minibatch_size}."
            )
