"""What a run trains, as the training loop sees it: an object that advances in steps.

    state --advance--> state, records --evaluate--> numbers --draw--> pictures

The loop is responsible for checkpoints, logs, the screen and stopping; a learner
defines what a step is: an optimizer step on a batch of a data set, on rollouts of a
policy, or on samples of a wave function. `experiments.tasks.supervised.learner` has the
first kind.
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
    """Everything that the next step needs: a pytree of arrays and typed PRNG keys.

    Attributes:
      step: int32, steps taken.
    """

    @property
    def step(self) -> jax.Array: ...  # noqa: D102


Advance = Callable[[Any, int], tuple[Any, Records]]


class Learner(Protocol):
    """Something that learns by steps.

    If the configuration of a task has `precision: float64`, all methods are called with
    64-bit types enabled.

    Attributes:
      first_state: the state before the first step.
      columns: what the screen shows besides the columns common to all runs: values of
        evaluations, and values of steps that only this learner has.
      train_data: the training examples along the leading axes of its leaves, or None if
        there is no training set.
    """

    @property
    def first_state(self) -> State: ...  # noqa: D102

    @property
    def columns(self) -> tuple[Column, ...]: ...  # noqa: D102

    @property
    def train_data(self) -> Any: ...  # noqa: D102

    def start(self, state: Any) -> AbstractContextManager[Advance]:
        """Compiles, and opens whatever the steps from `state` on need.

        It yields `advance(state, num_steps) -> (state, records)`, which may donate its
        state, takes at most `steps_per_dispatch` steps, and returns scalars of steps as
        arrays `[at least num_steps]`, of which only the first `num_steps` are valid.
        However a run is cut into calls, the result must be the same, bit for bit.
        """
        ...

    def evaluate(self, state: Any) -> dict[str, Any]:
        """Returns scalars that measure how good `state` is.

        Their names begin with `train_` or `test_`; the logs group them by that prefix.
        """
        ...

    def draw(self, state: Any, records: Rows, folder: Path, title: str) -> None:
        """Draws a run that ended in `state` into `folder`, at least `curves.png`.

        Anything else worth keeping besides checkpoints is written here too.

        Args:
          state: the last one.
          records: the lines of `metrics.jsonl`, one for each step, with the `seconds`
            of `timings.jsonl` where they are known.
          folder: the run folder.
          title: a short description of the run.
        """
        ...
