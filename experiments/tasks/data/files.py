"""Finds files of data packages, checks their sums, and memory-maps copies of arrays.

A package is looked for where it installs itself, and below the setting `task.data_dir`:
as single files, or unpacked without installing, as by `dpkg -x PACKAGE.deb FOLDER`.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.running.settings import ConfigError

__all__ = ["check_sum", "find_file", "memory_mapped", "package_folders"]

_ROOT = Path("/")


def package_folders(data_dir: str | None, folder: str) -> list[Path]:
    """Returns where to look for the files that a package installs in `folder`.

    Args:
      data_dir: a folder given by the user, searched first; may be None.
      folder: the package's own folder, without the leading slash.
    """
    own = [] if data_dir is None else [Path(data_dir), Path(data_dir) / folder]
    return [*own, _ROOT / folder]


def find_file(name: str, folders: Sequence[Path], what: str, install: str) -> Path:
    """Returns the first file called `name` in `folders`.

    Raises:
      ConfigError: there is none; the message says how to `install` the data, and where
        it was looked for.
    """
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    places = ", ".join(str(folder) for folder in folders) or "none"
    raise ConfigError(
        f"The data of {what} is not installed: `{install}`, or set `task.data_dir` to "
        f"a folder with {name} (looked in: {places})."
    )


def check_sum(content: bytes | np.ndarray, expected: str, what: str) -> None:
    """Checks the sha256 of `content` against the known one.

    Raises:
      ConfigError: they differ; the data is damaged, or another version.
    """
    found = hashlib.sha256(np.ascontiguousarray(content).data).hexdigest()
    if found != expected:
        raise ConfigError(
            f"The data of {what} is not what it should be: its sha256 is {found}, "
            f"expected {expected}."
        )


def memory_mapped(
    cache_dir: str | None, name: str, make: Callable[[], np.ndarray]
) -> np.ndarray:
    """Returns the array that `make` makes, from a file in `cache_dir` if it is there.

    The file is written atomically and only once, even by concurrent runs, and then read
    from the disk as needed. Without a folder, the array is in memory.
    """
    if cache_dir is None:
        return make()
    path = Path(cache_dir) / f"{name}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        array = make()
        handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, array)
            Path(unfinished).chmod(0o644)
            Path(unfinished).replace(path)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")
