"""The table of a race: medians over seeds, with the smallest and the largest value.

A run that has not reached the target counts as infinitely long; if it is part of the
median, the cell says how many runs have reached it.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from experiments.benchmarks.markdown import Table
from experiments.race.results import Result

__all__ = ["FIRST_ORDER", "OURS", "race_table", "summarize", "verdicts"]

# What the natural gradient is compared with.
FIRST_ORDER = ("sgd", "adam", "adamw", "muon")
OURS = ("natural_gradient_defaults", "natural_gradient")

Summary = dict[str, Any]


def summarize(
    results: dict[str, list[Result]], target: float | None
) -> dict[str, Summary]:
    """Returns the figures of each entrant: `{name: {figure: [value of each seed]}}`.

    `settings`, `batch_size` and `environment` are those of the first seed.
    """
    return {
        name: {
            "steps_to_target": [run.trace.reached(target)[0] for run in runs],
            "seconds_to_target": [run.trace.reached(target)[1] for run in runs],
            "steps": [run.trace.steps[-1] for run in runs],
            "final_loss": [run.trace.losses[-1] for run in runs],
            "test_loss": [run.test["loss"] for run in runs],
            "test_metric": [_metric(run)[1] for run in runs],
            "metric": _metric(runs[0])[0],
            "peak_bytes": [run.peak_bytes for run in runs],
            "compile_seconds": [run.compile_seconds for run in runs],
            "settings": runs[0].settings,
            "batch_size": runs[0].batch_size,
            "environment": runs[0].environment,
        }
        for name, runs in results.items()
        if runs
    }


def race_table(
    summaries: dict[str, Summary], *, title: str, notes: Sequence[str]
) -> Table:
    """The table for the reader."""
    metric = next((summary["metric"] for summary in summaries.values()), "loss")
    head = ["", "tuned", "steps to target", "seconds to target", "steps taken"]
    head += ["final loss", f"test {metric.replace('_', ' ')}", "memory, MB"]
    head += ["compiling, s"]
    rows = [
        [
            name.replace("_", " "),
            ", ".join(f"{key} {value}" for key, value in summary["settings"].items()),
            _spread(summary["steps_to_target"], "{:.0f}".format),
            _spread(summary["seconds_to_target"], "{:.3g}".format),
            _spread(summary["steps"], "{:.0f}".format),
            _spread(summary["final_loss"], "{:.4g}".format),
            _spread(summary["test_metric"], "{:.4g}".format),
            _spread(
                [None if x is None else x / 1e6 for x in summary["peak_bytes"]],
                "{:.0f}".format,
            ),
            f"{summary['compile_seconds'][0]:.1f}",
        ]
        for name, summary in summaries.items()
    ]
    return Table(title, head, rows, notes=notes)


def verdicts(summaries: dict[str, Summary]) -> list[str]:
    """Sentences that compare the medians of the natural gradient with the others."""
    lines = []
    for ours in (name for name in OURS if name in summaries):
        for figure in ("steps_to_target", "seconds_to_target"):
            own = statistics.median(summaries[ours][figure])
            unit = figure.partition("_")[0]
            rivals = {
                "the best first-order peer": _best(summaries, FIRST_ORDER, figure),
                "Adam": _best(summaries, ("adam",), figure),
                "kfac-jax": _best(summaries, ("kfac_jax",), figure),
            }
            for words, (name, value) in rivals.items():
                if name is not None and (words != "Adam" or unit == "seconds"):
                    lines.append(_compare(ours, own, words, name, value, unit))
    return lines


def _best(
    summaries: dict[str, Summary], names: Sequence[str], figure: str
) -> tuple[str | None, float]:
    medians = {
        name: statistics.median(summaries[name][figure])
        for name in names
        if name in summaries
    }
    best = min(medians, key=lambda name: medians[name], default=None)
    return best, math.inf if best is None else medians[best]


def _compare(
    ours: str, own: float, words: str, name: str, value: float, unit: str
) -> str:
    subject, rival = ours.replace("_", " "), f"{words} ({name})"
    if math.isinf(own) and math.isinf(value):
        return f"{subject}, {unit}: neither it nor {rival} reached the target."
    if math.isinf(own):
        return f"{subject}, {unit}: not reached; {rival} {value:.3g}."
    if math.isinf(value):
        return f"{subject}, {unit}: {own:.3g}; {rival} did not reach it."
    ratio = f"{value / own:.3g} times fewer"
    if own > value:
        ratio = f"{own / value:.3g} times as many"
    return f"{subject}, {unit}: {own:.3g} against {value:.3g} of {rival}: {ratio}."


def _metric(run: Result) -> tuple[str, float]:
    names = [name for name in run.test if name != "loss"]
    name = names[0] if names else "loss"
    return name, run.test[name]


def _spread(values: Sequence[Any], write: Callable[[float], str]) -> str:
    """`median (smallest - largest)`; a dash if nothing is known."""
    if any(value is None for value in values):
        return "–"
    values = [math.inf if math.isnan(value) else value for value in values]
    finite = [value for value in values if math.isfinite(value)]
    median = statistics.median(values)
    if math.isinf(median):
        return f"{len(finite)} of {len(values)}"
    texts = write(median), write(min(values)), write(max(values))
    if len(set(texts)) == 1:
        return texts[0]
    return f"{texts[0]} ({texts[1]} - {texts[2].replace('inf', 'never')})"
