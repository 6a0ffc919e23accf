"""Rollouts: a policy acts in many copies of an environment at once.

    observations --policy--> actions --environment--> rewards, next observations

One `lax.scan` over time, with the environments in parallel. Knows nothing of how the
policy learns from it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.tasks.policies.environments import Environment

__all__ = ["Actors", "Rollout", "collect", "start_actors", "window_quantiles"]

PyTree = Any

# Number of episodes in a "mean return", as in other libraries.
WINDOW = 100


class Actors(NamedTuple):
    """The E environments between two rollouts.

    Attributes:
      observations: `[E, ...]`, what the policy sees next.
      states: of the environments, with a leading axis E.
      returns: `[E]`, sum of the rewards of the running episodes so far.
      lengths: `[E]`, int32, their number of steps so far.
      finished: `[WINDOW]`, the returns of the last finished episodes, in no particular
        order; NaN while there have been fewer.
      num_finished: int32, episodes that have ended.
    """

    observations: jax.Array
    states: PyTree
    returns: jax.Array
    lengths: jax.Array
    finished: jax.Array
    num_finished: jax.Array


class Rollout(NamedTuple):
    """T steps of E environments; all leaves are `[T, E, ...]`.

    Attributes:
      observations: what the policy saw.
      actions: what it drew.
      rewards: what it received.
      terminated: whether the episode reached a terminal state.
      truncated: whether the time limit cut the episode off.
      next_observations: of the states that the actions led to, before any new episode.
    """

    observations: jax.Array
    actions: jax.Array
    rewards: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    next_observations: jax.Array


def start_actors(environment: Environment, key: jax.Array, num_envs: int) -> Actors:
    """Starts an episode in each of `num_envs` copies."""
    keys = jax.random.split(key, num_envs)
    observations, states = jax.vmap(environment.reset)(keys)
    return Actors(
        observations=observations,
        states=states,
        returns=jnp.zeros(num_envs),
        lengths=jnp.zeros(num_envs, jnp.int32),
        finished=jnp.full(WINDOW, jnp.nan),
        num_finished=jnp.zeros((), jnp.int32),
    )


def collect(
    environment: Environment,
    policy_fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    actors: Actors,
    key: jax.Array,
    num_steps: int,
) -> tuple[Rollout, Actors]:
    """Lets the policy act for `num_steps` steps in each environment.

    Args:
      environment: the environment.
      policy_fn: (params, {"observations": ...}) -> outputs of its distribution.
      params: of the policy.
      actors: the current state of the environments.
      key: for all randomness of the rollout.
      num_steps: T.
    """
    likelihood = environment.likelihood
    num_envs = actors.observations.shape[0]
    action_key, step_key = jax.random.split(key)

    def step(
        carry: tuple[jax.Array, PyTree, jax.Array, jax.Array], time: jax.Array
    ) -> tuple[Any, Any]:
        observations, states, returns, lengths = carry
        outputs = policy_fn(params, {"observations": observations})
        actions = likelihood.sample(jax.random.fold_in(action_key, time), outputs)
        keys = jax.random.split(jax.random.fold_in(step_key, time), num_envs)
        new = jax.vmap(environment.step)(keys, states, actions)
        returns, lengths = returns + new.reward, lengths + 1
        ended = new.terminated | new.truncated
        record = Rollout(
            observations=observations,
            actions=actions,
            rewards=new.reward,
            terminated=new.terminated,
            truncated=new.truncated,
            next_observations=new.next_observation,
        )
        carry = (
            new.observation,
            new.state,
            jnp.where(ended, 0.0, returns),
            jnp.where(ended, 0, lengths),
        )
        return carry, (record, returns)

    first = (actors.observations, actors.states, actors.returns, actors.lengths)
    last, (rollout, totals) = jax.lax.scan(
        step, first, jnp.arange(num_steps, dtype=jnp.int32)
    )
    ended = rollout.terminated | rollout.truncated
    finished, num_finished = _remember(
        actors.finished, actors.num_finished, totals.ravel(), ended.ravel()
    )
    observations, states, returns, lengths = last
    actors = Actors(observations, states, returns, lengths, finished, num_finished)
    return rollout, actors


def window_quantiles(actors: Actors, levels: tuple[float, ...]) -> jax.Array:
    """Quantiles of the last returns, NaN before the first episode has ended."""
    return jnp.nanquantile(actors.finished, jnp.asarray(levels))


def _remember(
    window: jax.Array, count: jax.Array, returns: jax.Array, ended: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes the returns of episodes that ended into the ring buffer `window`."""
    size = window.shape[0]
    rank = count + jnp.cumsum(ended) - 1
    total = count + jnp.sum(ended)
    # Only the last ones, or two would be written to the same place.
    kept = ended & (rank >= total - size)
    place = jnp.where(kept, rank % size, size)
    return window.at[place].set(returns, mode="drop"), total
