"""What a run trains, as its loop sees it: something that advances by steps.

    state --advance--> state, records --evaluate--> numbers --draw--> pictures

The loop owns checkpoints, logs, the screen and the stop; a learner owns the meaning of
a step: that of an optimizer on a batch of a data set, on rollouts of a policy, or on
samples of a wave function. `experiments.tasks.supervised.learner` has the first kind.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import jax

from experiments.running.screen import Column

__all__ = ["Advance", "Learner", "Records", "Rows", "State"]

Records = dict[str, jax.Array]
Rows = list[dict[str, Any]]


class State(Protocol):
    """All that the next step needs: a pytree of arrays, typed PRNG keys among them.

    Attributes:
      step: int32, steps taken.
    """

    @property
    def step(self) -> jax.Array: ...  # noqa: D102


Advance = Callable[[Any, int], tuple[Any, Records]]


class Learner(Protocol):
    """Something that learns by steps.

    A task whose configuration has `precision: float64` gets all calls with 64-bit types
    enabled.

    Attributes:
      first_state: the state before the first step.
      columns: what the screen shows beside the columns of every run: values of
        evaluations, and of steps that are this learner's own.
      train_data: the training examples along the leading axes of its leaves, where
        there is such a set; else None.
    """

    @property
    def first_state(self) -> State: ...  # noqa: D102

    @property
    def columns(self) -> tuple[Column, ...]: ...  # noqa: D102

    @property
    def train_data(self) -> Any: ...  # noqa: D102

    def start(self, state: Any) -> AbstractContextManager[Advance]:
        """Compiles, and opens what the steps from `state` on need.

        It gives `advance(state, num_steps) -> (state, records)`, which may donate its
        state, takes at most `steps_per_dispatch` steps, and returns scalars of steps as
        arrays `[at least num_steps]`, of which the first `num_steps` count. Any cut of
        a run into calls of it must lead to the same bits.
        """
        ...

    def evaluate(self, state: Any) -> dict[str, Any]:
        """Returns scalars that tell how good `state` is.

        Names begin with `train_` or `test_`; the logs tell them apart by that.
        """
        ...

    def draw(self, state: Any, records: Rows, folder: Path, title: str) -> None:
        """Draws a run that ended in `state` into `folder`, at least `curves.png`.

        What else is to be kept of the run besides checkpoints is written here too.

        Args:
          state: the last one.
          records: the lines of `metrics.jsonl`, one for each step, and the `seconds` of
            `timings.jsonl` where they are known.
          folder: of the run.
          title: what the run is, in a few words.
        """
        ...
