"""The losses that the best first-order peer reaches, and when the others reach them.

    L(s) = min over peers of median over seeds of the loss after a share s of training

A single target shows who gets there first; four show whether that holds throughout the
training.
"""

import bisect
import math
import statistics
from typing import NamedTuple

from experiments.benchmarks.markdown import Table
from experiments.race.results import Result
from experiments.race.table import FIRST_ORDER, OURS

__all__ = ["SHARES", "Level", "best_peer_at", "levels_table"]

SHARES = {"an eighth": 0.125, "a quarter": 0.25, "half": 0.5, "all": 1.0}


class Level(NamedTuple):
    """A loss, and the peer that sets it.

    Attributes:
      loss: L(s).
      peer: name of the entrant that reaches it.
    """

    loss: float
    peer: str


def best_peer_at(results: dict[str, list[Result]], share: float) -> Level | None:
    """The lowest median loss of a first-order peer after a share of its training.

    The loss of a run is that of its last evaluation by then. A diverged run counts as
    infinitely bad. None if there are no peers, or all of them have diverged.
    """
    levels = [
        Level(statistics.median(_loss_at(run, share) for run in results[name]), name)
        for name in FIRST_ORDER
        if results.get(name)
    ]
    best = min(levels, default=None)
    return best if best is not None and math.isfinite(best.loss) else None


def levels_table(results: dict[str, list[Result]]) -> Table | None:
    """Median steps and seconds to each level; None without peers or without us."""
    ours = [name for name in OURS if results.get(name)]
    levels = [best_peer_at(results, share) for share in SHARES.values()]
    if not ours or None in levels:
        return None
    rows = [
        [
            share,
            f"{level.loss:.4g}",
            level.peer.replace("_", " "),
            *(_medians(results[name], level.loss) for name in (level.peer, *ours)),
        ]
        for share, level in zip(SHARES, levels, strict=True)
        if level is not None
    ]
    head = ["of the budget", "loss", "best peer", "it: steps, seconds"]
    head += [f"{name.replace('_', ' ')}: steps, seconds" for name in ours]
    return Table("what the best first-order peer comes to, and when", head, rows)


def _loss_at(run: Result, share: float) -> float:
    if run.trace.diverged:
        return math.inf
    end = share * run.trace.seconds[-1]
    return run.trace.losses[bisect.bisect_right(run.trace.seconds, end) - 1]


def _medians(runs: list[Result], loss: float) -> str:
    steps, seconds = zip(*(run.trace.reached(loss) for run in runs), strict=True)
    median = statistics.median(steps)
    if math.isinf(median):
        return "–"
    return f"{median:.0f}, {statistics.median(seconds):.3g}"
