"""Rollouts against gymnax stepped in a Python loop, and episodes that end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

from experiments.running.settings import ConfigError
from experiments.tasks.policies.environments import make_environment
from experiments.tasks.policies.evaluation import (
    greedy_actions,
    make_evaluate_fn,
    run_episode,
)
from experiments.tasks.policies.rollouts import _remember, collect, start_actors

spaces = pytest.importorskip("gymnax.environments.spaces")


def linear_policy(params, batch):
    return batch["observations"] @ params


def gaussian_policy(params, batch):
    mean = batch["observations"] @ params
    return {"mean": mean, "log_scale": jnp.zeros_like(mean)}


@functools.cache
def environment(name, scale=(1.0,)):
    return make_environment(name, scale)


@functools.cache
def rollout_of(name, num_steps, num_envs):
    """A rollout, what the environments were before and after, and the parameters."""
    env = environment(name)
    size = env.num_actions or env.action_size
    policy_fn = linear_policy if env.num_actions else gaussian_policy
    params = jnp.zeros((*env.observation_shape, size))
    actors = start_actors(env, jax.random.key(3), num_envs)
    run = jax.jit(
        lambda actors, key: collect(env, policy_fn, params, actors, key, num_steps)
    )
    rollout, after = run(actors, jax.random.key(4))
    return jax.tree.map(np.asarray, rollout), actors, after


def test_rollout_is_what_the_environment_does_step_by_step():
    rollout, actors, after = rollout_of("CartPole-v1", 60, 3)
    env = environment("CartPole-v1")
    step = jax.jit(env.dynamics.step_env)
    ended = rollout.terminated | rollout.truncated
    assert ended.any()
    finished = []
    for index in range(3):
        state = jax.tree.map(lambda leaf, i=index: leaf[i], actors.states)
        total = 0.0
        for t in range(60):
            observation, state, reward, terminated, _ = step(
                jax.random.key(0), state, rollout.actions[t, index], env.constants
            )
            total += float(reward)
            np.testing.assert_allclose(
                rollout.next_observations[t, index], observation, rtol=1e-5, atol=1e-6
            )
            assert rollout.rewards[t, index] == reward
            assert rollout.terminated[t, index] == terminated
            assert not rollout.truncated[t, index]
            if t + 1 < 60 and not terminated:
                following = rollout.observations[t + 1, index]
                np.testing.assert_array_equal(
                    following, rollout.next_observations[t, index]
                )
            if terminated:
                finished.append(total)
                break  # what comes is another episode, from chance
    known = np.asarray(after.finished)
    known = known[~np.isnan(known)]
    assert len(known) == ended.sum() == after.num_finished
    assert set(finished) <= set(known.tolist())


def test_time_limit_truncates_and_shows_where_the_episode_was():
    rollout, _, after = rollout_of("Pendulum-v1", 201, 2)
    assert rollout.truncated[199].all()
    assert rollout.truncated.sum() == 2
    assert not rollout.terminated.any()
    # A new episode has begun; the old one went on to somewhere else.
    gap = np.abs(rollout.observations[200] - rollout.next_observations[199])
    assert (gap.max(axis=1) > 1e-3).all()
    returns = rollout.rewards[:200].sum(axis=0)
    np.testing.assert_allclose(sorted(after.finished[:2]), sorted(returns), rtol=1e-4)
    np.testing.assert_array_equal(after.lengths, [1, 1])


@pytest.mark.parametrize("num_ended", [0, 3, 5, 12])
def test_ring_keeps_the_last_returns(rng, num_ended):
    returns = rng.normal(size=20)
    ended = np.zeros(20, bool)
    ended[np.sort(rng.permutation(20)[:num_ended])] = True
    earlier = [10.0, 11.0, 12.0]
    window = jnp.full(5, jnp.nan).at[:3].set(jnp.array(earlier))
    kept, count = _remember(
        window, jnp.int32(3), jnp.asarray(returns, jnp.float32), jnp.asarray(ended)
    )
    assert count == 3 + num_ended
    expected = [*earlier, *returns[ended].astype(np.float32)][-5:]
    known = np.asarray(kept)[~np.isnan(kept)]
    np.testing.assert_allclose(sorted(known), sorted(expected))


def test_vectors_of_actions_are_clipped_to_their_bounds():
    env = environment("MountainCarContinuous-v0")
    _, state = env.reset(jax.random.key(0))
    far = env.step(jax.random.key(1), state, jnp.array([7.0]))
    edge = env.step(jax.random.key(1), state, jnp.array([1.0]))
    assert far.reward == edge.reward
    np.testing.assert_array_equal(far.observation, edge.observation)


def test_squashed_actions_fill_their_bounds_and_the_best_one_is_tanh_of_the_mean():
    env = make_environment("Pendulum-v1", squash_actions=True)
    inner = np.linspace(-50.0, 50.0, 1001, dtype=np.float32)[:, None]
    outer = np.asarray(env.bounded(inner))
    np.testing.assert_allclose(outer, 2 * np.tanh(inner), atol=1e-6)
    assert (outer.min(), outer.max()) == (-2.0, 2.0)
    # Bounds that no float32 has, and not around zero.
    uneven = dataclasses.replace(env, action_low=(-0.1,), action_high=(0.3,))
    outer = np.asarray(uneven.bounded(inner))
    assert (outer.min(), outer.max()) == (np.float32(-0.1), np.float32(0.3))
    np.testing.assert_allclose(outer, 0.1 + 0.2 * np.tanh(inner), atol=1e-6)
    _, state = env.reset(jax.random.key(0))
    new = env.step(jax.random.key(1), state, jnp.array([0.4]))
    plain = environment("Pendulum-v1")
    expected = plain.step(jax.random.key(1), state, 2 * jnp.tanh(jnp.array([0.4])))
    np.testing.assert_allclose(new.observation, expected.observation, rtol=1e-6)
    assert greedy_actions(env, {"mean": 0.4, "log_scale": 1.0}) == 0.4


def test_ratio_and_kl_of_squashed_policies_are_those_of_their_normal_distributions(x64):
    """By their densities in the action a = tanh(u), integrated over (-1, 1)."""
    likelihood = make_environment("Pendulum-v1", squash_actions=True).likelihood
    actions = np.tanh(np.linspace(-9.0, 9.0, 100_001))[:, None]
    inner = np.arctanh(actions)
    outputs, densities = [], []
    for mean, scale in ((0.3, 0.8), (-0.1, 1.1)):
        log_scale = np.full(inner.shape, np.log(scale))
        outputs.append({"mean": np.full(inner.shape, mean), "log_scale": log_scale})
        normal = scipy.stats.norm(mean, scale).pdf(inner)
        densities.append(normal[:, 0] / (1 - actions[:, 0] ** 2))
    old, new = densities
    total = scipy.integrate.trapezoid(old, actions[:, 0])
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)
    log_probs = [likelihood.log_prob(each, inner) for each in outputs]
    ratio = np.exp(log_probs[1] - log_probs[0])
    np.testing.assert_allclose(ratio, new / old, rtol=1e-9)
    kl = scipy.integrate.trapezoid(old * np.log(old / new), actions[:, 0])
    np.testing.assert_allclose(likelihood.kl(*outputs)[0], kl, rtol=1e-6)


def test_observations_are_divided_by_their_scale():
    plain, _ = environment("Pendulum-v1").reset(jax.random.key(0))
    scaled, _ = environment("Pendulum-v1", (1.0, 2.0, 4.0)).reset(jax.random.key(0))
    np.testing.assert_allclose(scaled, plain / np.array([1.0, 2.0, 4.0]), rtol=1e-6)


@pytest.mark.slow
def test_greedy_episode_is_that_of_a_python_loop():
    env = environment("CartPole-v1")
    # Always to the left: the pole falls soon, before round-off can grow.
    params = jnp.zeros((4, 2))
    play = jax.jit(lambda key: run_episode(env, linear_policy, params, key))
    key = jax.random.key(5)
    observations, running, total = play(key)
    observation, state = env.reset(jax.random.fold_in(key, env.max_episode_steps))
    step = jax.jit(env.dynamics.step_env)
    terminated, t = False, 0
    while not terminated:
        assert running[t]
        np.testing.assert_allclose(observations[t], observation, rtol=1e-4, atol=1e-5)
        observation, state, _, terminated, _ = step(key, state, 0, env.constants)
        t += 1
    assert total == t < 20
    assert not running[t:].any()

    evaluate = make_evaluate_fn(
        env, linear_policy, num_agents=1, num_episodes=6, batch_size=4
    )
    returns = evaluate(params, key)
    expected = [play(k)[2] for k in jax.random.split(key, 6)]
    np.testing.assert_allclose(returns, [expected])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("CartPole-v9",),
            "`task.env` must be one of .*CartPole-v1.*got 'CartPole-v9'",
        ),
        (
            ("CartPole-v1", (1.0, 2.0)),
            r"`task.observation_scale` must have 1 number.*2",
        ),
    ],
)
def test_bad_environments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_environment(*arguments)


def test_actions_without_bounds_are_not_squashed(monkeypatch):
    with pytest.raises(ConfigError, match=r"`task.squash_actions` must be.*Discrete"):
        make_environment("CartPole-v1", squash_actions=True)
    dynamics = type(environment("Pendulum-v1").dynamics)
    unbounded = spaces.Box(-1.0, np.inf, (1,))
    monkeypatch.setattr(dynamics, "action_space", lambda *_: unbounded)
    with pytest.raises(ConfigError, match=r"`task.squash_actions` must be.*inf"):
        make_environment("Pendulum-v1", squash_actions=True)
    assert make_environment("Pendulum-v1").action_high == (np.inf,)
