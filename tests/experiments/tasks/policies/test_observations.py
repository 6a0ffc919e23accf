"""Running statistics against NumPy, and who uses which of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks.policies.learner import make_parts
from experiments.tasks.policies.observations import (
    merge,
    no_statistics,
    normalized,
    normalizing,
)
from experiments.tasks.policies.rollouts import collect
from experiments.tasks.policies.training import gather, init_agent, iterate
from tests.experiments.helpers import make_config


def test_merged_statistics_are_those_of_all_observations(rng):
    """Far from zero, where sums of squares would lose all digits of float32."""
    parts = [
        (300 + scale * rng.normal(size=(steps, 4, 3))).astype(np.float32)
        for steps, scale in ((5, 1.0), (1, 0.1), (40, 3.0))
    ]
    statistics = no_statistics((3,))
    for part in parts:
        statistics = jax.jit(merge)(statistics, part)
    everything = np.concatenate(parts).reshape(-1, 3).astype(np.float64)
    assert statistics.number == len(everything)
    np.testing.assert_allclose(statistics.mean, everything.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.variance, everything.var(0), rtol=1e-3)
    expected = (everything - everything.mean(0)) / everything.std(0)
    np.testing.assert_allclose(
        normalized(statistics, everything.astype(np.float32)), expected, atol=1e-3
    )


def test_entries_that_never_moved_and_far_ones_stay_finite():
    statistics = merge(no_statistics((2,)), jnp.array([[[7.0, 1.0], [7.0, 3.0]]]))
    seen = normalized(statistics, jnp.array([[7.0, 2.0], [9.0, -1e9]]))
    np.testing.assert_array_equal(seen, [[0.0, 0.0], [10.0, -10.0]])


def test_before_anything_is_seen_observations_are_as_they_are(rng):
    observations = rng.normal(size=(4, 3)).astype(np.float32)
    np.testing.assert_allclose(
        normalized(no_statistics((3,)), observations), observations, rtol=1e-6
    )
    assert normalized(None, observations) is observations


@functools.cache
def parts_of(normalize):
    flag = f"task.normalize_observations={str(normalize).lower()}"
    sizes = ("task.num_envs=4", "task.value.hidden_sizes=[8]")
    sizes += ("task.value.minibatch_size=32",)
    config = make_config("task=trpo", "env=Pendulum-v1", "batch_size=64", flag, *sizes)
    # What is learned does not matter here, and takes long to compile.
    return dataclasses.replace(make_parts(config), update=_move, fit=_stay)


def _move(params, opt_state, *_):
    return jax.tree.map(lambda leaf: leaf + 0.1, params), opt_state, {}


def _stay(params, opt_state, *_):
    return params, opt_state


@pytest.mark.long
def test_rollout_and_update_see_by_what_was_seen_before_and_the_next_by_all():
    parts = parts_of(True)
    step = jax.jit(functools.partial(iterate, parts))
    experience_of = jax.jit(functools.partial(gather, parts))
    collected = jax.jit(
        lambda policy, actors, key: collect(
            parts.environment,
            normalizing(parts.policy_fn),
            policy,
            actors,
            key,
            parts.num_steps,
        )
    )
    agent = init_agent(parts, jax.random.key(0))
    everything = np.zeros((0, 3))
    for index in range(3):
        key = jax.random.key(index + 1)
        rollout_key = jax.random.split(key, 3)[0]
        rollout, _ = collected((agent.params, agent.seen), agent.actors, rollout_key)
        raw = np.asarray(rollout.observations, np.float64).reshape(-1, 3)
        batch = experience_of(agent, rollout_key).policy
        mean, scale = (everything.mean(0), everything.std(0)) if index else (0.0, 1.0)
        expected = np.clip((raw - mean) / scale, -10, 10)
        np.testing.assert_allclose(batch["observations"], expected, atol=2e-4)
        # The old policy is the one that acted.
        outputs = parts.policy_fn(agent.params, batch)
        likelihood = parts.environment.likelihood
        np.testing.assert_allclose(
            likelihood.log_prob(outputs, batch["actions"]),
            batch["log_probs"],
            rtol=1e-5,
            atol=1e-5,
        )
        old, (agent, _) = agent, step(agent, key)
        everything = np.concatenate([everything, raw])
        np.testing.assert_array_equal(agent.used.mean, old.seen.mean)
        np.testing.assert_allclose(agent.seen.mean, everything.mean(0), atol=1e-4)
        np.testing.assert_allclose(agent.seen.variance, everything.var(0), rtol=1e-3)


@pytest.mark.long
def test_agents_side_by_side_have_statistics_of_their_own():
    parts = parts_of(True)
    keys = jax.random.split(jax.random.key(0))
    agents = jax.vmap(functools.partial(init_agent, parts))(keys)
    agents, _ = jax.jit(jax.vmap(functools.partial(iterate, parts)))(agents, keys)
    assert agents.seen.mean.shape == (2, 3)
    assert (agents.seen.mean[0] != agents.seen.mean[1]).all()


def test_without_the_setting_an_agent_has_no_statistics():
    agent = init_agent(parts_of(False), jax.random.key(0))
    assert agent.seen is agent.used is None
