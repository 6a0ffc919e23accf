"""The memory that XLA has planned for a program.

XLA plans every buffer of a program before it runs. The plan does not include the
workspace of libraries that it calls (LAPACK, matrix products that repack), nor what the
allocator keeps.
"""

from typing import NamedTuple

import jax

__all__ = ["Memory", "planned_memory"]


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
