"""The benchmark: its settings, clocks and contestants, by counts, not times."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import ngd_jax as ngd
from experiments.benchmarks.clocks import (
    compile_seconds,
    import_seconds,
    interleaved_seconds,
    operation_count,
)
from experiments.benchmarks.contestants import (
    check_taken,
    count_parameters,
    make_problem,
    natural_step,
    price_of_products,
    products,
    program_step,
    widths_of,
)
from experiments.benchmarks.products import network_name
from experiments.benchmarks.settings import BenchmarkConfig
from experiments.running.config import CONFIG_DIR, read_as
from experiments.running.settings import ConfigError


@pytest.fixture(scope="module")
def problem():
    return make_problem((64, 128, 64, 10), batch_size=256)


def run(*overrides):
    return subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", *overrides],
        check=False,
        capture_output=True,
        text=True,
    )


def read(*overrides):
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        tree = compose("benchmark", overrides=list(overrides))
    return read_as(OmegaConf.structured(BenchmarkConfig), tree)


def test_a_mistake_in_the_settings_ends_as_one_line():
    done = run("nope=1")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: `nope` is not a setting; there are table, output,")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("table=prices", "`table` must be all or one of products, solvers, trpo"),
        ("products.batch_size=-3", "`products.batch_size` must be at least 1, got -3"),
        ("products.networks=[[4]]", "must be lists of two or more positive widths"),
        (
            "solvers.cells=[[9,9]]",
            "`solvers.cells` must be lists [parameters, examples",
        ),
        ("nist.repeats=x", "`nist.repeats`"),
    ],
)
def test_mistakes_in_the_settings_name_the_setting(setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(setting)


def test_the_settings_that_ship_are_right():
    config = read()
    assert config.table == "products"


def test_operations_of_a_matrix_product_are_counted():
    x = jnp.ones((32, 32))
    assert operation_count(jnp.dot, x, x) == pytest.approx(2 * 32**3, rel=0.01)


def test_one_product_costs_at_most_five_thirds_of_a_gradient(problem):
    lone, further = price_of_products(problem)
    assert lone <= 1.67
    assert further <= 4 / 3


def test_products_are_those_of_the_library(problem):
    product = products(problem, 1)(problem.params, problem.batch, problem.vector)
    expected = ngd.fisher_vector_product(
        problem.model_fn,
        problem.params,
        problem.batch,
        ngd.Categorical(),
        problem.vector,
    )
    for ours, theirs in zip(
        jax.tree.leaves(product), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_every_contestant_is_called_as_often_as_the_others():
    calls = [0, 0]

    def make(index):
        def function():
            calls[index] += 1
            return jnp.zeros(())

        return function

    seconds = interleaved_seconds([make(0), make(1)], repeats=3, minimum=0.0)
    assert calls[0] == calls[1] == 2 + 3
    assert all(second > 0 for second in seconds)


def test_compile_seconds_compiles_what_is_made():
    def make():
        return lambda x: jnp.sin(x) + 1, (jnp.ones(3),)

    (seconds,) = compile_seconds([make], repeats=1)
    assert seconds > 0


def test_import_seconds_is_of_a_new_process():
    assert import_seconds("json.tool", after=("sys",), repeats=1) > 0
    assert "json.tool" not in sys.modules


def test_program_step_is_the_one_that_trains():
    train_chunk, args = program_step("adam")
    _, records = jax.eval_shape(train_chunk, *args)
    assert {"loss", "measured_kl"} <= set(records)


def test_column_names_count_the_parameters(problem):
    assert count_parameters(problem) == 17226
    assert network_name((4, 5, 3), 2) == "4-5-3 (43 parameters)"


@pytest.mark.parametrize("num_parameters", [1000, 100_000, 10_000_000])
@pytest.mark.parametrize("outputs", [1, 8])
def test_widths_give_about_the_parameters_asked_for(num_parameters, outputs):
    inputs, width, same, last = widths_of([num_parameters, 64, outputs])
    count = (inputs + 1) * width + (width + 1) * same + (same + 1) * last
    assert (same, last) == (width, outputs)
    assert abs(count / num_parameters - 1) < 0.1


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_loss_is_the_negative_log_likelihood(outputs):
    problem = make_problem((4, 5, outputs), batch_size=6)
    logits = problem.model_fn(problem.params, problem.batch)
    y = problem.batch["y"]
    if outputs == 1:
        expected = 0.5 * jnp.mean((logits - y) ** 2) + 0.5 * jnp.log(2 * jnp.pi)
    else:
        expected = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(6), y])
    loss = problem.loss_fn(problem.params, problem.batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_step_that_is_timed_goes_to_the_radius():
    problem = make_problem((4, 5, 3), batch_size=6)
    step, args = natural_step(problem, ngd.CG(max_steps=2, rtol=0.0))
    info = check_taken(step(*args)[1])
    assert 0 < float(info.measured_kl) <= 1e-2
    assert int(info.solver.num_steps) == 2


def test_a_refused_step_has_no_price():
    problem = make_problem((4, 5, 3), batch_size=6)
    bad = jax.tree.map(lambda x: x * jnp.nan, problem.params)
    step, (_, opt_state, batch) = natural_step(problem, ngd.CG(max_steps=2))
    with pytest.raises(RuntimeError):
        check_taken(step(bad, opt_state, batch)[1])
