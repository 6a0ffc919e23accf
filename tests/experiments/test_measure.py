"""The benchmark: operation counts, which no load can change, and its tables."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from experiments.measure.clocks import (
    compile_seconds,
    import_seconds,
    interleaved_seconds,
    operation_count,
)
from experiments.measure.contestants import (
    count_parameters,
    make_problem,
    products,
    program_step,
)
from experiments.measure.tables import Figure, network_name, write_markdown


@pytest.fixture(scope="module")
def problem():
    return make_problem((64, 128, 64, 10), batch_size=256)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("nope=1", "`nope` is not a setting"),
        ("batch_size=-3", "`batch_size` must be at least 1, got -3"),
        ("networks=[[4]]", "`networks` must be lists of two or more positive widths"),
        ("repeats=x", "`repeats`"),
    ],
)
def test_mistakes_in_the_settings_end_as_one_line(setting, message):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmark", setting],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_operations_of_a_matrix_product_are_counted():
    x = jnp.ones((32, 32))
    assert operation_count(jnp.dot, x, x) == pytest.approx(2 * 32**3, rel=0.01)


def test_one_product_costs_at_most_five_thirds_of_a_gradient(problem):
    args = (problem.params, problem.batch, problem.vector)
    gradient = operation_count(jax.value_and_grad(problem.loss_fn), *args[:2])
    once, twice = (operation_count(products(problem, k), *args) for k in (1, 2))
    assert once / gradient <= 1.67
    assert (twice - once) / gradient <= 4 / 3


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


def test_table_says_which_goals_are_missed():
    columns = {"small": [Figure("met", 1.0, 2.0), Figure("missed", 3.0, 2.0)]}
    markdown = write_markdown(columns, [Figure("without a goal", 0.5)])
    assert "| met | 1 | ≤ 2 |" in markdown
    assert "| missed | 3 (missed) | ≤ 2 |" in markdown
    assert "| without a goal | 0.5 |  |" in markdown
    assert jax.__version__ in markdown


def test_column_names_count_the_parameters(problem):
    assert count_parameters(problem) == 17226
    assert network_name((64, 128, 64, 10), 2) == "64-128-64-10 (17,226 parameters)"
