import json

import numpy as np
import pytest
from rich.console import Console

from experiments.running.sweep import Run, draw_sweep, label_runs, sweep_table


@pytest.fixture
def make_run(tmp_path):
    def make(loss=None, **overrides):
        folder = tmp_path / "-".join(overrides.values())
        folder.mkdir()
        words = {name.replace("__", "."): value for name, value in overrides.items()}
        if loss is not None:
            (folder / "result.json").write_text(json.dumps({"train_loss": loss}))
            lines = [json.dumps({"step": n, "loss": loss + 3 - n}) for n in (1, 2, 3)]
            (folder / "metrics.jsonl").write_text("\n".join(lines))
        return Run(words, folder)

    return make


def text_of(table):
    console = Console(width=200, record=True)
    console.print(table)
    return console.export_text()


def test_runs_that_differ_in_the_seed_are_one_setting(make_run):
    runs = [
        make_run(loss, task="digits", optimizer__max_kl=radius, seed=seed)
        for radius, seed, loss in [("0.1", "0", 1.0), ("0.1", "1", 3.0), ("1", "0", 2)]
    ]
    groups = label_runs(runs)
    assert groups == {"max_kl=0.1": runs[:2], "max_kl=1": runs[2:]}
    assert list(label_runs(runs[:2])) == ["all runs"]


def test_names_with_one_end_are_written_whole(make_run):
    runs = [
        make_run(1.0, a__rate=first, b__rate=second) for first, second in ["12", "34"]
    ]
    assert list(label_runs(runs)) == ["a.rate=1 b.rate=2", "a.rate=3 b.rate=4"]


def test_the_table_has_medians_ranges_and_the_best(make_run):
    losses = {("1", "0"): 4.0, ("1", "1"): 0.5, ("1", "2"): 3.0, ("2", "0"): 2.0}
    runs = [make_run(loss, rate=rate, seed=s) for (rate, s), loss in losses.items()]
    runs.append(make_run(None, rate="2", seed="1"))
    text = text_of(sweep_table(label_runs(runs)))
    assert "* lowest median of train loss" in text
    lines = text.splitlines()
    [first] = [number for number, line in enumerate(lines) if "rate=1" in line]
    assert lines[first].split() == ["rate=1", "3", "of", "3", "3"]
    assert "0.5..4" in lines[first + 1]
    [second] = [line for line in lines if "rate=2 *" in line]
    assert "1 of 2" in second


def test_what_is_not_finite_is_never_the_best(make_run, tmp_path):
    runs = [make_run(2.0, rate="1", seed="0"), make_run(0.0, rate="2", seed="0")]
    (runs[1].folder / "result.json").write_text('{"train_loss": null}')
    text = text_of(sweep_table(label_runs(runs)))
    assert "rate=1 *" in text
    assert "not finite" in text
    assert sweep_table(label_runs([make_run(None, rate="3", seed="0")])) is None


def test_the_picture_has_a_line_for_each_setting(make_run, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "experiments.running.sweep.write_figure",
        lambda figure, _: figures.append(figure),
    )
    runs = [make_run(loss, rate="1", seed=str(loss)) for loss in (1.0, 2.0, 6.0)]
    runs.append(make_run(5.0, rate="2", seed="0"))
    draw_sweep(label_runs(runs), tmp_path / "sweep.png")
    [axis] = figures[0].axes
    lines = axis.get_lines()
    assert [line.get_label() for line in lines] == ["rate=1 (3)", "rate=2 (1)"]
    np.testing.assert_array_equal(lines[0].get_ydata(), [4.0, 3.0, 2.0])
    np.testing.assert_array_equal(lines[0].get_xdata(), [1, 2, 3])


def test_runs_that_diverged_are_drawn_as_far_as_they_go(make_run, tmp_path, recwarn):
    runs = [make_run(1.0, rate="1", seed="0"), make_run(1.0, rate="2", seed="0")]
    for run, losses in zip(runs, ([3.0, None], [None, None]), strict=True):
        lines = [json.dumps({"step": n, "loss": x}) for n, x in enumerate(losses)]
        (run.folder / "metrics.jsonl").write_text("\n".join(lines))
    draw_sweep(label_runs(runs), tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    assert not [str(one.message) for one in recwarn if "NaN" in str(one.message)]
