"""The settings of the benchmark; `configs/benchmark.yaml` has the numbers."""

import dataclasses
from typing import Annotated

from experiments.settings import AT_LEAST_ONE, Rule

__all__ = ["BenchmarkConfig"]

WIDTHS = Rule(
    "lists of two or more positive widths",
    lambda widths: len(widths) >= 2 and all(width >= 1 for width in widths),
)


@dataclasses.dataclass
class BenchmarkConfig:
    """Settings of `experiments.benchmark`.

    Attributes:
      networks: widths of the networks, inputs first and classes last.
      batch_size: examples in a batch.
      cg_steps: solver steps of the whole step that is timed.
      repeats: turns of each timing.
      compile_repeats: turns of each compilation.
      import_repeats: processes that import the library.
      output: Markdown file to write; null prints only.
    """

    networks: Annotated[list[list[int]], WIDTHS]
    batch_size: Annotated[int, AT_LEAST_ONE]
    cg_steps: Annotated[int, AT_LEAST_ONE]
    repeats: Annotated[int, AT_LEAST_ONE]
    compile_repeats: Annotated[int, AT_LEAST_ONE]
    import_repeats: Annotated[int, AT_LEAST_ONE]
    output: str | None
