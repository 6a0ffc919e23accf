"""Two measures of memory: what XLA has planned, and what a process really used.

XLA plans every buffer of a program before it runs. The plan does not include the
workspace of libraries that it calls (LAPACK, matrix products that repack), nor what the
allocator keeps; the peak of a new process shows both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.benchmarks.clocks import value_in_process

__all__ = ["Memory", "planned_memory", "resident_bytes", "watch_peak"]


class Memory(NamedTuple):
    """Bytes of a compiled program.

    Attributes:
      held: arguments and results; a donated argument that became a result counts once.
      temporary: everything else, at its peak.
    """

    held: int
    temporary: int

    @property
    def peak(self) -> int:
        """The sum of both."""
        return self.held + self.temporary


def planned_memory(compiled: jax.stages.Compiled) -> Memory:
    """The memory that XLA has planned for a program.

    Raises:
      RuntimeError: the backend does not report it.
    """
    plan = compiled.memory_analysis()
    if plan is None:
        raise RuntimeError("this backend does not tell how much memory it plans")
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes
    return Memory(held - plan.alias_size_in_bytes, plan.temp_size_in_bytes)


def watch_peak(function: jax.stages.Compiled, args: tuple[Any, ...]) -> int:
    """The most bytes by which the process grew during one call (Linux only)."""
    jax.block_until_ready(args)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status_bytes("VmRSS")
    jax.block_until_ready(function(*args))
    return _status_bytes("VmHWM") - before


def resident_bytes(module: str, function: str, args: Sequence[Any]) -> int:
    """What `function(*args)` of a module prints, in a Python process of its own."""
    return int(value_in_process(module, function, args))


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")
