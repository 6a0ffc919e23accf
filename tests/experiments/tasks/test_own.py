"""Problems of a user, named on the command line as module:function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf

from experiments.running.config import compose_config, read_config
from experiments.running.settings import ConfigError
from experiments.tasks import make_task
from experiments.tasks.equations.learner import PhysicsLearner
from experiments.tasks.equations.problems import make_problem
from experiments.tasks.policies.environments import make_environment
from experiments.tasks.supervised.digits import make_digits
from experiments.tasks.wave_functions.hamiltonians import make_ising, make_system
from experiments.tasks.wave_functions.learner import WaveFunctionLearner
from tests.experiments.helpers import SMALL, train_config

HERE = __name__


def make_narrow(width: int = 3):
    return dataclasses.replace(make_digits([width]), name="narrow")


def make_nothing(*_, **__):
    return None


def make_untyped(sizes=(2,)):
    return make_digits(list(sizes))


def steep():
    return dataclasses.replace(make_problem("heat1d"), name="steep")


def antiferromagnet(num_spins, field=0.5):
    system = make_ising(num_spins, field)
    return dataclasses.replace(system, diagonal=lambda s: -system.diagonal(s))


def slow_pole():
    import gymnax

    env, params = gymnax.make("CartPole-v1")
    return env, params.replace(force_mag=1.0)


def configure(*words):
    return read_config(compose_config([*words]))


@pytest.mark.long
def test_a_task_trains_with_the_arguments_of_its_function(tmp_path):
    words = (f"task={HERE}:make_narrow", *SMALL[1:])
    assert configure(*words).task.width == 3
    config = configure(*words, "+task.width=5")
    assert (config.task.name, config.task.width) == ("narrow", 5)
    result = train_config(config, tmp_path)
    assert result.finished
    kernels = jax.tree.leaves(result.state.params)
    assert (64, 5) in {leaf.shape for leaf in kernels}
    resumed = read_config(OmegaConf.load(tmp_path / "config.yaml"))
    assert resumed == config


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("+task.width=many", "`task.width`: Value 'many' .* Integer"),
        ("+task.depth=5", "`task.depth` is not a setting; there are name, width"),
        ("task._target_=no_such_module:thing", "`task._target_` must name what can be"),
    ],
)
def test_what_the_function_does_not_take_is_named(word, message):
    with pytest.raises(ConfigError, match=message):
        configure(f"task={HERE}:make_narrow", word)


def test_a_function_without_types_takes_what_comes():
    config = configure(f"task={HERE}:make_untyped", "+task.sizes=[2,3]")
    assert len(make_task(config.task).init_fn(jax.random.key(0))[0]) == 3


def test_an_equation_is_solved_on_its_own_box():
    words = ("task=pinn", f"problem={HERE}:steep", "task.boundary=120")
    learner = PhysicsLearner(configure(*words))
    assert learner.problem.name == "steep"
    error = learner.evaluate(learner.first_state)["test_l2_error"]
    assert np.isfinite(error)
    assert error > 0


def test_a_hamiltonian_has_its_own_field_unless_one_is_given():
    name = f"{HERE}:antiferromagnet"
    spins = jnp.ones((1, 4))
    for field, expected in (None, -0.5), (2.0, -2.0):
        system = make_system(name, 4, field)
        assert system.diagonal(spins) == 4
        np.testing.assert_allclose(system.connected(spins)[1], expected)
    assert make_system("heisenberg", 4, None).conserves_magnetisation
    config = configure("task=vmc", f"task.hamiltonian={name}", "task.num_spins=4")
    learner = WaveFunctionLearner(config)
    assert learner.evaluate(learner.first_state)["test_energy_error"] > 0


def test_an_environment_is_made_by_the_function():
    pytest.importorskip("gymnax")
    environment = make_environment(f"{HERE}:slow_pole")
    assert environment.constants.force_mag == 1.0
    assert environment.num_actions == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_problem, "must name a function that makes a Problem"),
        (lambda name: make_system(name, 4, None), "that makes a SpinSystem, but"),
        (make_environment, "that makes a gymnax environment and"),
        (lambda name: make_task(configure(f"task={name}").task), "must make an exp"),
    ],
    ids=["problem", "system", "environment", "task"],
)
def test_what_makes_something_else_is_told(make, message):
    if "gymnax" in message:
        pytest.importorskip("gymnax")
    with pytest.raises(ConfigError, match=message):
        make(f"{HERE}:make_nothing")
