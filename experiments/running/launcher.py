"""Starts the processes of one run on this machine, and ends them together.

The workers are `python -m experiments.train` with `distributed.process_id` set. They
have sessions of their own, so that Ctrl-C reaches only the launcher, which signals them
once; and each holds the other end of a pipe, so that it notices if the launcher is
killed.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from experiments.running.distributed import (
    EXIT_CONFIG_ERROR,
    EXIT_LOST_PROCESS,
    LAUNCHED_VARIABLE,
)
from experiments.running.interruption import EXIT_INTERRUPTED, StopRequest
from experiments.running.run_folder import (
    describe_resumption,
    hydra_override,
    latest_step,
)

__all__ = ["launch"]

LOCAL_HOST = "127.0.0.1"
POLL_SECONDS = 0.05
# Time for the remaining workers to notice that one has ended and close their files.
GRACE_SECONDS = 5.0


class Worker(NamedTuple):
    """One process of the run.

    Attributes:
      number: its `distributed.process_id`.
      process: the process.
      errors: what it wrote to standard error; an unnamed file.
    """

    number: int
    process: subprocess.Popen[bytes]
    errors: IO[bytes]

    @property
    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self.process.poll()


class Failure(NamedTuple):
    """Why a run ended early.

    Attributes:
      worker: the first process to fail.
      status: its exit status; None if it only stopped responding.
    """

    worker: Worker
    status: int | None


def launch(num_processes: int, overrides: list[str], folder: Path) -> int:
    """Runs `experiments.train` in `num_processes` local processes until they end.

    Process 0 has the screen. The output of the others, and all error messages, are held
    back until it is known which process failed first.

    Args:
      num_processes: number of processes.
      overrides: those of the command line; already checked.
      folder: the run folder.

    Returns:
      The exit status: 0, `EXIT_INTERRUPTED`, or 1 for an error, already reported.
    """
    with _reserved_port() as port, StopRequest() as stop:
        address = f"{LOCAL_HOST}:{port}"
        common = [*overrides, hydra_override("hydra.run.dir", str(folder))]
        workers: list[Worker] = []
        try:
            for number in range(num_processes):
                workers.append(_start(number, address, common))  # noqa: PERF401
            failure = _wait(workers, stop)
        finally:
            _kill(workers)
        if failure is None:
            _repeat_errors(workers[0])
            return max(worker.process.returncode for worker in workers)
        if stop.requested and failure.status == -signal.SIGTERM:
            print(_describe_stop(num_processes, folder))
            return EXIT_INTERRUPTED
        _repeat_errors(failure.worker)
        if failure.status != EXIT_CONFIG_ERROR:
            print(_describe_failure(failure, num_processes, folder), file=sys.stderr)
        return 1


def _start(number: int, address: str, common: list[str]) -> Worker:
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
    arguments = [
        *common,
        f"distributed.process_id={number}",
        hydra_override("distributed.coordinator_address", address),
    ]
    process = subprocess.Popen(  # noqa: S603 (the user's own overrides)
        [sys.executable, "-m", "experiments.train", *arguments],
        stdin=subprocess.PIPE,
        stdout=None if number == 0 else subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
        env={
            **os.environ,
            LAUNCHED_VARIABLE: "1",
            # Nobody outside this machine needs the coordinator.
            "JAX_COORDINATOR_BIND_ADDRESS": address,
            # Each process takes its own GPU if there are several; there is one CPU.
            "JAX_LOCAL_DEVICE_IDS": str(number),
        },
    )
    return Worker(number, process, errors)


def _wait(workers: list[Worker], stop: StopRequest) -> Failure | None:
    """Waits until all workers have ended well, or returns the first one that failed."""
    is_told = False
    while True:
        if stop.requested and not is_told:
            is_told = True
            for worker in workers:
                worker.process.terminate()
        statuses = [worker.status for worker in workers]
        if any(status not in (None, 0, EXIT_INTERRUPTED) for status in statuses):
            break
        if None not in statuses:
            return None
        time.sleep(POLL_SECONDS)
    # The others usually notice by themselves.
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and None in [worker.status for worker in workers]:
        time.sleep(POLL_SECONDS)
    failures = [Failure(worker, worker.status) for worker in workers]
    return min((one for one in failures if one.status != 0), key=_rank)


def _rank(failure: Failure) -> int:
    """Ranks failures: lower for a likely cause, higher for a likely consequence."""
    if failure.status is None:
        return 2
    if failure.status == -signal.SIGABRT:  # JAX aborts when it has lost a process
        return 3
    if failure.status in (EXIT_LOST_PROCESS, EXIT_INTERRUPTED):
        return 4
    return 0 if failure.status < 0 else 1


def _kill(workers: list[Worker]) -> None:
    for worker in workers:
        worker.process.kill()
        worker.process.wait()
        assert worker.process.stdin is not None
        worker.process.stdin.close()


def _describe_stop(num_processes: int, folder: Path) -> str:
    """Describes a stop that came before or after the processes could handle it."""
    if latest_step(folder) is None:
        return "Stopped before the first checkpoint."
    return f"Stopped; to go on: {describe_resumption(folder, num_processes)}"


def _describe_failure(failure: Failure, num_processes: int, folder: Path) -> str:
    status = failure.status
    if status is None:
        how = "no longer answered"
    elif status < 0:
        how = f"was killed by {signal.Signals(-status).name}"
    elif status == EXIT_LOST_PROCESS:
        how = "lost the connection to the others"
    else:
        how = f"ended with status {status}"
    message = f"error: process {failure.worker.number} of {num_processes} {how}"
    step = latest_step(folder)
    if step is None:
        return f"{message}, before the first checkpoint"
    return (
        f"{message}; to go on after step {step}: "
        f"{describe_resumption(folder, num_processes)}"
    )


def _repeat_errors(worker: Worker) -> None:
    worker.errors.seek(0)
    sys.stderr.write(worker.errors.read().decode(errors="replace"))
    sys.stderr.flush()


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """Reserves a free port that process 0, but no stranger, may also bind."""
    with socket.socket() as holder:
        if hasattr(socket, "SO_REUSEPORT"):
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((LOCAL_HOST, 0))
        yield holder.getsockname()[1]
