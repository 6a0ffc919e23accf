"""The table of prices: its structure on one tiny network; times are never asserted."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import price
from experiments.benchmarks.clocks import compile_timed, value_in_process
from experiments.benchmarks.contestants import make_problem
from experiments.benchmarks.networks import NETWORKS
from experiments.benchmarks.settings import NETWORKS as NAMES
from experiments.benchmarks.settings import PriceSettings

SETTINGS = PriceSettings(
    networks=["mlp_small"], cached_network=None, steps=2, repeats=1
)
BLANK = price.Price(1.0, 100, 10, 1.0, 1.0, 4.0, 2.0)


def test_every_network_of_the_settings_is_made():
    assert tuple(NETWORKS) == NAMES


@pytest.mark.parametrize("name", ["cnn", "transformer_2"])
def test_networks_give_logits_for_their_labels(name):
    problem = NETWORKS[name]()
    logits = jax.eval_shape(problem.model_fn, problem.params, problem.batch)
    assert logits.shape[:-1] == problem.batch["y"].shape
    assert int(problem.batch["y"].max()) < logits.shape[-1]


@pytest.mark.long
def test_table_of_prices_has_a_row_for_each_optimizer(monkeypatch):
    tiny = functools.partial(make_problem, (4, 5, 3), 6)
    monkeypatch.setitem(NETWORKS, "mlp_small", tiny)
    (found,) = price.price_tables(SETTINGS)
    assert [row[1] for row in found.rows] == list(price.OPTIMIZERS)
    for row in found.rows:
        assert len(row) == len(found.head)
        # With 43 parameters even the counters of a state show in two decimals.
        assert all(float(cell.replace(",", "")) > 0 for cell in row[2:])
    adam = dict(zip(found.head, found.rows[0], strict=True))
    assert adam["× Adam's"] == "1.00"
    assert float(adam["state / P"]) == pytest.approx(2, abs=0.05)  # and a counter
    assert float(adam["memory / P"]) > 3


def test_growth_is_between_programs_at_twice_the_depth():
    larger = BLANK._replace(num_instructions=250)
    prices = {
        "transformer_2": dict.fromkeys(price.OPTIMIZERS, BLANK),
        "transformer_4": dict.fromkeys(price.OPTIMIZERS, larger),
    }
    found = price.growth_table(prices)
    assert list(found.head) == ["optimizer", "transformer_2 → transformer_4"]
    assert [list(row) for row in found.rows] == [[o, "2.50"] for o in price.OPTIMIZERS]


def test_instructions_are_those_of_the_optimized_program():
    compiled, _ = compile_timed(lambda x: jnp.sin(x) + jnp.cos(x), (jnp.ones(3),))
    instructions, fusions = price.count_instructions(compiled)
    assert fusions == 1
    assert instructions == len(re.findall(" = ", compiled.as_text()))


def test_a_process_of_its_own_has_the_environment_that_it_is_given():
    assert value_in_process("math", "hypot", [3, 4]) == 5
    assert value_in_process("os", "getenv", ["PRICE"], {"PRICE": "7"}) == 7


@pytest.mark.slow
def test_first_steps_are_taken_in_processes_that_share_a_cache():
    found = price.cache_table("mlp_small")
    assert [row[0] for row in found.rows] == ["Adam", "default"]
    assert all(float(cell) > 0 for row in found.rows for cell in row[1:])
