"""Advantages against their definition as a sum, including the ends of episodes."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks.policies.advantages import generalized_advantages, normalize


def direct_sum(rewards, values, next_values, terminated, truncated, discount, decay):
    """A_t = Σ_k (γλ)^k δ_{t+k} up to the end of the episode, by loops."""
    num_steps, num_envs = rewards.shape
    advantages = np.zeros_like(rewards)
    for env in range(num_envs):
        for start in range(num_steps):
            weight = 1.0
            for t in range(start, num_steps):
                future = 0.0 if terminated[t, env] else next_values[t, env]
                error = rewards[t, env] + discount * future - values[t, env]
                advantages[start, env] += weight * error
                weight *= discount * decay
                if terminated[t, env] or truncated[t, env]:
                    break
    return advantages


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_advantages_equal_the_direct_sum(x64, rng, decay):
    shape = (30, 4)
    rewards, values, next_values = rng.normal(size=(3, *shape))
    ends = rng.random(shape)
    terminated, truncated = ends < 0.1, (ends > 0.1) & (ends < 0.2)
    assert terminated.any()
    assert truncated.any()
    arrays = (rewards, values, next_values, terminated, truncated)
    advantages = generalized_advantages(
        *map(jnp.asarray, arrays), discount=0.97, trace_decay=decay
    )
    expected = direct_sum(*arrays, 0.97, decay)
    np.testing.assert_allclose(advantages, expected, rtol=1e-12, atol=1e-12)


def test_truncation_counts_on_the_future_and_termination_does_not():
    one = jnp.ones((1, 1))
    common = {"discount": 0.9, "trace_decay": 0.95}
    yes, no = one.astype(bool), ~one.astype(bool)
    truncated = generalized_advantages(one, 2 * one, 10 * one, no, yes, **common)
    terminated = generalized_advantages(one, 2 * one, 10 * one, yes, no, **common)
    np.testing.assert_allclose(truncated, 1 + 0.9 * 10 - 2, rtol=1e-6)
    np.testing.assert_allclose(terminated, 1 - 2, rtol=1e-6)


def test_exact_values_leave_no_advantage(x64):
    """Where V is the value of the one policy that there is, nothing surprises."""
    discount, steps = 0.9, 12
    rewards = np.random.default_rng(1).normal(size=(steps, 1))
    values = np.zeros((steps + 1, 1))
    for t in reversed(range(steps)):
        values[t] = rewards[t] + discount * values[t + 1]
    never = jnp.zeros((steps, 1), bool)
    advantages = generalized_advantages(
        jnp.asarray(rewards),
        jnp.asarray(values[:-1]),
        jnp.asarray(values[1:]),
        never,
        never,
        discount=discount,
        trace_decay=0.95,
    )
    np.testing.assert_allclose(advantages, 0.0, atol=1e-12)


def test_normalized_advantages_have_mean_zero_and_variance_one(rng):
    advantages = normalize(jnp.asarray(5 + 3 * rng.normal(size=1000), jnp.float32))
    np.testing.assert_allclose(advantages.mean(), 0.0, atol=1e-5)
    np.testing.assert_allclose(advantages.std(), 1.0, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7, 1e-30])
def test_equal_advantages_become_zeros_and_not_round_off(value):
    # A thousand times 0.1 has a mean that is not 0.1.
    assert not normalize(jnp.full(1000, value, jnp.float32)).any()
