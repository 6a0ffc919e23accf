"""One data-parallel run on many devices and in many processes.

    mesh("data") over all devices;   a batch is split by examples;   the rest replicated

The processes communicate through JAX's distributed runtime and must all run the same
computations in the same order. So they agree here on whatever decides what they do next
(the folder, the configuration, a request to stop). Knows nothing of training.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.running.settings import AT_LEAST_ONE, ConfigError, Rule

__all__ = [
    "EXIT_CONFIG_ERROR",
    "EXIT_LOST_PROCESS",
    "LAUNCHED_VARIABLE",
    "DistributedConfig",
    "any_process",
    "broadcast_text",
    "check_same",
    "connect",
    "examples_sharding",
    "make_mesh",
    "place_examples",
    "replicated",
    "split_examples",
]

PyTree = Any

# Exit statuses of one process of several; its launcher prints the details.
EXIT_CONFIG_ERROR = 2
EXIT_LOST_PROCESS = 3

# Set for processes started by a launcher: it holds their standard input open.
LAUNCHED_VARIABLE = "NGD_EXPERIMENTS_LAUNCHED"

MAX_TEXT_BYTES = 8192
LOST_PROCESS = re.compile(r"gloo|nccl|barrier|coordination|heartbeat", re.IGNORECASE)

ADDRESS = Rule("host:port", lambda value: re.fullmatch(r"\S+:\d+", value) is not None)
PROCESS_ID = Rule("zero or more", lambda value: value >= 0)


@dataclasses.dataclass
class DistributedConfig:
    """Settings of a run in several processes.

    Attributes:
      num_processes: number of processes.
      process_id: the number of this process, from 0; null to start all of them here.
      coordinator_address: host:port where process 0 can be reached; goes with
        `process_id`.
      start_timeout: seconds to wait for the other processes at the start.
      heartbeat_timeout: seconds of silence after which a process counts as dead.
    """

    num_processes: Annotated[int, AT_LEAST_ONE]
    process_id: Annotated[int | None, PROCESS_ID]
    coordinator_address: Annotated[str | None, ADDRESS]
    start_timeout: Annotated[int, AT_LEAST_ONE]
    heartbeat_timeout: Annotated[int, AT_LEAST_ONE]

    def check(self, is_sweep: bool = False) -> None:
        """Raises ConfigError if the settings contradict each other or a sweep."""
        if is_sweep and self.process_id is not None:
            raise ConfigError(
                "--multirun starts all processes of each run itself: leave out "
                "`distributed.process_id`."
            )
        if (self.process_id is None) != (self.coordinator_address is None):
            raise ConfigError(
                "`distributed.process_id` and `distributed.coordinator_address` go "
                "together: both for one process of many, neither to start all here."
            )
        if self.process_id is not None and self.process_id >= self.num_processes:
            raise ConfigError(
                "`distributed.process_id` must be less than the "
                f"{self.num_processes} of `distributed.num_processes`, got "
                f"{self.process_id}."
            )

    @property
    def is_launcher(self) -> bool:
        """Whether this process only starts the others."""
        return self.num_processes > 1 and self.process_id is None


@contextlib.contextmanager
def connect(config: DistributedConfig) -> Iterator[None]:
    """Makes this process one of the `config.num_processes` of a run, if several.

    An error inside ends the process at once: Python's cleanup at exit would wait for
    the other processes, which in turn wait for this one.
    """
    if config.num_processes == 1:
        yield
        return
    if LAUNCHED_VARIABLE in os.environ:
        threading.Thread(target=_stop_with_launcher, daemon=True).start()
    _keep_output_to_ourselves()
    try:
        # Otherwise JAX takes SIGTERM for itself.
        jax.config.update("jax_enable_preemption_service", False)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        with _deadline(config):
            jax.distributed.initialize(
                config.coordinator_address,
                config.num_processes,
                config.process_id,
                initialization_timeout=2 * config.start_timeout,
                heartbeat_timeout_seconds=config.heartbeat_timeout,
                shutdown_timeout_seconds=config.heartbeat_timeout,
            )
        yield
        jax.distributed.shutdown()
    except ConfigError as error:
        _leave(EXIT_CONFIG_ERROR, f"error: {error}")
    except Exception as error:  # noqa: BLE001
        if LOST_PROCESS.search(str(error)):
            reason = " ".join(str(error).split())[:200]
            _leave(
                EXIT_LOST_PROCESS,
                f"error: another process is gone; restart all of them with "
                f"resume=latest to continue from the last checkpoint. ({reason})",
            )
        _leave(1, traceback.format_exc())
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT, "")


def broadcast_text(text: str) -> str:
    """Returns the `text` of process 0, in every process."""
    if jax.process_count() == 1:
        return text
    data = text.encode()
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"At most {MAX_TEXT_BYTES} bytes, got {len(data)}.")
    buffer = np.zeros(MAX_TEXT_BYTES, np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(buffer), np.uint8)
    return received.tobytes().rstrip(b"\0").decode()


def check_same(text: str, name: str) -> None:
    """Returns once all processes are here, if they all pass the same `text`.

    Raises:
      ConfigError: the texts differ; `name` says what the text is.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    if (digests != digest).any():
        raise ConfigError(f"The processes do not have the same {name}.")


def any_process(flag: bool) -> bool:
    """Returns whether `flag` holds in any process; all of them must call this."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def make_mesh() -> Mesh:
    """Returns a mesh of all devices of all processes along one axis, `data`."""
    return Mesh(np.asarray(jax.devices()), ("data",))


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """Returns the sharding of arrays that every device of `mesh` holds whole."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def examples_sharding(mesh: Mesh, num_examples: int, axis: int = 0) -> NamedSharding:
    """Returns the sharding of host arrays whose examples lie along `axis`.

    Each device holds its own examples, if they can be divided equally; else all.
    """
    if num_examples % mesh.size:
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def place_examples(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Copies to each device its own examples of host arrays, if `mesh` divides them.

    Only those are read: an array in a memory-mapped file costs no more than that. It
    needs no communication between processes, so threads may call it at any time.
    """
    if mesh is None:
        return jax.device_put(tree)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(
            leaf.shape, examples_sharding(mesh, len(leaf)), lambda index: leaf[index]
        ),
        tree,
    )


def split_examples(batch: PyTree, mesh: Mesh | None) -> PyTree:
    """Splits the leading axis of all leaves among the devices of `mesh`, under jit.

    The number of devices need not divide the number of examples: the partitioner pads,
    and leaves the padding out of every sum.
    """
    if mesh is None:
        return batch
    return jax.lax.with_sharding_constraint(
        batch, NamedSharding(mesh, PartitionSpec("data"))
    )


@contextlib.contextmanager
def _deadline(config: DistributedConfig) -> Iterator[None]:
    """Ends this process with a message before JAX would abort with a stack trace."""
    message = (
        f"error: the {config.num_processes} processes did not meet at "
        f"{config.coordinator_address} within {config.start_timeout} s."
    )
    timer = threading.Timer(config.start_timeout, _leave, (EXIT_LOST_PROCESS, message))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _keep_output_to_ourselves() -> None:
    """Keeps standard output for Python; Gloo prints a greeting there from C++."""
    sys.stdout.flush()
    output = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    sys.stdout = os.fdopen(output, "w", buffering=1, encoding=sys.stdout.encoding)


def _stop_with_launcher() -> None:
    """Requests a stop of this process once its launcher is gone, however it ended."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _leave(status: int, message: str) -> None:
    if message:
        print(message.rstrip(), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
