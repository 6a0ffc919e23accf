import dataclasses

import pytest
from omegaconf import OmegaConf

from experiments.running.build import locate
from experiments.running.config import (
    CONFIG_DIR,
    compose_config,
    describe_error,
    expand,
    merge_resumed,
    read_config,
)
from experiments.running.settings import ConfigError


def read(*overrides):
    return read_config(compose_config(list(overrides)))


def files_of(group):
    return {path.stem for path in (CONFIG_DIR / group).glob("*.yaml")}


@pytest.mark.parametrize("name", sorted(files_of("task") - {"own"}))
def test_every_task_has_a_file_that_says_what_makes_it(name):
    task = read(f"task={name}").task
    assert task.name == name
    assert callable(locate(vars(task)["_target_"], "task"))


def test_short_forms_of_the_command_line_are_written_out():
    assert expand(["task=my.module:make_thing", "seed=1"]) == [
        *("task=own", "task._target_=my.module:make_thing", "task.name=thing"),
        "seed=1",
    ]
    assert expand(["env=Catch-bsuite", "env=CartPole-v1"]) == [
        *("task.env=Catch-bsuite", "env=CartPole-v1"),
    ]
    assert expand(["task=my:a,my:b"]) == ["task=my:a,my:b"]
    assert expand(["problem=my:law", "env=a,b"]) == ["task.problem=my:law", "env=a,b"]


@pytest.mark.parametrize("name", sorted(files_of("optimizer")))
def test_every_file_of_an_optimizer_makes_one(name):
    if name == "psgd_kron":
        pytest.importorskip("rollfast")
    assert read(f"optimizer={name}").optimizer["name"] == name


def test_default_run_is_natural_gradient_on_digits_in_a_hundred_steps():
    config = read()
    assert (config.task.name, config.optimizer["name"]) == (
        "digits",
        "natural_gradient",
    )
    assert (config.steps, config.batch_size, config.seed) == (100, 256, 0)


def test_overrides_reach_nested_settings_with_their_types():
    config = read("optimizer.solver.max_steps=3", "batch_size=null")
    assert config.optimizer["solver"]["max_steps"] == 3
    assert config.batch_size is None


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("steps=-1", ["`steps`", "at least 1", "-1"]),
        ("steps=0", ["`steps`", "at least 1"]),
        ("steps=abc", ["`steps`", "abc", "Integer"]),
        ("steps=1.5", ["`steps`", "1.5", "Integer"]),
        ("steps=true", ["`steps`", "True", "Integer"]),
        ("steps=null", ["`steps`"]),
        ("steps=???", ["`steps`", "no value"]),
        ("seed=-1", ["`seed`", "-1"]),
        ("batch_size=0", ["`batch_size`", "at least 1"]),
        ("optimizer.max_kl=-0.1", ["`optimizer.max_kl`", "positive", "-0.1"]),
        ("optimizer.max_kl=nan", ["`optimizer.max_kl`", "a number", "nan"]),
        ("optimizer.max_kl=big", ["`optimizer.max_kl`", "big", "a number"]),
        ("optimizer.max_kl=[1]", ["`optimizer.max_kl`"]),
        ("optimizer.momentum=1", ["`optimizer.momentum`", "[0, 1)"]),
        ("optimizer.solver.max_steps=0", ["`optimizer.solver.max_steps`", "least 1"]),
        ("optimizer.solver=kfac", ["`optimizer.solver`", "`optimizer/solver=kfac`"]),
        ("task.hidden_sizes=[8,-1]", ["`task.hidden_sizes`", "at least 1"]),
        ("task.hidden_sizes=8", ["`task.hidden_sizes`"]),
        ("measure_kl=maybe", ["`measure_kl`", "maybe"]),
        ("optimizer.learning_rate=${sed}", ["`optimizer.learning_rate`", "sed"]),
        ("~optimizer.learning_rate", ["`optimizer`", "'learning_rate'"]),
        ("~task", ["`task._target_`", "None"]),
        ("optimizer._target_=adamm", ["`optimizer._target_`", "adamm"]),
        ("optimizer.max_lk=1", ["`optimizer.max_lk`", "not a setting"]),
        ("+optimizer.max_lk=1", ["`optimizer.max_lk`", "which has", "max_kl"]),
        ("step=1", ["`step`", "not a setting"]),
        ("optimizer=adamm", ["optimizer/adamm", "natural_gradient", "sgd"]),
        ("task=cifar", ["task/cifar", "digits"]),
        ("optimizer=null", ["group", "None"]),
        ("a b", ["a b"]),
        ("resume=[a", ["resume=[a"]),
    ],
)
def test_mistake_becomes_one_line_that_names_it(override, names):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        read(override)
    message = describe_error(caught.value)
    assert message is not None
    assert "\n" not in message
    assert all(name in message for name in names), message


def test_error_that_is_not_about_the_configuration_is_left_alone():
    assert describe_error(ValueError("the training broke")) is None


def test_reading_what_was_read_changes_nothing():
    config = read("optimizer=lbfgs", "seed=3")
    again = read_config(
        OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config)))
    )
    assert dataclasses.asdict(again) == dataclasses.asdict(config)


def test_lbfgs_sees_the_whole_training_set_unless_told_otherwise():
    assert read("optimizer=lbfgs").batch_size is None
    assert read("optimizer=lbfgs", "batch_size=64").batch_size == 64


class TestMergeResumed:
    def merge(self, recorded, *overrides):
        recorded = compose_config(list(recorded))
        names = [override.partition("=")[0] for override in overrides]
        merge_resumed(recorded, compose_config(list(overrides)), names)
        return recorded

    def test_takes_what_changes_no_number(self):
        merged = self.merge(
            ["steps=10", "seed=3"], "steps=20", "checkpoint_every=7", "log_every=5"
        )
        assert (merged.steps, merged.checkpoint_every, merged.log_every) == (20, 7, 5)
        assert merged.seed == 3

    def test_leaves_alone_what_the_command_line_does_not_say(self):
        recorded = ["optimizer=adam", "optimizer.learning_rate=0.5", "steps=7"]
        merged = self.merge(recorded, "resume=somewhere", "runs_dir=elsewhere")
        assert merged.optimizer.learning_rate == 0.5
        assert (merged.steps, merged.resume) == (7, None)

    def test_takes_an_override_that_says_what_is_so(self):
        merged = self.merge(["optimizer=adam"], "optimizer=adam", "seed=0")
        assert merged.optimizer.name == "adam"

    @pytest.mark.parametrize(
        "override",
        ["seed=1", "optimizer=adam", "batch_size=8", "optimizer/solver=kfac"],
    )
    def test_refuses_what_would_make_it_another_run(self, override):
        name = override.partition("=")[0]
        with pytest.raises(ConfigError, match=f"cannot change `{name}` from"):
            self.merge([], override)

    def test_refuses_a_setting_that_the_run_does_not_have(self):
        with pytest.raises(ConfigError, match=r"cannot change `optimizer.max_kl`"):
            self.merge(["optimizer=adam"], "optimizer.max_kl=1")
