"""The results of a race on the disk: a file for each run, written once it is over.

    folder / entrant / seed-0.json, ...        folder / entrant / tuning-....json

Each file records the conditions of its run. A race that was interrupted, or that is run
in parts, reuses the results obtained under the same conditions, and runs the rest.
"""

import dataclasses
import json
import os
import zlib
from pathlib import Path
from typing import Any

from experiments.race.timing import Trace

__all__ = ["Result", "Store"]


@dataclasses.dataclass
class Result:
    """One training run of one entrant.

    Attributes:
      entrant: its name.
      seed: for initial parameters and batches.
      settings: those chosen by tuning.
      trace: its history.
      test: final loss and metrics on the test set.
      compile_seconds: CPU seconds until the step was ready to run.
      peak_bytes: memory of a step without the data; None if unknown.
      batch_size: examples in a batch.
      environment: versions and device.
    """

    entrant: str
    seed: int
    settings: dict[str, Any]
    trace: Trace
    test: dict[str, float]
    compile_seconds: float
    peak_bytes: int | None
    batch_size: int
    environment: str


class Store:
    """The folder of a race.

    Args:
      folder: created if it is missing.
      conditions: of the whole race, as plain values.
    """

    def __init__(self, folder: Path, conditions: dict[str, Any]):
        self.folder, self._conditions = folder, conditions

    def load(self, entrant: str, seed: int, settings: dict[str, Any]) -> Result | None:
        """The run with these settings; None if there is none under these conditions.

        Args:
          entrant: its name.
          seed: of the run.
          settings: all of the entrant's settings.
        """
        found = self._read(entrant, f"seed-{seed}", settings)
        return None if found is None else _result_from(found)

    def save(self, result: Result, settings: dict[str, Any]) -> None:
        """Writes a run; `settings` as for `load`."""
        content = dataclasses.asdict(result)
        self._write(result.entrant, f"seed-{result.seed}", settings, content)

    def load_tuning(self, entrant: str, settings: dict[str, Any]) -> Trace | None:
        """The training of a candidate with these settings; None as for `load`."""
        found = self._read(entrant, _tuning_name(settings), settings)
        return None if found is None else Trace(**found)

    def save_tuning(self, entrant: str, settings: dict[str, Any], trace: Trace) -> None:
        """Writes the training of a candidate."""
        content = dataclasses.asdict(trace)
        self._write(entrant, _tuning_name(settings), settings, content)

    def _path(self, entrant: str, name: str) -> Path:
        return self.folder / entrant / f"{name}.json"

    def _read(self, entrant: str, name: str, settings: dict[str, Any]) -> Any:
        path = self._path(entrant, name)
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        wanted = _plain({**self._conditions, "settings": settings})
        return found["content"] if found["conditions"] == wanted else None

    def _write(
        self, entrant: str, name: str, settings: dict[str, Any], content: Any
    ) -> None:
        path = self._path(entrant, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        conditions = {**self._conditions, "settings": settings}
        write_whole(
            path, json.dumps({"conditions": conditions, "content": content}, indent=1)
        )


def write_whole(path: Path, text: str) -> None:
    """Writes a temporary file and renames it: a kill must not leave half a file."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)


def _tuning_name(settings: dict[str, Any]) -> str:
    return f"tuning-{zlib.crc32(json.dumps(settings).encode()):08x}"


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _result_from(content: dict[str, Any]) -> Result:
    return Result(**{**content, "trace": Trace(**content["trace"])})
