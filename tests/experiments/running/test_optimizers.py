import jax
import jax.numpy as jnp
import pytest

import ngd_jax as ngd
from experiments.running.optimizers import make_optimizer, make_solver, read_step_info
from experiments.running.settings import ConfigError
from experiments.tasks import make_task
from tests.experiments.helpers import make_config


def test_natural_gradient_without_any_length_of_step_is_an_error():
    config = make_config("optimizer.learning_rate=null", "optimizer.max_kl=null")
    with pytest.raises(ConfigError, match="cannot both be null"):
        make_optimizer(config.optimizer, make_task(config.task))


def test_a_configuration_that_no_optimizer_has_is_an_error():
    config = make_config()
    with pytest.raises(TypeError, match="No optimizer is built from"):
        make_optimizer(config.task, make_task(config.task))


WORDS = {
    "lsmr": ["solver=lsmr"],
    "sample_space": ["solver=sample_space", "momentum=0.9"],
    "cholesky": ["solver=cholesky", "damping_rule=relative"],
    "auto": ["solver=auto", "warm_start=0.9"],
    "jacobi": ["cg.preconditioner=jacobi", "damping_rule=levenberg_marquardt"],
    "nystrom": ["cg.preconditioner=nystrom", "metric_examples=8", "microbatch_size=4"],
    "kronecker": ["cg={max_steps: 3, preconditioner: kronecker}"],
    "kfac": ["solver=kfac", "learning_rate=null", "rate_rule=quadratic_model"],
    "kfac of exact length": ["solver=kfac", "momentum=0.9"],
    "levenberg_marquardt in output space": [
        "solver=sample_space",
        "damping_rule=levenberg_marquardt",
        "damping=1",
    ],
}


@pytest.mark.parametrize("name", WORDS)
def test_a_word_changes_the_solver(name):
    overrides = [f"optimizer.{word}" for word in WORDS[name]]
    config = make_config("task.hidden_sizes=[2]", *overrides)
    task = make_task(config.task)
    tx = make_optimizer(config.optimizer, task)
    params, _ = task.init_fn(jax.random.key(0))
    batch = jax.tree.map(lambda leaf: leaf[:16], task.train)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(task.loss_fn)(params, batch)
        updates, state = tx.update(
            grads, state, params, batch=batch, value=value, value_fn=task.loss_fn
        )
        return jax.tree.map(jnp.add, params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(3):
        params, state, value = step(params, state)
        values.append(float(value))
        assert read_step_info(state)["status"] == 0
    assert values[-1] < values[0]


def test_kfac_is_as_long_as_its_rate_rule_needs():
    counts = ["optimizer.cg.refresh_every=7", "optimizer.cg.observe_every=3"]
    words = ["optimizer.solver=kfac", *counts]
    by_rule = ["optimizer.learning_rate=null", "optimizer.rate_rule=quadratic_model"]
    for changes, is_exact in ([], True), (by_rule, False):
        solver = make_solver(make_config(*words, *changes).optimizer)
        assert isinstance(solver, ngd.KFAC)
        assert (solver.refresh_every, solver.observe_every) == (7, 3)
        assert solver.exact_length == is_exact


@pytest.mark.parametrize("word", ["cg.preconditioner=jacobi", "warm_start=0.9"])
def test_a_setting_of_cg_is_not_for_other_solvers(word):
    config = make_config("optimizer.solver=kfac", f"optimizer.{word}")
    name = word.split("=")[0].replace(".", r"\.")
    with pytest.raises(ConfigError, match=rf"`optimizer\.{name}` is for"):
        make_solver(config.optimizer)


def test_a_rule_that_needs_damping_says_so():
    config = make_config("optimizer.damping=0", "optimizer.damping_rule=relative")
    with pytest.raises(
        ConfigError, match=r"`optimizer\.damping` must be positive with"
    ):
        make_optimizer(config.optimizer, make_task(config.task))


@pytest.mark.parametrize("name", ["min_decrease", "max_halvings"])
def test_halvings_and_the_decrease_they_are_for_come_together(name):
    config = make_config(f"optimizer.{name}=0")
    with pytest.raises(
        ConfigError, match=r"`optimizer\.max_halvings` must be a number"
    ):
        make_optimizer(config.optimizer, make_task(config.task))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_peer_lowers_the_loss(name):
    losses = descend(make_config(f"optimizer={name}"), num_steps=4)
    assert losses[-1] < losses[0]


def test_defaults_are_those_of_the_library():
    config = make_config("optimizer=natural_gradient_defaults", "optimizer.max_kl=0.1")

    def plainly(_, task):
        return ngd.natural_gradient(1.0, task.model_fn, task.likelihood, max_kl=0.1)

    assert descend(config, num_steps=2) == descend(config, 2, plainly)


def descend(config, num_steps, make=make_optimizer):
    task = make_task(config.task)
    tx = make(config.optimizer, task)
    params, _ = task.init_fn(jax.random.key(0))
    batch = jax.tree.map(lambda leaf: leaf[:64], task.train)

    @jax.jit
    def step(params, state):
        grads = jax.grad(task.loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return jax.tree.map(jnp.add, params, updates), state

    state, losses = tx.init(params), []
    for _ in range(num_steps):
        params, state = step(params, state)
        losses.append(float(task.loss_fn(params, batch)))
    return losses


@pytest.mark.parametrize("words", [["learning_rate=1.0"], ["momentum=0.9"]])
def test_the_quadratic_model_leaves_no_rate_to_choose(words):
    overrides = ["learning_rate=null", "rate_rule=quadratic_model", *words]
    config = make_config(*(f"optimizer.{word}" for word in overrides))
    with pytest.raises(ConfigError, match=r"`optimizer\.rate_rule=quadratic_model`"):
        make_optimizer(config.optimizer, make_task(config.task))
