"""Training, compiled as one scan: rollout, advantages, policy update, value fit.

    agent, key --iterate--> agent, records        num_steps times, for every agent

One agent, or several under `vmap`, each with its own parameters, environments and
random numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.running.dispatch import fix_types, match_types, take_steps
from experiments.tasks.policies.advantages import generalized_advantages, normalize
from experiments.tasks.policies.environments import Environment
from experiments.tasks.policies.observations import (
    Statistics,
    merge,
    no_statistics,
    normalized,
    normalizing,
)
from experiments.tasks.policies.rollouts import (
    Actors,
    collect,
    start_actors,
    window_quantiles,
)
from experiments.tasks.policies.settings import PolicyConfig
from experiments.tasks.policies.updates import PolicyUpdate, entropy
from experiments.tasks.policies.values import ValueFit, explained_variance

__all__ = [
    "Agent",
    "Experience",
    "Parts",
    "PolicyState",
    "gather",
    "init_state",
    "iterate",
    "make_train_chunk",
]

PyTree = Any
Records = dict[str, jax.Array]

QUANTILES = {"return_low": 0.1, "return_median": 0.5, "return_high": 0.9}


class Agent(NamedTuple):
    """One agent between two updates.

    Attributes:
      params: of the policy.
      opt_state: of its optimizer.
      value_params: of the value function.
      value_opt_state: state of the value fit.
      actors: its environments.
      seen: statistics of all observations so far, which normalise the next rollout and
        all learning from it; None if observations are not normalised.
      used: the statistics that the last update used: of the observations before its
        rollout. With these the policy is within the radius of the previous one, so it
        is evaluated with them.
    """

    params: PyTree
    opt_state: PyTree
    value_params: PyTree
    value_opt_state: PyTree
    actors: Actors
    seen: Statistics | None
    used: Statistics | None

    @property
    def policy(self) -> tuple[PyTree, Statistics | None]:
        """The argument of `normalizing(policy_fn)` for the policy as it was learned."""
        return self.params, self.used


class PolicyState(NamedTuple):
    """Everything that the next step needs, and thus everything in a checkpoint.

    Attributes:
      step: int32, number of policy updates.
      key: typed PRNG key; each agent and each step folds in its number.
      agents: one `Agent`, with a leading axis if there are several.
    """

    step: jax.Array
    key: jax.Array
    agents: Agent


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of an agent.

    Attributes:
      settings: of the task; `num_envs` is E.
      environment: where it acts.
      num_steps: number of steps in each copy between two updates, T.
      init_policy: key -> parameters.
      policy_fn: (params, batch) -> outputs, for normalised observations.
      init_optimizer: parameters -> state of the optimizer.
      update: the update of the policy.
      init_value: key -> parameters.
      value_fn: (params, batch) -> values, likewise.
      init_value_optimizer: parameters -> state of the value fit.
      fit: the fit of the value function.
    """

    settings: PolicyConfig
    environment: Environment
    num_steps: int
    init_policy: Callable[[jax.Array], PyTree]
    policy_fn: Callable[[PyTree, PyTree], PyTree]
    init_optimizer: Callable[[PyTree], PyTree]
    update: PolicyUpdate
    init_value: Callable[[jax.Array], PyTree]
    value_fn: Callable[[PyTree, PyTree], jax.Array]
    init_value_optimizer: Callable[[PyTree], PyTree]
    fit: ValueFit


def init_agent(parts: Parts, key: jax.Array) -> Agent:
    """An agent before its first step."""
    policy_key, value_key, actor_key = jax.random.split(key, 3)
    params = parts.init_policy(policy_key)
    value_params = parts.init_value(value_key)
    statistics = None
    if parts.settings.normalize_observations:
        statistics = no_statistics(parts.environment.observation_shape)
    return Agent(
        params=params,
        opt_state=parts.init_optimizer(params),
        value_params=value_params,
        value_opt_state=parts.init_value_optimizer(value_params),
        actors=start_actors(parts.environment, actor_key, parts.settings.num_envs),
        seen=statistics,
        used=statistics,
    )


class Experience(NamedTuple):
    """A rollout, prepared for learning; N = T E environment steps.

    Attributes:
      policy: "observations", "actions", "log_probs" and normalised "advantages".
      value: "observations" and "targets".
      actors: the environments after the rollout.
      seen: the statistics of observations after it; the batches were normalised by
        those before it.
      records: the records of the rollout itself.
    """

    policy: PyTree
    value: PyTree
    actors: Actors
    seen: Statistics | None
    records: Records


def gather(parts: Parts, agent: Agent, key: jax.Array) -> Experience:
    """Lets the policy act, and estimates advantages by the value function."""
    environment = parts.environment
    rollout, actors = collect(
        environment,
        normalizing(parts.policy_fn),
        (agent.params, agent.seen),
        agent.actors,
        key,
        parts.num_steps,
    )
    seen = None
    if agent.seen is not None:
        seen = merge(agent.seen, rollout.observations)
        rollout = rollout._replace(
            observations=normalized(agent.seen, rollout.observations),
            next_observations=normalized(agent.seen, rollout.next_observations),
        )
    flat = jax.tree.map(_merge_axes, rollout)

    def values_of(observations: jax.Array) -> jax.Array:
        values = parts.value_fn(agent.value_params, {"observations": observations})
        return values.reshape(rollout.rewards.shape)

    values = values_of(flat.observations)
    advantages = generalized_advantages(
        parts.settings.reward_scale * rollout.rewards,
        values,
        values_of(flat.next_observations),
        rollout.terminated,
        rollout.truncated,
        discount=parts.settings.discount,
        trace_decay=parts.settings.trace_decay,
    )
    targets = (advantages + values).ravel()
    batch = {"observations": flat.observations, "actions": flat.actions}
    outputs = parts.policy_fn(agent.params, batch)
    batch["advantages"] = normalize(advantages.ravel())
    batch["log_probs"] = environment.likelihood.log_prob(outputs, flat.actions)
    quantiles = window_quantiles(actors, tuple(QUANTILES.values()))
    records = {
        "return": jnp.nanmean(actors.finished),
        **dict(zip(QUANTILES, quantiles, strict=True)),
        "episodes": actors.num_finished,
        "entropy": entropy(environment.likelihood, outputs),
        "explained_variance": explained_variance(values.ravel(), targets),
    }
    value_batch = {"observations": flat.observations, "targets": targets}
    return Experience(batch, value_batch, actors, seen, records)


def iterate(parts: Parts, agent: Agent, key: jax.Array) -> tuple[Agent, Records]:
    """One rollout, and the learning from it."""
    rollout_key, update_key, fit_key = jax.random.split(key, 3)
    experience = gather(parts, agent, rollout_key)
    params, opt_state, records = parts.update(
        agent.params, agent.opt_state, experience.policy, update_key
    )
    value_params, value_opt_state = parts.fit(
        agent.value_params, agent.value_opt_state, experience.value, fit_key
    )
    new = Agent(
        params=params,
        opt_state=opt_state,
        value_params=value_params,
        value_opt_state=value_opt_state,
        actors=experience.actors,
        seen=experience.seen,
        used=agent.seen,
    )
    # The loop over steps needs types that do not change.
    return match_types(new, agent), {**experience.records, **records}


def init_state(parts: Parts, seed: int, num_agents: int) -> PolicyState:
    """The state before the first step; all randomness comes from `seed`."""

    def init(key: jax.Array) -> PolicyState:
        keys = _agent_keys(key, num_agents, jnp.int32(0))
        agents = _for_agents(functools.partial(init_agent, parts), num_agents)(keys)
        return PolicyState(jnp.zeros((), jnp.int32), key, agents)

    # Under jit every leaf gets a buffer of its own, as donation requires; weak types
    # are removed, since a checkpoint would not restore them.
    return fix_types(jax.jit(init)(jax.random.key(seed)))


def make_train_chunk(
    parts: Parts, num_agents: int, capacity: int, *, is_merged: bool = True
) -> jax.stages.Wrapped:
    """Builds `train_chunk(state, num_steps) -> (state, records)`, jitted.

    It donates `state`, takes `num_steps <= capacity` steps, and returns records with a
    leading axis of length `capacity`, of which only the first `num_steps` are valid.
    With several agents, `name` is the mean over agents of a record, or the largest of a
    count, and `name_min` and `name_max` are the bounds. If not `is_merged`, records
    have a second axis, over agents, instead.
    """
    step_fn = _for_agents(functools.partial(iterate, parts), num_agents)

    def take_step(state: PolicyState, index: jax.Array) -> tuple[PolicyState, Records]:
        del index  # within the dispatch
        keys = _agent_keys(state.key, num_agents, state.step + 1)
        agents, records = step_fn(state.agents, keys)
        if num_agents > 1 and is_merged:
            records = _over_agents(records)
        return PolicyState(state.step + 1, state.key, agents), records

    @functools.partial(jax.jit, donate_argnums=0)
    def train_chunk(
        state: PolicyState, num_steps: jax.Array
    ) -> tuple[PolicyState, Records]:
        return take_steps(take_step, state, num_steps, capacity)

    return train_chunk


def _for_agents(function: Callable[..., Any], num_agents: int) -> Callable[..., Any]:
    # A leading axis of length one is not free: `cond` would become `select`.
    return jax.vmap(function) if num_agents > 1 else function


def _agent_keys(key: jax.Array, num_agents: int, step: jax.Array) -> jax.Array:
    key = jax.random.fold_in(key, step)
    if num_agents == 1:
        return jax.random.fold_in(key, 0)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_agents))


def _over_agents(records: Records) -> Records:
    merged = {}
    for name, values in records.items():
        if name in ("status", "solver_status"):
            continue  # status codes have no mean; `accepted` gives the share taken
        is_count = jnp.issubdtype(values.dtype, jnp.integer)
        merged[name] = jnp.max(values) if is_count else jnp.mean(values)
        merged[f"{name}_min"] = jnp.min(values)
        merged[f"{name}_max"] = jnp.max(values)
    return merged


def _merge_axes(leaf: jax.Array) -> jax.Array:
    return leaf.reshape(-1, *leaf.shape[2:])
