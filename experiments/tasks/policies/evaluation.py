"""How good a policy is when it always takes its most likely action, in new episodes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.tasks.policies.environments import Environment

__all__ = ["greedy_actions", "make_evaluate_fn", "run_episode"]

PyTree = Any
PolicyFn = Callable[[PyTree, PyTree], PyTree]


def greedy_actions(environment: Environment, outputs: PyTree) -> jax.Array:
    """The most likely actions."""
    if environment.num_actions:
        return jnp.argmax(outputs, axis=-1)
    return outputs["mean"]


def run_episode(
    environment: Environment, policy_fn: PolicyFn, params: PyTree, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Plays one episode greedily, for the maximum length that it can have.

    Returns:
      The observations `[T, ...]`, whether the episode was still running at each, `[T]`,
      and the return, a scalar.
    """

    def step(carry: tuple[Any, ...], time: jax.Array) -> tuple[Any, Any]:
        observation, state, running, total = carry
        outputs = policy_fn(params, {"observations": observation[None]})
        action = greedy_actions(environment, outputs)[0]
        new = environment.step(jax.random.fold_in(key, time), state, action)
        total = total + jnp.where(running, new.reward, 0.0)
        still = running & ~(new.terminated | new.truncated)
        return (new.observation, new.state, still, total), (observation, running)

    # A key that no time step uses.
    reset_key = jax.random.fold_in(key, environment.max_episode_steps)
    observation, state = environment.reset(reset_key)
    first = (observation, state, jnp.asarray(True), jnp.zeros(()))
    last, (observations, running) = jax.lax.scan(
        step, first, jnp.arange(environment.max_episode_steps)
    )
    return observations, running, last[3]


def make_evaluate_fn(
    environment: Environment,
    policy_fn: PolicyFn,
    *,
    num_agents: int,
    num_episodes: int,
    batch_size: int,
) -> Callable[[PyTree, jax.Array], jax.Array]:
    """Builds `evaluate(params, key) -> returns`, `[agents, episodes]`.

    At most `batch_size` episodes of an agent run in parallel.
    """

    def returns(params: PyTree, key: jax.Array) -> jax.Array:
        play = functools.partial(run_episode, environment, policy_fn, params)
        keys = jax.random.split(key, num_episodes)
        size = min(batch_size, num_episodes)
        return jax.lax.map(lambda key: play(key)[2], keys, batch_size=size)

    def evaluate(params: PyTree, key: jax.Array) -> jax.Array:
        if num_agents == 1:
            return returns(params, key)[None]
        return jax.vmap(returns, (0, None))(params, key)

    return jax.jit(evaluate)
