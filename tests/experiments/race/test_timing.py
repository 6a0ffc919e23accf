"""Traces, turns and the clock, with a training that needs no model."""

import math

import pytest

from experiments.race.contestants import Snapshot
from experiments.race.timing import Run, Trace, race


class Clock:
    """A clock that advances only when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Halving:
    """Halves its loss at each step, which takes the given seconds."""

    compile_seconds, peak_bytes = 0.0, None

    def __init__(self, clock, seconds, *, log=None, fails_at=None, max_dispatch=1000):
        self.clock, self.seconds, self.log = clock, seconds, log
        self.fails_at, self.max_dispatch = fails_at, max_dispatch

    def start(self, seed):  # noqa: ARG002
        return 0

    def advance(self, step, num_steps, progress):  # noqa: ARG002
        assert 1 <= num_steps <= self.max_dispatch
        self.clock.now += num_steps * self.seconds
        if self.log is not None:
            self.log.append(self)
        step += num_steps
        return step, self._loss(step)

    def _loss(self, step):
        failed = self.fails_at is not None and step >= self.fails_at
        return math.nan if failed else 0.5**step

    def snapshot(self, step):
        return Snapshot(self._loss(step), {})


def start(contestant, clock, *, budget=10.0):
    def evaluate(snapshot):
        clock.now += 100.0  # does not count
        return snapshot.params

    return Run(contestant, evaluate, seed=0, budget=budget, clock=clock)


def test_seconds_are_those_of_training_alone():
    clock = Clock()
    run = start(Halving(clock, 0.25), clock)
    race([run], turn=1.0)
    assert run.trace.seconds[-1] == 10.0
    assert run.trace.steps[-1] == 40
    for steps, seconds, loss in zip(
        run.trace.steps, run.trace.seconds, run.trace.losses, strict=True
    ):
        assert seconds == 0.25 * steps
        assert loss == 0.5**steps


def test_a_run_ends_with_the_step_that_spends_its_budget():
    clock = Clock()
    run = start(Halving(clock, 3.0), clock)
    race([run], turn=1.0)
    assert run.trace.steps[-1] == 4
    assert run.trace.seconds[-1] == 12.0


def test_dispatches_hold_no_more_steps_than_they_may():
    clock = Clock()
    run = start(Halving(clock, 1e-4, max_dispatch=7), clock, budget=0.1)
    race([run], turn=0.1)
    assert run.trace.steps[-1] == pytest.approx(1000, abs=7)


def test_contestants_alternate():
    clock, log = Clock(), []
    fast, slow = (Halving(clock, seconds, log=log) for seconds in (0.1, 1.0))
    race([start(fast, clock), start(slow, clock)], turn=1.0)
    turns = [one for one, last in zip(log, [None, *log], strict=False) if one != last]
    assert turns == [fast, slow] * 10


def test_a_training_that_diverges_is_over():
    clock = Clock()
    run = start(Halving(clock, 0.1, fails_at=5), clock)
    race([run], turn=1.0)
    assert run.trace.diverged
    assert run.trace.steps[-1] < 20


def test_the_target_is_reached_between_two_evaluations():
    trace = Trace([0, 10, 20], [0.0, 1.0, 3.0], [4.0, 2.0, 0.5])
    steps, seconds = trace.reached(1.0)  # the middle of 2 and ½, by their logarithms
    assert steps == pytest.approx(15.0)
    assert seconds == pytest.approx(2.0)
    assert trace.reached(0.4) == (math.inf, math.inf)
    assert trace.reached(None) == (math.inf, math.inf)


def test_losses_below_zero_are_no_obstacle():
    trace = Trace([0, 10], [0.0, 1.0], [1.0, -1.0])
    assert trace.reached(-0.5) == (pytest.approx(7.5), pytest.approx(0.75))


def test_the_first_crossing_counts():
    trace = Trace([0, 1, 2, 3], [0.0, 1.0, 2.0, 3.0], [2.0, 1.0, 3.0, 0.5])
    assert trace.reached(1.0) == (1.0, 1.0)
