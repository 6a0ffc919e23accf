"""Small races of real optimizers on the digits, and what they leave."""

import dataclasses
import json
import math
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.race.contestants import OptaxContestant
from experiments.race.kfac import KFACConfig, KFACContestant
from experiments.race.levels import best_peer_at, levels_table
from experiments.race.racing import Race, best_candidate
from experiments.race.report import write_report
from experiments.race.results import Result, Store
from experiments.race.table import race_table, summarize, verdicts
from experiments.race.timing import Trace
from experiments.running.optimizers import make_optimizer
from experiments.running.rates import cosine
from experiments.running.settings import ConfigError
from experiments.tasks import make_task, num_examples
from experiments.tasks.supervised.training import init_state, make_train_chunk
from tests.experiments.race.test_settings import entrant, read
from tests.marks import long_unless

SMALL = (
    "task=digits",
    "task.hidden_sizes=[8]",
    "batch_size=64",
    "seeds=2",
    "budget=0.05s",
    "eval_train_examples=100",
    "max_dispatch=10",
    "target=2.0",
    "entrants.sgd.grid.learning_rate=[0.03,0.3]",
    "+entrants.natural_gradient_defaults.seeds=1",
)


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("race")
    config, entrants = read(
        *SMALL, "only=[sgd,natural_gradient_defaults]", f"output={folder}"
    )
    lines = []
    return Race(config, entrants, lines.append).run(), config, entrants, lines


@pytest.mark.long
def test_all_start_from_the_same_parameters(raced):
    results, config, _, _ = raced
    assert [len(runs) for runs in results.values()] == [config.seeds, 1]
    assert len({runs[0].trace.losses[0] for runs in results.values()}) == 1
    assert len({run.trace.losses[0] for run in results["sgd"]}) == config.seeds


def test_every_entrant_learns_and_is_measured(raced):
    results, config, _, _ = raced
    assert list(results) == ["sgd", "natural_gradient_defaults"]
    for runs in results.values():
        for run in runs:
            assert run.trace.seconds[-1] >= config.seconds
            assert run.trace.losses[-1] < run.trace.losses[0]
            assert run.compile_seconds > 0
            assert run.peak_bytes > 8 * 65 * 4
            assert set(run.test) == {"loss", "accuracy"}


def test_a_race_goes_on_from_what_is_there(raced):
    results, config, entrants, _ = raced
    lines = []
    assert Race(config, entrants, lines.append).run() == results
    assert lines == []


def test_only_what_is_missing_is_run(raced):
    results, config, _, _ = raced
    more, entrants = read(*SMALL, "seeds=3", "only=[sgd]", f"output={config.output}")
    lines = []
    again = Race(more, entrants, lines.append).run()
    assert [line[:6] for line in lines] == ["seed 2"]
    assert again["sgd"][:2] == results["sgd"]


def test_other_conditions_make_another_race(raced):
    _, config, _, _ = raced
    store, settings = Store(Path(config.output), {"a": 1}), {"learning_rate": 0.3}
    run = result("sgd", 7, [2.0, 1.0])
    store.save(run, settings)
    assert store.load("sgd", 7, settings) == run
    assert store.load("sgd", 7, {"learning_rate": 0.1}) is None
    assert Store(Path(config.output), {"a": 2}).load("sgd", 7, settings) is None
    assert store.load("sgd", 6, settings) is None


def test_an_entrant_that_cannot_run_is_left_out(tmp_path):
    config, entrants = read(
        *SMALL,
        "only=[sgd]",
        "entrants.sgd.grid.learning_rate=[1e38,2e38]",
        f"output={tmp_path}",
    )
    lines = []
    assert Race(config, entrants, lines.append).run() == {}
    assert lines[-1] == "sgd is left out: all candidates of the grid have diverged"


@pytest.mark.skipif(find_spec("kfac_jax") is not None, reason="kfac-jax is installed")
def test_a_missing_kfac_jax_is_told():
    config, _ = read(*SMALL)
    task = make_task(config.task)
    with pytest.raises(ConfigError, match="kfac-jax cannot be imported"):
        KFACContestant(task, KFACConfig(1.0), task.train, batch_size=8, max_dispatch=1)


@pytest.mark.parametrize(
    ("batches_per_epoch", "schedule"),
    long_unless(
        [(2, "constant")],
        [(1, "constant"), (2, "constant"), (4, "cosine"), (9, "constant")],
    ),
)
def test_steps_of_a_contestant_are_those_of_the_training_program(
    batches_per_epoch, schedule
):
    one = entrant("adam", *SMALL)
    config, _ = read(*SMALL)
    task = make_task(config.task)
    data = jax.tree.map(jnp.asarray, task.train)
    batch_size = num_examples(data) // batches_per_epoch
    contestant = OptaxContestant(
        task,
        one.optimizer,
        data,
        batch_size=batch_size,
        max_dispatch=3,
        schedule=schedule,
    )
    state, _ = contestant.advance(contestant.start(5), 2, 0.4)
    state, loss = contestant.advance(state, 3, 0.4)

    rate = one.optimizer["learning_rate"]
    if schedule == "cosine":
        rate *= float(cosine(jnp.float32(0.4)))
    tx = make_optimizer({**one.optimizer, "learning_rate": rate}, task)
    chunk = make_train_chunk(
        task, tx, batch_size=batch_size, steps_per_dispatch=5, measure_kl=False
    )
    expected, records = chunk(init_state(task, tx, 5), data, jnp.int32(5))
    np.testing.assert_allclose(loss, records["loss"][-1], rtol=1e-5)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4),
        contestant.snapshot(state).params,
        expected.params,
    )


def test_kfac_jax_takes_steps_where_it_is_installed():
    pytest.importorskip("kfac_jax")
    config, _ = read(*SMALL)
    task = make_task(config.task)
    if jax.__version_info__ > (0, 9, 1):
        pytest.skip("kfac-jax 0.0.8 takes no step with this JAX")
    contestant = KFACContestant(
        task, KFACConfig(1.0), task.train, batch_size=64, max_dispatch=3
    )
    _, first = contestant.advance(contestant.start(0), 1, 0.0)
    _, loss = contestant.advance(contestant.start(0), 3, 0.0)
    assert loss < first


def test_tuning_takes_the_first_at_the_target_then_the_lowest():
    diverged = Trace([0, 1], [0.0, 1.0], [2.0, math.nan])
    slow = Trace([0, 9], [0.0, 9.0], [2.0, 0.5])
    fast = Trace([0, 9], [0.0, 3.0], [2.0, 0.9])
    assert best_candidate([diverged, slow, fast], 1.0) == 2
    assert best_candidate([diverged, slow, fast], 0.1) == 1
    assert best_candidate([diverged, slow, fast], None) == 1
    with pytest.raises(ConfigError, match="all candidates of the grid have diverged"):
        best_candidate([diverged], None)


def test_the_aim_is_where_the_best_first_order_peer_ends():
    runs = {
        "sgd": [result("sgd", seed, [8.0, 3.0]) for seed in range(3)],
        "adam": [result("adam", i, [8.0, x]) for i, x in enumerate([1.0, 2.0, 9.0])],
        "muon": [result("muon", 0, [8.0, math.nan])],
        "natural_gradient": [result("natural_gradient", 0, [8.0, 0.1])],
        "adamw": [],
    }
    assert best_peer_at(runs, 1.0) == (2.0, "adam")
    assert best_peer_at({name: runs[name] for name in ("muon", "adamw")}, 1.0) is None


def test_levels_are_those_of_the_best_peer_after_parts_of_its_training():
    slow, fast = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [9.0, 4.5, 4.4]
    ours = [9.0, 8.0, 7.0, 4.5, 1.0]
    runs = {
        "adam": [result("adam", 0, slow)],
        "sgd": [result("sgd", 0, fast, seconds=4.0)],
        "natural_gradient": [result("natural_gradient", 0, ours, seconds=0.5)],
    }
    table = levels_table(runs)
    assert [row[1:] for row in table.rows] == [
        ["8", "adam", "1, 1", "1, 0.5"],
        ["7", "adam", "2, 2", "2, 1"],
        ["4.5", "sgd", "1, 4", "3, 1.5"],
        ["1", "adam", "8, 8", "4, 2"],
    ]
    assert levels_table({"adam": runs["adam"]}) is None


def result(name, seed, losses, *, seconds=1.0):
    steps = list(range(len(losses)))
    trace = Trace(steps, [seconds * step for step in steps], losses)
    test = {"loss": 1.0, "accuracy": 0.5}
    return Result(name, seed, {}, trace, test, 1.0, None, 64, "here")


def test_medians_and_ranges_count_runs_that_never_arrive():
    runs = {
        "adam": [
            result("adam", 0, [8.0, 4.0, 2.0, 1.0]),
            result("adam", 1, [8.0, 4.0, 1.0]),
            result("adam", 2, [8.0, 8.0]),
        ],
        "natural_gradient": [
            result("natural_gradient", seed, [8.0, 1.0], seconds=2.0)
            for seed in range(3)
        ],
        "sgd": [result("sgd", seed, [8.0, 7.0]) for seed in range(3)],
    }
    summaries = summarize(runs, 1.0)
    assert summaries["adam"]["steps_to_target"] == [3.0, 2.0, math.inf]
    rows = {row[0]: row for row in race_table(summaries, title="", notes=[]).rows}
    assert rows["adam"][2] == "3 (2 - never)"
    assert rows["sgd"][2] == "0 of 3"
    assert rows["natural gradient"][2] == "1"
    lines = verdicts(summaries)
    assert any("1 against 3 of the best first-order peer (adam): 3" in x for x in lines)
    assert any("seconds: 2 against 3 of Adam" in line for line in lines)


def test_the_report_is_complete(raced):
    results, config, entrants, _ = raced
    folder = Path(config.output)
    text = write_report(results, config, entrants, folder)
    assert "| natural gradient defaults |" in text
    assert "sgd learning_rate 0.03 0.3" in text
    assert "natural_gradient_defaults ran from 1 of the seeds" in text
    content = json.loads((folder / "race.json").read_text())
    assert content["target"] == 2.0
    assert set(content["entrants"]) == set(results)
    for name in ("loss_steps.png", "loss_seconds.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    by_peers = dataclasses.replace(config, target="best_first_order")
    write_report(results, by_peers, entrants, folder)
    content = json.loads((folder / "race.json").read_text())
    assert content["target"] == best_peer_at(results, 1.0).loss
