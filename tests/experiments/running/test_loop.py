import dataclasses
import io
import json
import math
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from experiments.running.config import compose_config, read_config
from experiments.running.loop import describe_result, run_training
from experiments.running.run_folder import read_json_lines
from experiments.running.schedule import next_stop
from experiments.running.settings import ConfigError
from tests.experiments.helpers import (
    OPTIMIZERS,
    assert_same_bits,
    last_state,
    make_config,
    train,
    train_config,
)

CONFIG = make_config()
FILES = {
    ".lock",
    "checkpoints",
    "config.yaml",
    "curves.png",
    "environment.json",
    "metrics.jsonl",
    "result.json",
    "tensorboard",
    "timings.jsonl",
}


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_python_looks_again_at_every_interval_and_at_the_end(step, k, n, m):
    config = dataclasses.replace(
        CONFIG, steps=51, steps_per_dispatch=k, eval_every=n, checkpoint_every=m
    )
    stop = next_stop(step, config)
    assert step < stop <= min(51, step + k)
    for between in range(step + 1, stop):
        assert all(between % every for every in (k, n, m))


# L-BFGS takes long to compile; the quick tests of the training step have it.
CHOICES = [
    "natural_gradient",
    pytest.param("lbfgs", marks=pytest.mark.slow),
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in OPTIMIZERS
        if name not in ("natural_gradient", "lbfgs")
    ),
]


@pytest.fixture(scope="module", params=CHOICES)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = make_config(f"optimizer={request.param}", "batch_size=64")
    return config, folder, train_config(config, folder)


class TestEveryOptimizer:
    def test_leaves_everything_in_one_folder(self, run):
        _, folder, _ = run
        assert {path.name for path in folder.iterdir()} == FILES

    def test_writes_one_line_for_each_step(self, run):
        config, folder, _ = run
        records = read_json_lines(folder / "metrics.jsonl")
        assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
        for record in records:
            assert {"loss", "accuracy", "measured_kl"} <= record.keys()
            assert all(math.isfinite(value) for value in record.values())
            # Evaluated at every third step.
            is_evaluated = record["step"] in (3, 6)
            assert ("train_loss" in record) == is_evaluated
            assert ("test_accuracy" in record) == is_evaluated
            assert ("max_kl" in record) == ("max_kl" in config.optimizer)

    def test_result_is_that_of_the_last_line(self, run):
        _, folder, result = run
        written = json.loads((folder / "result.json").read_text())
        last = read_json_lines(folder / "metrics.jsonl")[-1]
        names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
        for name in names:
            assert written[name] == last[name] == result.metrics[name]
        assert (written["steps"], result.finished) == (6, True)

    def test_last_checkpoint_is_the_last_state(self, run):
        config, folder, result = run
        assert_same_bits(last_state(config, folder), result.state)

    def test_timings_never_fall_and_are_apart_from_the_metrics(self, run):
        _, folder, result = run
        times = read_json_lines(folder / "timings.jsonl")
        assert times[-1]["step"] == 6
        seconds = [record["seconds"] for record in times]
        assert seconds == sorted(seconds)
        assert seconds[-1] == pytest.approx(result.seconds, abs=1e-5)

    def test_resumes_to_the_same_bits(self, run, tmp_path):
        """What a kill leaves: logs that reach past the checkpoint, cut short."""
        config, folder, result = run
        resumed = tmp_path / "resumed"
        shutil.copytree(folder, resumed)
        (resumed / "checkpoints" / "6.sha256").unlink()
        metrics = resumed / "metrics.jsonl"
        metrics.write_bytes(metrics.read_bytes()[:-10])
        assert_same_bits(train_config(config, resumed).state, result.state)
        assert metrics.read_bytes() == (folder / "metrics.jsonl").read_bytes()

    def test_radius_is_kept_where_there_is_one(self, run):
        config, folder, _ = run
        for record in read_json_lines(folder / "metrics.jsonl"):
            if "max_kl" in record:
                assert record["measured_kl"] <= 1.05 * config.optimizer["max_kl"]


@pytest.mark.long
def test_without_a_checkpoint_it_starts_again_and_writes_the_same_bytes(tmp_path):
    first = train(tmp_path, "optimizer=sgd")
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    again = train(tmp_path, "optimizer=sgd")
    assert_same_bits(again.state, first.state)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.long
def test_going_further_equals_having_gone_there_at_once(tmp_path):
    whole = train(tmp_path / "whole", "optimizer=sgd", "steps=9")
    train(tmp_path / "parts", "optimizer=sgd", "steps=5")
    parts = train(tmp_path / "parts", "optimizer=sgd", "steps=9")
    assert_same_bits(parts.state, whole.state)


def test_resuming_a_finished_run_tells_its_result_again(tmp_path):
    first = train(tmp_path, "optimizer=sgd")
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    again = train(tmp_path, "optimizer=sgd")
    assert again.metrics == first.metrics
    assert again.seconds == pytest.approx(first.seconds, abs=1e-5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_steps_below_those_taken_are_an_error(tmp_path):
    train(tmp_path, "optimizer=sgd")
    with pytest.raises(ConfigError, match="`steps` must be at least the 6 steps"):
        train(tmp_path, "optimizer=sgd", "steps=3")


def test_batch_larger_than_the_training_set_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="`batch_size` must be at most the 1437"):
        train(tmp_path / "new", "optimizer=sgd", "batch_size=1438")
    assert not (tmp_path / "new").exists()


def test_a_diverging_run_ends_with_a_result_and_valid_json(tmp_path):
    result = train(tmp_path, "optimizer=sgd", "optimizer.learning_rate=1e38")
    assert result.metrics["train_loss"] is None
    assert "not finite" in describe_result(result, make_config(), tmp_path)
    text = describe_result(result, make_config("task=trpo"), tmp_path)
    assert text.startswith("trpo, seed 0: ")
    assert read_json_lines(tmp_path / "metrics.jsonl")[-1]["loss"] is None
    assert (tmp_path / "curves.png").exists()


def test_screen_shows_the_kl_of_every_step(tmp_path):
    console = Console(record=True, width=100, file=io.StringIO())
    config = make_config("optimizer=sgd")
    run_training(config, tmp_path, console)
    rows = [line.split() for line in console.export_text().splitlines()[2:]]
    records = read_json_lines(tmp_path / "metrics.jsonl")
    assert [int(row[0]) for row in rows] == [record["step"] for record in records]
    for row, record in zip(rows, records, strict=True):
        assert float(row[3]) == pytest.approx(record["measured_kl"], rel=1e-2)


@pytest.mark.long
def test_a_residual_that_is_not_computed_is_left_out(tmp_path):
    train(tmp_path, "optimizer/solver=kfac", "steps=1")
    (record,) = read_json_lines(tmp_path / "metrics.jsonl")
    assert "solver_residual" not in record
    assert "damping" in record


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_shipped_defaults_reach_the_promised_quality(tmp_path, seed):
    config = read_config(compose_config([f"seed={seed}"]))
    metrics = train_config(config, tmp_path).metrics
    assert metrics["train_loss"] <= 1e-3
    assert metrics["test_accuracy"] >= 0.975
