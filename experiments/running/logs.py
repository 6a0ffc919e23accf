"""The files that a run appends to: JSON lines and TensorBoard events.

`metrics.jsonl` holds nothing that depends on the clock, so that a resumed run writes
the same bytes as one that was never stopped; times go to `timings.jsonl`.
"""

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from experiments.running.run_folder import read_json_lines, set_aside, write_atomically

__all__ = ["JsonLines", "RunLogs", "plain_number"]

EVALUATIONS = ("train_", "test_")


class JsonLines:
    """An append-only file of JSON objects, each with its `step`.

    Opening it drops the lines after `last_step` and a line that was cut short. If
    earlier lines cannot be read, the others are kept.

    Attributes:
      notices: a line about those that could not be read, if any.
    """

    def __init__(self, path: Path, last_step: int):
        path.touch()
        kept, is_damaged = _whole_lines(path, last_step)
        self.notices: list[str] = []
        if is_damaged:
            self.notices.append(
                f"{path.name} was damaged: it is kept as {set_aside(path)}, and the "
                f"{len(kept)} lines that can be read are in its place."
            )
            write_atomically(path, b"".join(kept))
        else:
            os.truncate(path, sum(map(len, kept)))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Returns once everything written has reached the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Writes what is pending and closes the file."""
        with self._file:
            self.sync()


class RunLogs(contextlib.ExitStack):
    """All the logs of a run, open for writing after `last_step`; a context manager.

    Attributes:
      seconds: training time, as last logged.
      notices: lines about damaged files.
    """

    def __init__(self, folder: Path, last_step: int):
        super().__init__()
        self._metrics = JsonLines(folder / "metrics.jsonl", last_step)
        self.callback(self._metrics.close)
        self._timings = JsonLines(folder / "timings.jsonl", last_step)
        self.callback(self._timings.close)
        self.notices = self._metrics.notices + self._timings.notices
        timings = read_json_lines(folder / "timings.jsonl")
        self.seconds: float = timings[-1].get("seconds", 0.0) if timings else 0.0
        # Not `SummaryWriter`, whose thread dies on a full disk and then blocks us.
        (folder / "tensorboard").mkdir(exist_ok=True)
        self._events = EventsWriter(
            str(folder / "tensorboard" / "events"), f".{last_step:08d}"
        )
        self.callback(self._events.close)
        if last_step:
            # Tells readers to discard what an earlier file says about later steps.
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=last_step + 1, session_log=start))

    def write_step(self, record: dict[str, Any]) -> None:
        """Logs what is known about one step, whose number is `record["step"]`."""
        self._metrics.write(record)
        values = [
            Summary.Value(tag=f"{_group(name)}/{name}", simple_value=value)
            for name, value in record.items()
            if name != "step" and value is not None
        ]
        self._events.write_event(
            Event(
                wall_time=time.time(),
                step=record["step"],
                summary=Summary(value=values),
            )
        )

    def write_time(self, step: int, seconds: float) -> None:
        """Logs the training time of the run, without compiling, up to `step`."""
        self._timings.write({"step": step, "seconds": round(seconds, 6)})
        self.seconds = seconds

    def sync(self) -> None:
        """Makes the logs durable, as they must be before a checkpoint of that step."""
        self._metrics.sync()
        self._timings.sync()
        self._events.flush()


def plain_number(value: Any) -> float | int | None:
    """Returns a scalar array as a Python number; None if it is not finite."""
    scalar = np.asarray(value)[()]
    if isinstance(scalar, np.integer | np.bool_):
        return int(scalar)
    # The shortest decimal that reads back as the same float of the same width.
    return float(str(scalar)) if math.isfinite(scalar) else None


def _group(name: str) -> str:
    return "evaluation" if name.startswith(EVALUATIONS) else "step"


def _whole_lines(path: Path, last_step: int) -> tuple[list[bytes], bool]:
    """Returns the whole lines up to `last_step`, and whether others are missing."""
    kept: list[bytes] = []
    last_kept, is_broken, is_damaged = 0, False, False
    with path.open("rb") as lines:
        for line in lines:
            step = _step(line)
            if step is None:
                is_broken = True
            elif step <= last_step:
                kept.append(line)
                last_kept, is_damaged = step, is_broken
    # A kill also leaves broken lines, but only after those that a checkpoint promises.
    return kept, is_damaged or last_kept != last_step


def _step(line: bytes) -> int | None:
    """Returns the step of a whole line, None if the line is broken."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) and line.endswith(b"\n") else None
