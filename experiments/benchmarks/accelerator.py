"""The tables for an accelerator: what steps cost there, and how many digits are right.

Everything is measured at each precision of matrix products that the device offers: as
float32, as TF32 where there is one, and with factors rounded to bfloat16. Times are
elapsed seconds; the rest of the benchmark reads the CPU clock, which says nothing here.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ngd_jax as ngd
from experiments.benchmarks.contestants import Problem, check_taken, train_step
from experiments.benchmarks.markdown import Table
from experiments.benchmarks.networks import NETWORKS
from experiments.benchmarks.price import OPTIMIZERS
from experiments.benchmarks.settings import AcceleratorSettings
from experiments.benchmarks.space import planned_memory

__all__ = ["accelerator_tables", "step_table"]

_MIB = 2**20


def _sample_space(problem: Problem) -> Any:
    return ngd.natural_gradient(
        1.0,
        problem.model_fn,
        problem.likelihood,
        max_kl=0.1,
        solver=ngd.SampleSpace(),
        loss_fn=problem.output_loss_fn,
    )


_MAKERS = {**OPTIMIZERS, "SampleSpace": _sample_space}


def accelerator_tables(settings: AcceleratorSettings) -> list[Table]:
    """Steps, and the digits of their parts."""
    return [step_table(settings), _digits(settings)]


def step_table(settings: AcceleratorSettings) -> Table:
    """Steps by network, precision and optimizer."""
    start, rows, left = time.monotonic(), [], []
    for network in settings.networks:
        problem = NETWORKS[network]()
        for precision in settings.precisions:
            for name in settings.optimizers:
                outputs = jax.eval_shape(
                    problem.model_fn, problem.params, problem.batch
                )
                is_long = name == "SampleSpace" and outputs.size > settings.gram_limit
                if is_long or time.monotonic() - start > settings.seconds:
                    left.append(f"{network} {precision} {name}")
                    continue
                with jax.default_matmul_precision(precision):
                    figures = _measure(problem, _MAKERS[name](problem), settings)
                rows.append([network, precision, name, *figures])
    notes = ["P is the number of parameters; memory is what XLA plans, donated."]
    if left:
        notes.append(f"Left out, for the time or the size: {', '.join(left)}.")
    head = ("network", "products in", "optimizer", "first step, s", "a step, ms")
    head += ("gradients", "memory, MiB", "× P", "KL / radius")
    title = f"Steps on {jax.devices()[0].device_kind}, elapsed time"
    return Table(title, head, rows, notes=notes)


def _measure(
    problem: Problem, tx: optax.GradientTransformation, settings: AcceleratorSettings
) -> list[str]:
    """Figures of one optimizer, its steps in turns with the gradient alone."""
    step, state = train_step(problem, tx)
    gradient = jax.jit(jax.value_and_grad(problem.loss_fn))
    start = time.monotonic()
    program = jax.jit(step, donate_argnums=(0, 1))
    compiled = program.lower(problem.params, state, problem.batch).compile()
    params = jax.tree.map(jnp.copy, problem.params)
    params, state, _ = jax.block_until_ready(compiled(params, state, problem.batch))
    first = time.monotonic() - start
    share = "–"
    if optax.tree.get(state, "NaturalGradientInfo") is not None:
        share = f"{float(check_taken(state).measured_kl) / 0.1:.3f}"

    def steps() -> None:
        nonlocal params, state
        for _ in range(settings.steps):
            params, state, _ = compiled(params, state, problem.batch)
        jax.block_until_ready(params)

    def gradients() -> None:
        calls = range(settings.steps)
        jax.block_until_ready([gradient(problem.params, problem.batch) for _ in calls])

    gradients()
    ours, one = _elapsed([steps, gradients], settings.repeats)
    memory = planned_memory(compiled).peak
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(problem.params))
    return [
        f"{first:.1f}",
        f"{1e3 * ours / settings.steps:.3g}",
        f"{ours / one:.2f}",
        f"{memory / _MIB:.0f}",
        f"{memory / size:.1f}",
        share,
    ]


def _elapsed(functions: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    samples: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, sample in zip(functions, samples, strict=True):
            start = time.monotonic()
            function()
            sample.append(time.monotonic() - start)
    return [statistics.median(sample) for sample in samples]


def _parts(problem: Problem) -> dict[str, Any]:
    """Quantities whose digits are compared, each with its program."""
    fisher = problem.linearize(problem.params, problem.batch)
    gradient = jax.grad(problem.loss_fn)(problem.params, problem.batch)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, problem.params, gradient)
    solve = functools.partial(ngd.CG(30, rtol=1e-6), damping=1e-2)
    sample_space = functools.partial(ngd.SampleSpace(), damping=1e-2)
    return {
        "gradient": gradient,
        "F v": fisher.matvec(problem.vector),
        "CG(30), λ = 0.01": solve(fisher, gradient)[0],
        "SampleSpace, λ = 0.01": sample_space(fisher, gradient)[0],
        "KL of a step": fisher.kl(moved),
    }


def _digits(settings: AcceleratorSettings) -> Table:
    """Relative errors against float64 on the CPU."""
    problem = NETWORKS[settings.exact_network]()
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        wide = jax.tree.map(_widened, (problem.params, problem.batch, problem.vector))
        exact = _parts(problem._replace(params=wide[0], batch=wide[1], vector=wide[2]))
        exact = jax.tree.map(jax.device_get, exact)
    columns = []
    for precision in settings.precisions:
        with jax.default_matmul_precision(precision):
            found = jax.device_get(jax.jit(lambda: _parts(problem))())
        columns.append({name: _error(found[name], exact[name]) for name in exact})
    rows = [[name, *(f"{one[name]:.1e}" for one in columns)] for name in exact]
    title = f"Relative errors against float64, {settings.exact_network}"
    return Table(title, ["", *settings.precisions], rows)


def _widened(leaf: jax.Array) -> Any:
    values = jax.device_get(leaf)
    return values.astype("f8") if values.dtype.kind == "f" else values


def _error(found: Any, exact: Any) -> float:
    """‖found - exact‖ / ‖exact‖ over all leaves."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True))
    difference = sum(((a.astype("f8") - b) ** 2).sum() for a, b in pairs)
    return float((difference / sum((b**2).sum() for _, b in pairs)) ** 0.5)
