"""What the command line of a race may say."""

import pytest
from hydra import compose, initialize_config_dir

from experiments.race.settings import (
    candidates,
    check_task,
    read_compare,
    with_settings,
)
from experiments.running.config import CONFIG_DIR
from experiments.running.settings import ConfigError
from tests.marks import long_unless

RACES = CONFIG_DIR / "race"


def read(*overrides):
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        return read_compare(compose("compare", overrides=list(overrides)))


def entrant(name, *overrides):
    _, (one,) = read(f"only=[{name}]", *overrides)
    return one


def test_a_task_brings_its_batches_and_its_target():
    config, entrants = read("task=imbalance", "seeds=2", "budget=7s")
    assert config.seconds == 7.0
    assert config.batch_size is None
    assert config.fixed_target is None
    assert config.target == "best_first_order"
    assert [one.name for one in entrants] == config.only


@pytest.mark.parametrize(
    "task",
    long_unless(
        {"digits", "vae"},
        sorted({path.stem for path in RACES.glob("*.yaml")} - {"own"}),
    ),
)
def test_every_task_has_a_race_of_its_own(task):
    config, _ = read(f"task={task}")
    assert config.target == "best_first_order"


def test_a_target_is_a_number_or_a_rule():
    assert read("target=-1.2")[0].fixed_target == -1.2
    assert read("target=null")[0].fixed_target is None


def test_budgets_are_seconds_with_or_without_a_unit():
    assert read("budget=2.5")[0].seconds == 2.5
    assert read("budget=2.5s")[0].seconds == 2.5


def test_lbfgs_sees_the_whole_training_set():
    assert entrant("lbfgs").batch_size is None
    assert entrant("adam").batch_size == 256
    assert entrant("lbfgs", "entrants.lbfgs.batch_size=100").batch_size == 100


def test_a_grid_is_all_combinations():
    one = entrant(
        "adam",
        "entrants.adam.grid.learning_rate=[0.1,0.2]",
        "+entrants.adam.grid.b1=[0.5,0.9]",
    )
    rates = [with_settings(one.optimizer, some) for some in candidates(one)]
    assert [(some["learning_rate"], some["b1"]) for some in rates] == [
        (0.1, 0.5),
        (0.1, 0.9),
        (0.2, 0.5),
        (0.2, 0.9),
    ]
    assert candidates(entrant("natural_gradient", "task=digits")) == [{}]


def test_a_grid_reaches_settings_inside_of_others():
    one = entrant("natural_gradient")
    changed = with_settings(one.optimizer, {"solver.max_steps": 3})
    assert changed["solver"]["max_steps"] == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget=fast"], "`budget` must be seconds"),
        (["budget=-1s"], "`budget` must be seconds"),
        (["target=low"], "`target` must be a finite number, best_first_order or null"),
        (["+entrants.adam.seeds=4"], "`entrants.adam.seeds` must be between 1 and the"),
        (["only=[adam,magic]"], "`only` must name entrants, .* got magic"),
        (["seeds=5", "tuning.seed=4"], "`tuning.seed` must not be one of"),
        (["+entrants.adam.rate=1"], "`entrants.adam.rate` is not a setting"),
        (["entrants.adam.optimizer._target_=x"], "`entrants.adam.optimizer._target_`"),
        (["entrants.adam.grid.learning_rate=1"], "must be a list of values, got 1"),
        (["+entrants.adam.grid.b3=[1]"], "`b3` in a grid is not a setting"),
        (
            ["entrants.adam.grid.learning_rate=[-1]"],
            r"`entrants\.adam\.optimizer\.learning_rate` must be positive",
        ),
        (
            ["entrants.adam.grid.learning_rate=[low]"],
            "`entrants.adam.optimizer.learning",
        ),
        (
            ["+entrants.adam.optimizer.b3=1"],
            "`entrants.adam.optimizer.b3` is not a set",
        ),
        (["clock=sun"], "`clock` must be one of cpu, wall"),
        (["task._target_=x"], "`task._target_` must name what can be"),
    ],
)
def test_mistakes_are_told(overrides, message):
    with pytest.raises(ConfigError, match=message):
        read(*overrides)


def test_a_task_of_ones_own_has_a_race():
    config, entrants = read(
        "task=own",
        "task._target_=tests.experiments.tasks.test_own:make_narrow",
    )
    assert config.task.width == 3
    assert entrants[-1].optimizer["name"] == "natural_gradient"


def test_what_has_no_training_loss_is_refused():
    policies = "experiments.tasks.policies.settings.PolicyConfig"
    with pytest.raises(ConfigError, match="has no training loss that all optimizers"):
        read(f"task._target_={policies}")


@pytest.mark.parametrize("task", ["trpo", "pinn", "vmc"])
def test_a_task_without_a_race_is_refused_with_those_that_have_one(task):
    check_task(["seeds=2", "task=charlm"])
    with pytest.raises(ConfigError, match=f"`task={task}` .* there are autoencoder, "):
        check_task([f"task={task}"])
