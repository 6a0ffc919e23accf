"""The policy in the file against the one that was learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks.policies.environments import make_environment
from experiments.tasks.policies.evaluation import greedy_actions
from experiments.tasks.policies.export import export_policy, load_policy
from experiments.tasks.policies.networks import make_policy_fn
from experiments.tasks.policies.observations import Statistics, normalizing


@pytest.mark.parametrize(
    ("name", "sizes", "squash", "is_normalized"),
    [
        ("CartPole-v1", (), False, False),
        ("Breakout-MinAtar", (8,), False, True),
        ("Pendulum-v1", (8, 6), False, True),
        ("Pendulum-v1", (8, 6), True, False),
    ],
)
def test_loaded_policy_takes_the_greedy_actions(
    tmp_path, rng, name, sizes, squash, is_normalized
):
    scale = (1.0, 0.5, 4.0) if name.startswith("Pendulum") else (2.0,)
    environment = make_environment(name, scale, squash_actions=squash)
    shape = environment.observation_shape
    init_fn, policy_fn = make_policy_fn(environment, sizes, 1.0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(init_fn, jax.random.key(0)),
    )
    statistics = None
    if is_normalized:
        mean, variance = rng.normal(size=shape), rng.uniform(0.1, 2.0, size=shape)
        statistics = Statistics(
            jnp.array(5.0), jnp.float32(mean), jnp.float32(variance)
        )
    export_policy(environment, params, statistics, tmp_path)

    observations = rng.normal(size=(3, 7, *shape)).astype(np.float32)
    outputs = jax.jit(normalizing(policy_fn))(
        (params, statistics), {"observations": environment.scaled(observations)}
    )
    expected = environment.bounded(greedy_actions(environment, outputs))
    act = load_policy(tmp_path)
    np.testing.assert_allclose(act(observations), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        act(observations[1, 2]), expected[1, 2], rtol=1e-4, atol=1e-5
    )
    assert len(np.unique(expected)) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["policy.npz"]


def test_observations_of_another_shape_are_refused(tmp_path):
    environment = make_environment("CartPole-v1")
    init_fn, _ = make_policy_fn(environment, (4,), 1.0)
    export_policy(environment, init_fn(jax.random.key(0)), None, tmp_path)
    act = load_policy(tmp_path)
    for shape in ((3,), (2, 2), (), (4, 3)):
        with pytest.raises(ValueError, match=r"must be of \(4,\)"):
            act(np.zeros(shape))
