"""Checkpoints of a run: the whole training state in one file, behind its checksum.

    SHA-256 of what follows | { path of a leaf: its array } as Flax's MessagePack

Every process holds the whole state, so a checkpoint does not depend on their number:
the first one writes, all of them read. A file appears under its final name, which is
its step, only when all of it is on the disk, so that a process killed while it writes
leaves the previous one as the latest.
"""

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from experiments.running.learner import State
from experiments.running.run_folder import set_aside, write_atomically
from experiments.running.settings import ConfigError

__all__ = ["Checkpoints"]

NUM_KEPT = 3

AnyState = TypeVar("AnyState", bound=State)


class Checkpoints:
    """The checkpoints in one folder, of which the newest `NUM_KEPT` are kept.

    Attributes:
      notices: what `restore_latest` found damaged, in a line for each.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.notices: list[str] = []

    def save(self, state: State) -> None:
        """Saves `state` under its step; once this returns it is on the disk."""
        if jax.process_index() > 0:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        content = serialization.msgpack_serialize(_arrays(state))
        checksum = hashlib.sha256(content).digest()
        write_atomically(self._folder / str(int(state.step)), checksum + content)
        for path in self._newest_first()[NUM_KEPT:]:
            path.unlink()

    def restore_latest(self, template: AnyState) -> AnyState | None:
        """Returns the newest state that is whole, or None where none was saved.

        Damaged checkpoints that are newer than it are renamed to `<step>.damaged`.

        Args:
          template: a state of the same structure, shapes and dtypes, such as the one
            before the first step.

        Raises:
          ConfigError: all checkpoints are damaged, or the newest whole one holds
            another kind of state.
        """
        paths = self._newest_first()
        for number, path in enumerate(paths):
            arrays = _read(path)
            if arrays is None:
                continue
            state = _like(template, arrays, path)
            for damaged in paths[:number] if jax.process_index() == 0 else ():
                self.notices.append(
                    f"The checkpoint of step {damaged.name} is damaged: it is kept as "
                    f"{set_aside(damaged)}, and step {path.name} taken instead."
                )
            return state
        if paths:
            raise ConfigError(
                f"None of the checkpoints in {self._folder} can be read: their "
                "checksums do not fit. Without that folder the run starts again."
            )
        return None

    def _newest_first(self) -> list[Path]:
        found = [path for path in self._folder.glob("*") if path.name.isdecimal()]
        return sorted(found, key=lambda path: int(path.name), reverse=True)


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """Returns the arrays of a checkpoint, or None where it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    checksum, content = data[:size], data[size:]
    if hashlib.sha256(content).digest() != checksum:
        return None
    arrays: Any = serialization.msgpack_restore(content)
    # Files may have been exchanged.
    return arrays if arrays.get(".step") == int(path.name) else None


def _arrays(state: State) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): np.asarray(_raw(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _like(template: AnyState, arrays: dict[str, np.ndarray], path: Path) -> AnyState:
    """Returns `arrays` as a state with the structure and shardings of `template`."""
    like = {
        name: (array.shape, array.dtype) for name, array in _arrays(template).items()
    }
    if like != {name: (array.shape, array.dtype) for name, array in arrays.items()}:
        raise ConfigError(
            f"{path} is the checkpoint of another run or version: the names, shapes or "
            "dtypes of its state are others."
        )

    def place(name: Any, leaf: jax.Array) -> jax.Array:
        array = arrays[jax.tree_util.keystr(name)]
        raw = jax.make_array_from_callback(
            array.shape, _raw(leaf).sharding, lambda index: array[index]
        )
        if not _is_key(leaf):
            return raw
        return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(leaf))

    return jax.tree_util.tree_map_with_path(place, template)


def _raw(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
