"""What a race writes into its folder: `race.md`, `race.json` and two plots."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.benchmarks.markdown import describe_environment, write_table
from experiments.claims.drawing import finish, new_figure
from experiments.race.levels import best_peer_at, levels_table
from experiments.race.results import Result, write_whole
from experiments.race.settings import BY_PEERS, CompareConfig, Entrant
from experiments.race.table import race_table, summarize, verdicts

__all__ = ["plot_race", "write_report"]

# Distinguishable without colour vision, together with the order of the legend.
COLORS = {
    "natural_gradient_defaults": "#6baed6",
    "natural_gradient": "#08519c",
    "sgd": "#fdae6b",
    "adam": "#238b45",
    "adamw": "#a1d99b",
    "muon": "#d94801",
    "lbfgs": "#636363",
    "kfac_jax": "#7a0177",
}


def write_report(
    results: dict[str, list[Result]],
    config: CompareConfig,
    entrants: list[Entrant],
    folder: Path,
) -> str:
    """Writes everything; returns the Markdown."""
    target = config.fixed_target
    if config.target == BY_PEERS and (level := best_peer_at(results, 1.0)):
        target = level.loss
    summaries = summarize(results, target)
    aim = "" if target is None else f", target {target:.4g}"
    table = race_table(
        summaries,
        title=f"{config.task.name}: {config.seconds:g} s a run, {config.seeds} seeds"
        f"{aim}",
        notes=_notes(config, results, summaries),
    )
    lines = verdicts(summaries)
    text = "\n".join([write_table(table), *(f"- {line}" for line in lines), ""])
    if (levels := levels_table(results)) is not None:
        text += "\n" + write_table(levels)
    text += "\nGrids: " + "; ".join(_describe_grid(entrant) for entrant in entrants)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "race.md", text + ".\n")
    content = {"budget": config.seconds, "target": target, "entrants": summaries}
    write_whole(folder / "race.json", json.dumps(_finite(content), indent=1))
    for kind in ("steps", "seconds"):
        plot_race(results, config, target, kind, folder / f"loss_{kind}.png")
    return text + "."


def plot_race(
    results: dict[str, list[Result]],
    config: CompareConfig,
    target: float | None,
    kind: str,
    path: Path,
) -> None:
    """Draws the losses over `kind`, "steps" or "seconds": medians and ranges."""
    figure, (axis,) = new_figure()
    everything = []
    for name, runs in results.items():
        if runs:
            everything += _draw(axis, name, runs, kind)
    if target is not None:
        axis.axhline(target, color="black", lw=0.8, ls=":", label="target")
    if everything and min(everything) > 0:
        axis.set_yscale("log")
    linear = 10 if kind == "steps" else config.seconds / 100
    axis.set_xscale("symlog", linthresh=linear)
    axis.set_xlim(left=0)
    unit = "steps" if kind == "steps" else f"seconds of training ({config.clock})"
    finish(
        axis,
        config.task.name,
        f"{unit}, logarithmic from {linear:g} on",
        "loss on the training set",
    )
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, format="png")
    draft.replace(path)


def _draw(axis: Axes, name: str, runs: list[Result], kind: str) -> list[float]:
    curves = [(getattr(run.trace, kind), run.trace.losses) for run in runs]
    # Only where all runs have data, or the median would jump where a run ends.
    points = np.unique(np.concatenate([x for x, _ in curves]))
    points = points[points <= min(x[-1] for x, _ in curves)]
    losses = np.array([np.interp(points, x, y) for x, y in curves])
    color = COLORS.get(name)
    (line,) = axis.plot(
        points, np.median(losses, 0), color=color, label=name.replace("_", " ")
    )
    axis.fill_between(
        points, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.2, lw=0
    )
    return losses[np.isfinite(losses)].tolist()


def _notes(
    config: CompareConfig, results: dict[str, list[Result]], summaries: dict[str, Any]
) -> list[str]:
    here = describe_environment()
    notes = [
        (
            f"{here}, one thread, float32; medians over seeds, smallest and largest in "
            f"brackets; `k of n` runs reached the target. Seconds are {config.clock} "
            f"seconds of training, without compiling and evaluating. The loss is that "
            f"of {config.eval_train_examples or 'all'} training examples. Memory is "
            f"what XLA plans for a step, without the data."
        )
    ]
    if config.target == BY_PEERS:
        notes.append(
            "The target is the lowest median of a first-order peer at the end of its "
            "budget."
        )
    sizes = {summary["batch_size"] for summary in summaries.values()}
    for name, summary in summaries.items():
        if len(sizes) > 1 and summary["batch_size"] != config.batch_size:
            notes.append(f"{name} has batches of {summary['batch_size']} examples.")
        if (count := len(results[name])) < config.seeds:
            notes.append(f"{name} ran from {count} of the seeds.")
        if summary["environment"] != here:
            notes.append(f"{name} ran separately, under {summary['environment']}.")
    return notes


def _describe_grid(entrant: Entrant) -> str:
    values = ", ".join(
        f"{name} {' '.join(map(str, values))}" for name, values in entrant.grid.items()
    )
    return f"{entrant.name} {values or 'none'}"


def _finite(value: Any) -> Any:
    """JSON has no infinity, so it becomes null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
