"""The whole race: tune each entrant, then train all of them, seed by seed.

Tuning: each candidate of the grid trains for a share of the budget, with a seed that is
not raced. Candidates that reach a given target are ranked first, by the seconds that
they need; the others follow, by their last loss. If the target is the result of the
peers, it is not known during tuning, and the last loss decides.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.markdown import describe_environment
from experiments.race.contestants import (
    Contestant,
    OptaxContestant,
    Snapshot,
    batch_size_of,
)
from experiments.race.kfac import KFACConfig, KFACContestant
from experiments.race.results import Result, Store
from experiments.race.settings import CompareConfig, Entrant, candidates, with_settings
from experiments.race.timing import CLOCKS, Run, Trace, race
from experiments.running.optimizers import check_optimizer
from experiments.running.settings import ConfigError
from experiments.tasks import Task, make_task
from experiments.tasks.supervised.training import make_evaluate_fn

__all__ = ["Race", "best_candidate"]

PyTree = Any


def best_candidate(traces: Sequence[Trace], target: float | None) -> int:
    """Returns the index of the best candidate by the tuning rule.

    Raises:
      ConfigError: all candidates have diverged.
    """

    def rank(index: int) -> tuple[float, float]:
        trace = traces[index]
        if trace.diverged:
            return math.inf, math.inf
        return trace.reached(target)[1], trace.losses[-1]

    best = min(range(len(traces)), key=rank)
    if traces[best].diverged:
        raise ConfigError("all candidates of the grid have diverged")
    return best


class Race:
    """A race under one configuration.

    Args:
      config: its settings.
      entrants: the optimizers that take part.
      tell: called with each line about the progress.
    """

    def __init__(
        self,
        config: CompareConfig,
        entrants: Sequence[Entrant],
        tell: Callable[[str], None],
    ):
        self.config, self.entrants, self._tell = config, entrants, tell
        self.task: Task = make_task(config.task)
        self._data = jax.tree.map(jnp.asarray, self.task.train)
        self._judged = jax.tree.map(
            lambda leaf: leaf[: config.eval_train_examples], self.task.train
        )
        self._evaluate_on = make_evaluate_fn(
            self.task, batch_size=config.eval_batch_size
        )
        self.store = Store(Path(config.output), self._conditions())
        self._made: dict[str, Contestant] = {}

    def run(self) -> dict[str, list[Result]]:
        """Does the runs that are not on the disk yet; returns all, by entrant and seed.

        An entrant that cannot run is reported and left out.
        """
        tuned = {}
        for entrant in self.entrants:
            try:
                tuned[entrant.name] = self._tune(entrant)
            except ConfigError as error:
                self._tell(f"{entrant.name} is left out: {error}")
        for seed in range(self.config.seeds):
            waiting = [
                entrant
                for entrant in self.entrants
                if entrant.name in tuned
                and seed < entrant.seeds
                and self._load(entrant, seed, tuned[entrant.name]) is None
            ]
            if waiting:
                self._race(waiting, tuned, seed)
        return {
            entrant.name: list(self._results(entrant, tuned[entrant.name]))
            for entrant in self.entrants
            if entrant.name in tuned
        }

    def _race(
        self, entrants: Sequence[Entrant], tuned: dict[str, dict[str, Any]], seed: int
    ) -> None:
        contestants = [self._make(one, tuned[one.name]) for one in entrants]
        runs = [
            self._start(contestant, seed, self.config.seconds)
            for contestant in contestants
        ]
        race(runs, turn=self.config.seconds / self.config.turns)
        for entrant, contestant, run in zip(entrants, contestants, runs, strict=True):
            settings = tuned[entrant.name]
            result = Result(
                entrant=entrant.name,
                seed=seed,
                settings=settings,
                trace=run.trace,
                test=self._evaluate(run.snapshot, self.task.test),
                compile_seconds=contestant.compile_seconds,
                peak_bytes=contestant.peak_bytes,
                batch_size=batch_size_of(entrant.batch_size, self._data),
                environment=describe_environment(),
            )
            self.store.save(result, self._all_settings(entrant, settings))
            self._tell(f"seed {seed}: {entrant.name} {self._describe(run.trace)}")

    def _tune(self, entrant: Entrant) -> dict[str, Any]:
        tries, traces = candidates(entrant), []
        if len(tries) == 1:
            if self._load(entrant, 0, tries[0]) is None:
                self._make(entrant, tries[0])  # to check that it can run
            return tries[0]
        for candidate in tries:
            settings = self._all_settings(entrant, candidate)
            trace = self.store.load_tuning(entrant.name, settings)
            if trace is None:
                trace = self._try(entrant, candidate)
                self.store.save_tuning(entrant.name, settings, trace)
            traces.append(trace)
        return tries[best_candidate(traces, self.config.fixed_target)]

    def _try(self, entrant: Entrant, candidate: dict[str, Any]) -> Trace:
        budget = self.config.tuning.share * self.config.seconds
        run = self._start(
            self._make(entrant, candidate), self.config.tuning.seed, budget
        )
        run.take_turn(budget)
        self._tell(f"tuning {entrant.name} {candidate}: {self._describe(run.trace)}")
        return run.trace

    def _make(self, entrant: Entrant, candidate: dict[str, Any]) -> Contestant:
        # A program compiled for tuning need not be compiled again for the race.
        name = f"{entrant.name} {candidate}"
        if name not in self._made:
            optimizer = with_settings(entrant.optimizer, candidate)
            built = check_optimizer(optimizer)
            more = {}
            if isinstance(built, KFACConfig):
                make = functools.partial(KFACContestant, self.task, built)
            else:
                make = functools.partial(OptaxContestant, self.task, optimizer)
                more = {"schedule": self.config.schedule}
            self._made[name] = make(
                self._data,
                batch_size=entrant.batch_size,
                max_dispatch=self.config.max_dispatch,
                **more,
            )
        return self._made[name]

    def _start(self, contestant: Contestant, seed: int, budget: float) -> Run:
        return Run(
            contestant,
            lambda snapshot: self._evaluate(snapshot, self._judged)["loss"],
            seed=seed,
            budget=budget,
            clock=CLOCKS[self.config.clock],
        )

    def _evaluate(self, snapshot: Snapshot, data: PyTree) -> dict[str, float]:
        return self._evaluate_on(snapshot, data)  # pyright: ignore[reportArgumentType]

    def _results(self, entrant: Entrant, settings: dict[str, Any]) -> Iterator[Result]:
        for seed in range(entrant.seeds):
            result = self._load(entrant, seed, settings)
            assert result is not None  # it has been run
            yield result

    def _load(
        self, entrant: Entrant, seed: int, settings: dict[str, Any]
    ) -> Result | None:
        return self.store.load(
            entrant.name, seed, self._all_settings(entrant, settings)
        )

    def _all_settings(
        self, entrant: Entrant, changes: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            **with_settings(entrant.optimizer, changes),
            "batch_size": batch_size_of(entrant.batch_size, self._data),
        }

    def _conditions(self) -> dict[str, Any]:
        config = self.config
        task = dataclasses.asdict(config.task)
        for place in ("data_dir", "cache_dir"):  # where the data is, not what it is
            task.pop(place, None)
        return {
            "task": task,
            "budget": config.seconds,
            "clock": config.clock,
            "schedule": config.schedule,
            "tuning": dataclasses.asdict(config.tuning),
            "eval_train_examples": config.eval_train_examples,
        }

    def _describe(self, trace: Trace) -> str:
        if trace.diverged:
            return f"diverged after {trace.steps[-1]} steps"
        steps, seconds = trace.reached(self.config.fixed_target)
        text = f"loss {trace.losses[-1]:.4g} after {trace.steps[-1]} steps"
        if math.isfinite(steps):
            text += f", the target after {steps:.0f} and {seconds:.3g} s"
        return text
