import jax
import jax.numpy as jnp
import pytest

import ngd_jax as ngd
from experiments.running.config import CONFIG_DIR
from experiments.running.optimizers import (
    check_optimizer,
    make_optimizer,
    read_step_info,
)
from experiments.running.settings import ConfigError
from experiments.tasks import make_task
from tests.experiments.helpers import make_config
from tests.marks import long_unless


def test_natural_gradient_without_any_length_of_step_is_an_error():
    with pytest.raises(ConfigError, match="are both None"):
        make_config("optimizer.learning_rate=null", "optimizer.max_kl=null")


def test_what_makes_no_transformation_is_an_error():
    config = make_config("optimizer=ppo")
    with pytest.raises(ConfigError, match="`optimizer=ppo` is not for the task digits"):
        make_optimizer(config.optimizer, make_task(config.task))


WORDS = {
    "lsmr": ["/solver=lsmr"],
    "sample_space": ["/solver=sample_space", ".momentum=0.9"],
    "cholesky": ["/solver=cholesky", "/damping=relative"],
    "auto": ["/solver=auto"],
    "warm start": [".solver.warm_start=0.9"],
    "jacobi": ["/solver/preconditioner=jacobi", "/damping=levenberg_marquardt"],
    "nystrom": [
        "/solver/preconditioner=nystrom",
        ".metric={examples: 8, microbatch_size: 4}",
    ],
    "kronecker": ["/solver=cg_kronecker"],
    "kfac": [
        *("/solver=kfac", ".solver.exact_length=false"),
        "/learning_rate=quadratic_model",
    ],
    "kfac of exact length": ["/solver=kfac", ".momentum=0.9"],
    "levenberg_marquardt in output space": [
        *("/solver=sample_space", "/damping=levenberg_marquardt"),
        ".damping.initial=1",
    ],
    "acceptance": ["/accept=sufficient_decrease"],
}


# The others name solvers whose own tests take their arguments.
QUICK = ("kronecker", "kfac", "levenberg_marquardt in output space", "acceptance")


@pytest.mark.parametrize("name", long_unless(QUICK, WORDS.keys()))
def test_a_word_changes_the_solver(name):
    overrides = [f"optimizer{word}" for word in WORDS[name]]
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


@pytest.mark.parametrize(
    "path", sorted((CONFIG_DIR / "optimizer").glob("*/**/*.yaml")), ids=lambda p: p.stem
)
def test_every_file_of_a_group_can_be_chosen(path):
    group = path.parent.relative_to(CONFIG_DIR)
    if group.name == "base":
        pytest.skip("is part of the others")
    config = make_config(f"{group}={path.stem}")
    node = config.optimizer
    for name in group.parts[1:]:
        node = node[name]
    assert node["_target_"] in path.read_text() or path.stem == "truncated_cg"


@pytest.mark.parametrize(
    "optimizer",
    ["trpo", "npg", "stochastic_reconfiguration", "energy_natural_gradient"],
)
def test_a_group_goes_before_the_number_that_it_replaces(optimizer):
    rules = ["damping=levenberg_marquardt", "learning_rate=quadratic_model"]
    groups = [f"optimizer/{rule}" for rule in (*rules, "solver=kfac")]
    config = make_config(f"optimizer={optimizer}", *groups)
    assert config.optimizer["damping"]["_target_"] == "ngd_jax.LevenbergMarquardt"
    rate = config.optimizer["learning_rate"]["_target_"]
    assert rate == "ngd_jax.contrib.QuadraticModelRate"
    assert config.optimizer["solver"]["_target_"] == "ngd_jax.KFAC"


def test_a_metric_of_some_examples_is_of_so_many():
    with pytest.raises(ConfigError, match=r"`optimizer\.metric\.examples` must be"):
        make_config("optimizer.metric.examples=0")
    settings = make_config("optimizer.metric.examples=2").optimizer["metric"]
    metric = check_optimizer({"name": "metric", **settings})
    assert metric.batch_fn({"x": jnp.ones(5)})["x"].shape == (2,)


@pytest.mark.parametrize("name", ["adamw", "muon", "psgd_kron"])
def test_a_peer_lowers_the_loss(name):
    if name == "psgd_kron":
        pytest.importorskip("rollfast")
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


def test_the_quadratic_model_leaves_no_momentum_to_choose():
    words = ["optimizer/learning_rate=quadratic_model", "optimizer.momentum=0.9"]
    with pytest.raises(ConfigError, match=r"`optimizer\.momentum` is chosen by"):
        make_config(*words)
