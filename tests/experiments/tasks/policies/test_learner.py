"""The task through the real program: repeated, resumed, and with many agents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.running.checkpoints import Checkpoints
from experiments.running.config import CONFIG_DIR, compose_config, read_config
from experiments.running.loop import run_training
from experiments.running.run_folder import read_json_lines
from experiments.running.settings import ConfigError
from experiments.tasks.policies.export import load_policy
from experiments.tasks.policies.learner import PolicyLearner, make_parts
from experiments.tasks.policies.observations import normalizing
from tests.experiments.helpers import assert_same_bits, make_config

TINY = (
    "task=trpo",
    "batch_size=64",
    "steps=6",
    "task.num_envs=4",
    "task.value.hidden_sizes=[8]",
    "task.value.minibatch_size=32",
    "task.value.epochs=2",
    "task.eval_episodes=3",
)


def config(*overrides):
    return make_config(*TINY, *overrides)


def run(folder, *overrides):
    return run_training(config(*overrides), folder, Console(quiet=True))


@functools.cache
def learner_of(*overrides):
    """A learner and its compiled steps."""
    learner = PolicyLearner(config(*overrides))
    with learner.start(learner.first_state) as advance:
        return learner, advance


def fresh_state(*overrides):
    """The first state; steps consume it, so each caller gets its own."""
    return jax.tree.map(jnp.copy, learner_of(*overrides)[0].first_state)


@pytest.mark.slow
def test_run_leaves_logs_and_pictures_and_resumes_to_the_same_bits(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = run(whole)
    run(parts, "steps=3")
    resumed = run(parts)
    assert_same_bits(result.state, resumed.state)
    metrics = (whole / "metrics.jsonl").read_text()
    assert metrics == (parts / "metrics.jsonl").read_text()
    assert result.metrics == resumed.metrics
    names = {path.name for path in whole.iterdir()}
    assert {"curves.png", "episode.png", "result.json"} <= names
    state = Checkpoints(whole / "checkpoints").restore_latest(fresh_state())
    assert_same_bits(state, result.state)
    records = read_json_lines(whole / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert "test_return_lowest" in records[-1]


@pytest.mark.slow
def test_restored_run_goes_on_to_the_same_bits(tmp_path):
    _, advance = learner_of()
    whole = fresh_state()
    for _ in range(2):
        whole, _ = advance(whole, 2)
    part, _ = advance(fresh_state(), 1)
    Checkpoints(tmp_path).save(part)
    part = Checkpoints(tmp_path).restore_latest(fresh_state())
    part, _ = advance(part, 2)
    part, _ = advance(part, 1)
    assert_same_bits(part, whole)


@pytest.mark.long
def test_every_step_taken_has_the_size_asked_for_and_the_gain_promised():
    _, advance = learner_of()
    state, records = fresh_state(), []
    for _ in range(4):
        state, some = advance(state, 2)
        records.append(jax.tree.map(lambda leaf: np.asarray(leaf[:2]), some))
    records = jax.tree.map(lambda *leaves: np.concatenate(leaves), *records)
    expected = {"return", "return_low", "return_high", "predicted_kl", "step_scale"}
    expected |= {"solver_residual", "entropy", "explained_variance", "episodes"}
    assert expected <= records.keys()
    taken = records["accepted"] == 1
    assert taken.sum() >= 4
    kl = records["measured_kl"]
    assert ((kl[taken] >= 0.009) & (kl[taken] <= np.float32(0.01))).all()
    gain, promised = records["improvement"], records["expected_improvement"]
    assert (gain[taken] >= 0.0999 * promised[taken]).all()
    assert not kl[~taken].any()
    assert (records["solver_residual"] <= 0.1).all()


@pytest.mark.long
def test_same_seed_same_run_and_another_seed_another():
    _, advance = learner_of()
    first, records = advance(fresh_state(), 2)
    again, same = advance(fresh_state(), 2)
    assert_same_bits(first, again)
    assert_same_bits(records, same)
    other, _ = advance(PolicyLearner(config("seed=1")).first_state, 2)
    kernel = lambda state: jax.tree.leaves(state.agents.params)[0]  # noqa: E731
    assert not np.array_equal(kernel(first), kernel(other))


@pytest.mark.slow
def test_many_agents_are_each_like_one_alone():
    many, advance_many = learner_of("task.num_agents=3")
    _, advance = learner_of()
    states, merged = advance_many(fresh_state("task.num_agents=3"), 1)
    state, alone = advance(fresh_state(), 1)
    for leaf, leaves in zip(
        jax.tree.leaves(state.agents.params),
        jax.tree.leaves(states.agents.params),
        strict=True,
    ):
        assert leaves.shape == (3, *leaf.shape)
        np.testing.assert_allclose(leaves[0], leaf, rtol=1e-3, atol=1e-4)
        assert leaf.size < 3 or not np.allclose(leaves[1], leaf, atol=1e-3)
    assert merged["measured_kl_max"][0] <= 0.0100001
    low, high = merged["return_min"][0], merged["return_max"][0]
    assert low <= alone["return"][0] <= high
    values = many.evaluate(states)
    assert values["test_return_lowest_agent"] <= values["test_return_median_agent"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["npg", "ppo", "adam"])
def test_other_optimizers_learn_on_the_same_rollouts(optimizer):
    overrides = (f"optimizer={optimizer}", "measure_kl=true")
    if optimizer == "ppo":
        overrides += ("optimizer.minibatch_size=32",)
    _, advance = learner_of(*overrides)
    state, records = advance(fresh_state(*overrides), 2)
    assert int(state.step) == 2
    assert np.isfinite(records["improvement"][:2]).all()
    assert (records["measured_kl"][:2] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    ["Acrobot-v1", "Pendulum-v1", "MountainCarContinuous-v0", "Breakout-MinAtar"],
)
def test_other_environments_run_with_their_own_settings(env, tmp_path):
    steps = ("task.value.method=natural_gradient", "steps=2", "task.eval_episodes=1")
    result = run(tmp_path, f"env={env}", *steps)
    assert result.finished
    assert np.isfinite(result.metrics["test_return"])
    assert (tmp_path / "curves.png").exists()
    assert (tmp_path / "episode.png").exists() == (env != "Breakout-MinAtar")


@pytest.mark.slow
@pytest.mark.parametrize("num_agents", [1, 2])
def test_run_that_normalizes_and_squashes_leaves_the_policy_that_it_evaluates(
    tmp_path, num_agents
):
    overrides = ("env=Pendulum-v1", "steps=2", f"task.num_agents={num_agents}")
    overrides += ("task.normalize_observations=true", "task.squash_actions=true")
    result = run(tmp_path, *overrides)
    parts = make_parts(config(*overrides))
    agent = result.state.agents
    if num_agents > 1:
        agent = jax.tree.map(lambda leaf: leaf[0], agent)
    assert agent.used.number == 64
    assert agent.seen.number == 128
    observation, state = parts.environment.reset(jax.random.key(0))
    act, policy_fn = load_policy(tmp_path), normalizing(parts.policy_fn)
    for step in range(5):
        raw = observation * np.array(parts.environment.observation_scale)
        batch = {"observations": observation[None]}
        outputs = policy_fn((agent.params, agent.used), batch)
        expected = 2 * np.tanh(outputs["mean"][0])
        np.testing.assert_allclose(act(raw), expected, rtol=1e-4, atol=1e-6)
        new = parts.environment.step(jax.random.key(step), state, outputs["mean"][0])
        observation, state = new.observation, new.state
    # The checkpoint has the statistics.
    learner = PolicyLearner(config(*overrides))
    restored = Checkpoints(tmp_path / "checkpoints").restore_latest(learner.first_state)
    assert_same_bits(restored, result.state)
    assert learner.evaluate(restored)["test_return"] == result.metrics["test_return"]


@pytest.mark.parametrize("optimizer", ["trpo", "adam"])
def test_screen_shows_the_solver_of_the_policy_not_that_of_the_value(optimizer):
    natural = ("task.value.method=natural_gradient", f"optimizer={optimizer}")
    names = [column.name for column in PolicyLearner(config(*natural)).columns]
    assert ("solver_residual" in names) == (optimizer == "trpo")


def test_env_brings_its_numbers_and_the_command_line_has_the_last_word():
    chosen = make_config("task=trpo", "env=Pendulum-v1")
    assert (chosen.task.env, chosen.task.discount) == ("Pendulum-v1", 0.9)
    assert chosen.optimizer["name"] == "trpo"
    lengths = (chosen.optimizer["learning_rate"], chosen.optimizer["max_kl"])
    assert lengths == (None, 0.01)
    chosen = make_config("task=trpo", "optimizer=ppo", "env=Acrobot-v1", "steps=3")
    assert (chosen.optimizer["name"], chosen.task.env) == ("ppo", "Acrobot-v1")
    assert chosen.steps == 3
    assert make_config("task=regression", "optimizer=lbfgs").batch_size == 64


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch_size=66"], "`batch_size` must be a multiple of task.num_envs=4.*66"),
        (["batch_size=null"], "`batch_size` must be a multiple .* got None"),
        (["task.value.minibatch_size=48"], "`task.value.minibatch_size` must divide"),
        (["optimizer=ppo"], "`optimizer.minibatch_size` must divide batch_size=64"),
        (["eval_train_examples=5"], "`eval_train_examples` is about a training set"),
        (["stream_above=1"], "`stream_above` is about a training set"),
        (["distributed.num_processes=2"], "`distributed.num_processes` must be 1"),
        (["task.squash_actions=true"], "`task.squash_actions` must be false"),
        (["task.env=Nowhere-v0"], "`task.env` must be one of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        PolicyLearner(config(*overrides))


@pytest.mark.parametrize(
    "env", [path.stem for path in (CONFIG_DIR / "env").glob("*.yaml")]
)
def test_shipped_settings_of_every_environment_fit_each_other(env):
    chosen = read_config(compose_config(["task=trpo", f"env={env}"]))
    parts = make_parts(chosen)
    assert parts.environment.name == env
    assert parts.settings.num_envs * parts.num_steps == chosen.batch_size


def test_ppo_is_for_policies():
    with pytest.raises(ConfigError, match="`optimizer=ppo` is not for the task"):
        run_training(make_config("optimizer=ppo"), None, Console(quiet=True))
