"""Checkpoints of a run: the whole training state, through Orbax.

Every process holds the whole state, so a checkpoint does not depend on their number.
They save and restore together; the first one writes.

A checkpoint appears under its final name only when it is complete, so that a process
killed while it writes leaves the previous one as the latest.
"""

from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, cast

import jax
import orbax.checkpoint as ocp

from experiments.running.learner import State
from experiments.running.settings import ConfigError

__all__ = ["Checkpoints"]

NUM_KEPT = 3

AnyState = TypeVar("AnyState", bound=State)


class Checkpoints:
    """The checkpoints in one folder; a context manager that waits for pending writes.

    Writing goes on in the background; the newest `NUM_KEPT` are kept.
    """

    def __init__(self, folder: Path):
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=NUM_KEPT,
                create=True,
                # What a killed process left half-written.
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Of several processes one may be gone: waiting for it would hide the error.
        if exc_type is None or jax.process_count() == 1:
            self._manager.wait_until_finished()
            self._manager.close()

    def save(self, state: State) -> None:
        """Saves `state` under its step, unless that step is there already."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore_latest(self, template: AnyState) -> AnyState | None:
        """Returns the newest state that can be read, or None where none was saved.

        Damaged checkpoints that are newer than it are deleted.

        Args:
          template: a state of the same structure, shapes and dtypes, such as the one
            before the first step.

        Raises:
          ConfigError: there are checkpoints, but none holds such a state.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        steps = sorted(self._manager.all_steps(), reverse=True)
        for number, step in enumerate(steps):
            arguments = ocp.args.StandardRestore(abstract)
            try:
                restored = self._manager.restore(step, args=arguments)
            except (ValueError, KeyError, OSError):
                continue
            for damaged in steps[:number]:
                self._manager.delete(damaged)
            return cast("AnyState", restored)
        if steps:
            raise ConfigError(
                f"None of the checkpoints in {self._manager.directory} can be read as "
                "a state of this run: they are damaged, or of another version."
            )
        return None
