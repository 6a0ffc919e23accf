"""The files that a run appends to: JSON lines and TensorBoard events.

`metrics.jsonl` holds nothing that depends on the clock, so that a resumed run leaves
the same bytes as one that was never stopped; the clock goes to `timings.jsonl`.
"""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from tensorboardX import SummaryWriter

from experiments.running.run_folder import read_json_lines

__all__ = ["JsonLines", "RunLogs", "plain_number"]

EVALUATIONS = ("train_", "test_")


class JsonLines:
    """An append-only file of JSON objects, each with its `step`.

    Opening it drops what comes after `last_step`, and a line that was cut short.
    """

    def __init__(self, path: Path, last_step: int):
        path.touch()
        os.truncate(path, _length_through(path, last_step))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Returns once all that was written has reached the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Writes what is pending and closes the file."""
        self.sync()
        self._file.close()


class RunLogs:
    """All the logs of a run, open for writing after `last_step`; a context manager.

    Attributes:
      seconds: of training, as last logged.
    """

    def __init__(self, folder: Path, last_step: int):
        self._metrics = JsonLines(folder / "metrics.jsonl", last_step)
        self._timings = JsonLines(folder / "timings.jsonl", last_step)
        self._events = SummaryWriter(
            str(folder / "tensorboard"),
            # Tells readers to forget what an earlier file says of later steps.
            purge_step=last_step + 1 if last_step else None,
            filename_suffix=f".{last_step:08d}",
        )
        timings = read_json_lines(folder / "timings.jsonl")
        self.seconds: float = timings[-1]["seconds"] if timings else 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._metrics.close()
        self._timings.close()
        self._events.close()

    def write_step(self, record: dict[str, Any]) -> None:
        """Logs what is known of one step; `record["step"]` says which."""
        self._metrics.write(record)
        for name, value in record.items():
            if name != "step" and value is not None:
                group = "evaluation" if name.startswith(EVALUATIONS) else "step"
                self._events.add_scalar(f"{group}/{name}", value, record["step"])

    def write_time(self, step: int, seconds: float) -> None:
        """Logs how long the run had trained, without compiling, after `step`."""
        self._timings.write({"step": step, "seconds": round(seconds, 6)})
        self.seconds = seconds

    def sync(self) -> None:
        """Makes the logs durable, as they must be before a checkpoint of that step."""
        self._metrics.sync()
        self._timings.sync()
        self._events.flush()


def plain_number(value: Any) -> float | int | None:
    """Returns a scalar array as a Python number; None where it is not finite."""
    scalar = np.asarray(value)[()]
    if isinstance(scalar, np.integer | np.bool_):
        return int(scalar)
    # The shortest decimal that reads back as the same float of the same width.
    return float(str(scalar)) if math.isfinite(scalar) else None


def _length_through(path: Path, last_step: int) -> int:
    """Returns the length in bytes of the whole lines up to `last_step`."""
    length = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                break
            if step > last_step or not line.endswith(b"\n"):
                break
            length += len(line)
    return length
