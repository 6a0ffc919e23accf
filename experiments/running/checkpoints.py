"""Checkpoints of a run: the whole training state, saved by Orbax, with checksums.

    <step>/  what Orbax writes        <step>.sha256  the checksums of its files

The checksums, which `sha256sum -c` can check, are written once Orbax has committed the
step: if the process is killed before that, the previous step remains the latest. Orbax
does not detect all damage, so it only reads a step whose checksums match.

Every process holds the whole state, so a checkpoint does not depend on the number of
processes. They save and restore together.
"""

import contextlib
import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar, cast

import jax
import orbax.checkpoint as ocp

from experiments.running.distributed import check_same
from experiments.running.learner import State
from experiments.running.run_folder import (
    CHECKSUMS,
    remove,
    set_aside,
    write_atomically,
)
from experiments.running.settings import ConfigError

__all__ = ["Checkpoints"]

NUM_KEPT = 3

AnyState = TypeVar("AnyState", bound=State)


class Checkpoints:
    """The checkpoints in one folder; the newest `NUM_KEPT` are kept.

    Attributes:
      notices: one line for each damaged checkpoint that `restore_latest` found.
    """

    def __init__(self, folder: Path):
        self._folder = folder.absolute()  # Orbax requires it
        self._orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        self._is_first = jax.process_index() == 0
        self.notices: list[str] = []

    def save(self, state: State) -> None:
        """Saves `state` under its step; it is on the disk once this returns.

        Raises:
          OSError: the disk cannot be written to.
        """
        path = self._folder / str(int(state.step))
        if self._is_first:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove(path.with_suffix(CHECKSUMS))
            remove(path)
        try:
            with _quiet():
                self._orbax.save(
                    path,
                    args=ocp.args.StandardSave(state),
                    custom_metadata=_describe(state),
                )
            if self._is_first:
                checksums = _checksums(path, sync=True)
                write_atomically(path.with_suffix(CHECKSUMS), checksums)
        except ValueError as error:  # TensorStore turns an OSError into this
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if code is None:
                raise
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        finally:
            if self._is_first:
                self._remove_old()

    def restore_latest(self, template: AnyState) -> AnyState | None:
        """Returns the newest undamaged state, or None if none was saved.

        Damaged checkpoints newer than that are renamed to `<step>.damaged`.

        Args:
          template: a state of the same structure, shapes and dtypes, such as the one
            before the first step.

        Raises:
          ConfigError: all checkpoints are damaged, or the newest undamaged one holds
            another kind of state.
        """
        paths = self._newest_first()
        newest = next((path for path in paths if _is_whole(path)), None)
        # Before Orbax waits for all processes and the first one renames anything.
        check_same(str(newest), "checkpoint")
        if newest is None and paths:
            raise ConfigError(
                f"None of the checkpoints in {self._folder} can be read: their "
                f"checksums do not match. Delete that folder to start the run again."
            )
        if newest is None:
            return None
        try:
            state = self._read(newest, template)
        except jax.errors.JaxRuntimeError:  # another process is gone
            raise
        except Exception as error:
            raise ConfigError(
                f"{newest} is the checkpoint of another run or version: the names, "
                f"shapes or dtypes of its state differ, or Orbax cannot read it."
            ) from error
        for path in paths[: paths.index(newest)] if self._is_first else ():
            self.notices.append(
                f"The checkpoint of step {path.name} is damaged: it is kept as "
                f"{set_aside(path)}, and step {newest.name} is used instead."
            )
            set_aside(path.with_suffix(CHECKSUMS))
        return state

    def _read(self, path: Path, template: AnyState) -> AnyState:
        # Orbax itself would convert dtypes.
        if self._orbax.metadata(path).custom_metadata != _describe(template):
            raise ValueError("The state in the checkpoint is of another kind.")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        with _quiet():
            state = self._orbax.restore(path, args=ocp.args.StandardRestore(abstract))
        return cast("AnyState", state)

    def _newest_first(self) -> list[Path]:
        found = [path.with_suffix("") for path in self._folder.glob("*" + CHECKSUMS)]
        found = [path for path in found if path.name.isdecimal() and path.exists()]
        return sorted(found, key=lambda path: int(path.name), reverse=True)

    def _remove_old(self) -> None:
        """Removes all but the newest steps, and leftovers of killed processes."""
        kept = {path.name for path in self._newest_first()[:NUM_KEPT]}
        # Remove checksums before their files: the process may be killed in between.
        for path in sorted(self._folder.iterdir(), key=Path.is_dir):
            if path.suffix != ".damaged" and path.name.split(".")[0] not in kept:
                with contextlib.suppress(OSError):  # writes that are still under way
                    remove(path)


def _is_whole(path: Path) -> bool:
    try:
        checksums = path.with_suffix(CHECKSUMS).read_bytes()
        return bool(checksums) and checksums == _checksums(path)
    except OSError:
        return False


def _checksums(path: Path, *, sync: bool = False) -> bytes:
    """Returns a line for each file in `path`; the file names include the step."""
    lines = []
    for name in sorted(name for name in path.rglob("*") if not name.is_dir()):
        with name.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if sync:  # Orbax does so for the arrays only
                os.fsync(file.fileno())
        lines.append(f"{digest}  {name.relative_to(path.parent)}\n")
    return "".join(lines).encode()


def _describe(state: State) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what Orbax prints in addition to what it raises."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    yield
    # Not after an error: writes still under way would then raise many more.
    sys.unraisablehook = hook
