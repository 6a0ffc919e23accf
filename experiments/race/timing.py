"""Training runs that take turns on one clock, which stops while they are evaluated.

    trace: after n steps and t seconds of training, the loss on the training set was L

On a machine with other work, the speed varies over time; contestants that alternate are
all affected alike.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from experiments.race.contestants import Contestant, Snapshot

__all__ = ["CLOCKS", "Run", "Trace", "race"]

CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}

# Spacing of evaluations, as shares of the budget and of the time so far: dense enough
# to know the time of a crossing to a few percent.
_CLOSEST, _SPREAD = 0.001, 0.08


@dataclasses.dataclass
class Trace:
    """The recorded history of a training run.

    Attributes:
      steps: taken up to each evaluation.
      seconds: training time up to each evaluation.
      losses: on the training set.
    """

    steps: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)

    @property
    def diverged(self) -> bool:
        """Whether a loss was NaN or infinite."""
        return not all(map(math.isfinite, self.losses))

    def reached(self, target: float | None) -> tuple[float, float]:
        """Steps and seconds until the loss was first at most `target`, or infinity.

        Between two evaluations, the logarithm of the loss is interpolated linearly, or
        the loss itself if one of the two is not positive.
        """
        if target is None:
            return math.inf, math.inf
        for index, loss in enumerate(self.losses):
            if loss <= target:
                return self._crossing(index, target)
        return math.inf, math.inf

    def _crossing(self, index: int, target: float) -> tuple[float, float]:
        if index == 0:
            return float(self.steps[0]), self.seconds[0]
        before, after = self.losses[index - 1 : index + 1]
        if not math.isfinite(before):
            part = 1.0
        elif min(before, after, target) > 0:
            part = math.log(before / target) / math.log(before / after)
        else:
            part = (before - target) / (before - after)
        steps = self.steps[index - 1 : index + 1]
        seconds = self.seconds[index - 1 : index + 1]
        return (
            max(1.0, steps[0] + part * (steps[1] - steps[0])),
            seconds[0] + part * (seconds[1] - seconds[0]),
        )


class Run:
    """One training run of one contestant.

    Args:
      contestant: the optimizer.
      evaluate: maps a snapshot of the model to its loss on the training set.
      seed: for initial parameters and batches.
      budget: seconds of training.
      clock: returns the time in seconds.
    """

    def __init__(
        self,
        contestant: Contestant,
        evaluate: Callable[[Snapshot], float],
        *,
        seed: int,
        budget: float,
        clock: Callable[[], float],
    ):
        self._contestant, self._evaluate = contestant, evaluate
        self._budget, self._clock = budget, clock
        self._state: Any = contestant.start(seed)
        self._step, self._seconds, self._pace = 0, 0.0, math.inf
        self.trace = Trace()
        self._look()

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent or the training has diverged."""
        return self._seconds >= self._budget or self.trace.diverged

    @property
    def snapshot(self) -> Snapshot:
        """The current model."""
        return self._contestant.snapshot(self._state)

    def take_turn(self, seconds: float) -> None:
        """Trains for `seconds` more, or to the end."""
        end = min(self._seconds + seconds, self._budget)
        while self._seconds < end and not self.is_over:
            self._advance(min(end, self._next_look) - self._seconds)
            if self._seconds >= min(self._next_look, self._budget):
                self._look()

    def _advance(self, seconds: float) -> None:
        # Rounded down: time left for a part of a step does not justify an overrun.
        count = int(min(max(seconds / self._pace, 1), self._contestant.max_dispatch))
        start = self._clock()
        progress = self._seconds / self._budget
        self._state, loss = self._contestant.advance(self._state, count, progress)
        spent = self._clock() - start
        self._step, self._seconds = self._step + count, self._seconds + spent
        self._pace = max(spent, 1e-9) / count
        if not math.isfinite(loss):
            self._look()

    def _look(self) -> None:
        self.trace.steps.append(self._step)
        self.trace.seconds.append(self._seconds)
        self.trace.losses.append(self._evaluate(self.snapshot))
        self._next_look = self._seconds + max(
            _CLOSEST * self._budget, _SPREAD * self._seconds
        )


def race(runs: Sequence[Run], *, turn: float) -> None:
    """Trains all, in turns of `turn` seconds, until each is over."""
    while not all(run.is_over for run in runs):
        for run in runs:
            run.take_turn(turn)
