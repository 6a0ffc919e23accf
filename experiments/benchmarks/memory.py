"""The table of memory: what XLA plans for a step, and what a process really uses."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

import ngd_jax as ngd
from experiments.benchmarks.contestants import (
    Problem,
    count_parameters,
    make_problem,
    natural_step,
    train_step,
    widths_of,
)
from experiments.benchmarks.markdown import Figure, Table
from experiments.benchmarks.settings import MemorySettings
from experiments.benchmarks.space import (
    Memory,
    planned_memory,
    resident_bytes,
    watch_peak,
)

__all__ = [
    "allowance",
    "compile_step",
    "memory_tables",
    "plan_step",
    "seen_bytes",
]

_GRADIENT_STEPS = 3
_VECTORS = 5


def allowance(gradient: Memory, parameter_bytes: int) -> int:
    """The most memory that a step of conjugate gradients should take, in bytes."""
    return _GRADIENT_STEPS * gradient.peak + _VECTORS * parameter_bytes


def compile_step(
    problem: Problem, solver: ngd.Solver | None
) -> tuple[jax.stages.Compiled, tuple[Any, ...]]:
    """A step that overwrites its parameters and its state; None is plain descent.

    The arguments are copies, since the first call destroys them.
    """
    if solver is None:
        step, opt_state = train_step(problem, optax.sgd(1e-2))
        args = (problem.params, opt_state, problem.batch)
    else:
        step, args = natural_step(problem, solver)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
    return compiled, jax.tree.map(jax.numpy.array, args)


def plan_step(problem: Problem, solver: ngd.Solver | None) -> Memory:
    """The memory that XLA plans for `compile_step`."""
    return planned_memory(compile_step(problem, solver)[0])


def seen_bytes(cell: Sequence[int], cg_steps: int) -> int:
    """Bytes by which this process, a new one, grows at most in a CG step."""
    problem = make_problem(widths_of(cell), cell[1])
    compiled, args = compile_step(problem, ngd.CG(max_steps=cg_steps, rtol=0.0))
    del problem
    return watch_peak(compiled, args)


def memory_tables(settings: MemorySettings) -> list[Table]:
    """The planned memory, and the memory measured in a new process."""
    blocks = [f"SampleSpace, {size} at a time" for size in settings.block_sizes]
    rows, worst = [], None
    for cell in settings.cells:
        problem = make_problem(widths_of(cell), cell[1])
        vector = 4 * count_parameters(problem)
        gradient = plan_step(problem, None)
        ours = plan_step(problem, ngd.CG(max_steps=settings.cg_steps, rtol=0.0))
        part = ours.peak / allowance(gradient, vector)
        if worst is None or part > worst:
            worst = part
        row = [f"{vector // 4:,}", str(cell[1]), str(cell[2]), _megabytes(vector)]
        row += [_megabytes(gradient.peak), _megabytes(ours.peak), f"{part:.2f}"]
        for size in settings.block_sizes:
            fits = cell[1] * cell[2] <= settings.gram_limit
            row.append(
                _megabytes(plan_step(problem, ngd.SampleSpace(size)).peak)
                if fits
                else ""
            )
        rows.append(row)
    goal = Figure(
        f"CG step / ({_GRADIENT_STEPS} gradient steps + {_VECTORS} vectors), the worst",
        worst or 0.0,
        1.0,
    )
    return [
        Table(
            "Planned memory of a step (arguments, results, temporaries), MB",
            ["P", "N", "K", "one vector", "gradient step", "CG step", "part", *blocks],
            rows,
            [goal],
            ["Parameters and state are donated. `part` is the quotient of the goal."],
        ),
        _resident_table(settings),
    ]


def _resident_table(settings: MemorySettings) -> Table:
    rows = []
    for cell in settings.resident_cells:
        problem = make_problem(widths_of(cell), cell[1])
        planned = plan_step(problem, ngd.CG(max_steps=settings.cg_steps, rtol=0.0))
        seen = resident_bytes(__name__, seen_bytes.__name__, [cell, settings.cg_steps])
        row = [f"{count_parameters(problem):,}", str(cell[1]), str(cell[2])]
        row += [_megabytes(planned.temporary), _megabytes(seen)]
        rows.append(row)
    return Table(
        "Temporaries of a CG step, MB: as planned, and as a fresh process grew",
        ["P", "N", "K", "planned", "seen"],
        rows,
    )


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.3g}"
