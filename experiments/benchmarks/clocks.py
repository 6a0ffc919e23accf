"""Clocks for a busy machine: interleaved medians of CPU time, and operation counts.

A ratio of two times is meaningful only if both were taken under the same load, so
contestants take turns, and each figure is the median over the turns. CPU time excludes
the time for which other processes held the core.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

__all__ = [
    "compile_seconds",
    "compile_timed",
    "import_seconds",
    "interleaved_seconds",
    "operation_count",
    "use_one_thread",
    "value_in_process",
]


def use_one_thread() -> None:
    """Restricts XLA to one thread, so CPU time is elapsed time; call this first."""
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = "--xla_cpu_multi_thread_eigen=false"
    if wanted not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {wanted}".strip()
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def interleaved_seconds(
    functions: Sequence[Callable[[], Any]], *, repeats: int, minimum: float = 0.02
) -> list[float]:
    """Median CPU seconds of one call of each function, taken in turns.

    Args:
      functions: each returns arrays; a call ends when they are ready.
      repeats: number of turns.
      minimum: CPU seconds for which one function is repeated in one turn.
    """
    counts = [_calls_for(function, minimum) for function in functions]
    samples: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, count, sample in zip(functions, counts, samples, strict=True):
            start = time.process_time()
            for _ in range(count):
                jax.block_until_ready(function())
            sample.append((time.process_time() - start) / count)
    return [statistics.median(sample) for sample in samples]


def _calls_for(function: Callable[[], Any], minimum: float) -> int:
    jax.block_until_ready(function())
    start = time.process_time()
    jax.block_until_ready(function())
    return max(1, round(minimum / max(time.process_time() - start, 1e-6)))


def operation_count(function: Callable[..., Any], *args: Any) -> float:
    """Floating point operations of the compiled function, as XLA counts them.

    The body of a loop counts once, whatever the number of its iterations.
    """
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    if analysis is None:
        raise RuntimeError("this backend does not count operations")
    return float(analysis["flops"])


def compile_timed(
    function: Callable[..., Any], args: Sequence[Any], **options: Any
) -> tuple[jax.stages.Compiled, float]:
    """The compiled function, and the CPU seconds to trace, lower and compile it.

    Args:
      function: jitted or not.
      args: its arguments.
      **options: passed to `jax.jit`.
    """
    jax.clear_caches()
    start = time.process_time()
    compiled = jax.jit(function, **options).lower(*args).compile()
    return compiled, time.process_time() - start


def compile_seconds(
    functions: Sequence[Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]],
    *,
    repeats: int,
) -> list[float]:
    """Median CPU seconds to trace, lower and compile each, with caches emptied.

    Args:
      functions: each returns a new function, jitted or not, and its arguments.
      repeats: number of turns; one more is run first and does not count.
    """
    samples: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for make, sample in zip(functions, samples, strict=True):
            _, seconds = compile_timed(*make())
            if turn:
                sample.append(seconds)
    return [statistics.median(sample) for sample in samples]


def import_seconds(module: str, *, after: Sequence[str], repeats: int) -> float:
    """Median CPU seconds that importing `module` adds to importing `after`.

    Each turn runs in a Python process of its own.
    """
    program = (
        f"import time, {', '.join(after)}\n"
        f"start = time.process_time()\n"
        f"import {module}\n"
        f"print(time.process_time() - start)"
    )
    samples = []
    for _ in range(repeats):
        done = subprocess.run(  # noqa: S603 (our own program)
            [sys.executable, "-c", program], check=True, capture_output=True, text=True
        )
        samples.append(float(done.stdout))
    return statistics.median(samples)


def value_in_process(
    module: str,
    function: str,
    args: Sequence[Any],
    environment: Mapping[str, str] | None = None,
) -> float:
    """Calls `function(*args)` of a module in a new process; returns its number.

    Args:
      module: where the function is.
      function: its name.
      args: arguments that can be written as JSON.
      environment: environment variables to add to those of this process.
    """
    program = (
        f"import json\n"
        f"from {module} import {function}\n"
        f"print({function}(*json.loads({json.dumps(json.dumps(list(args)))})))"
    )
    done = subprocess.run(  # noqa: S603 (our own program)
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    return float(done.stdout.split()[-1])
