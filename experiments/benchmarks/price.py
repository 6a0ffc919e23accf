"""The table of prices: what our step costs a user compared with Adam's.

A bare jitted step (gradient, update, addition) of each optimizer on the same network:
its compilation, its size after XLA has optimized it, its time and its memory.
"""

import functools
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import ngd_jax as ngd
from experiments.benchmarks.clocks import (
    compile_timed,
    interleaved_seconds,
    value_in_process,
)
from experiments.benchmarks.contestants import Problem, check_taken, train_step
from experiments.benchmarks.markdown import Table
from experiments.benchmarks.networks import NETWORKS
from experiments.benchmarks.settings import PriceSettings
from experiments.benchmarks.space import planned_memory

__all__ = [
    "OPTIMIZERS",
    "Price",
    "cache_table",
    "count_instructions",
    "first_step_seconds",
    "growth_table",
    "price_tables",
]


class Price(NamedTuple):
    """The cost of a step.

    Attributes:
      compiling: CPU seconds to trace, lower and compile it.
      num_instructions, num_fusions: in the compiled program.
      step: CPU seconds.
      gradient: CPU seconds of the gradient alone, timed in the same turns.
      memory: arguments, results and temporaries when parameters and state are donated,
        in bytes per byte of the parameters.
      state: bytes of the optimizer's state, likewise.
    """

    compiling: float
    num_instructions: int
    num_fusions: int
    step: float
    gradient: float
    memory: float
    state: float


def _natural(problem: Problem, rate: float = 1.0, **options: Any) -> Any:
    options = {"max_kl": 0.1, **options}
    return ngd.natural_gradient(rate, problem.model_fn, problem.likelihood, **options)


_BASELINE = "Adam"
# The default without a radius shows the cost of the measured KL.
OPTIMIZERS: dict[str, Callable[[Problem], Any]] = {
    _BASELINE: lambda _: optax.adam(1e-3),
    "default": _natural,
    "KFAC, momentum": lambda problem: _natural(
        problem, 0.3, momentum=0.9, solver=ngd.KFAC()
    ),
    "CG(10)": lambda problem: _natural(problem, solver=ngd.CG(10)),
    "default, no radius": lambda problem: _natural(problem, max_kl=None),
}

_DOUBLED = (("transformer_2", "transformer_4"), ("transformer_4", "transformer_8"))
_NOTE = (
    "P is the number of parameters. Memory is what XLA plans with parameters and state "
    "donated: arguments, results and temporaries. Every step starts from the initial "
    "parameters, and times are means over turns that hold a refresh of the factors."
)


def price_tables(settings: PriceSettings) -> list[Table]:
    """Prices by network and optimizer, growth with depth, and cached programs."""
    prices = {
        name: _measure(NETWORKS[name](), settings.steps, settings.repeats)
        for name in settings.networks
    }
    tables = [_tabulate(prices)]
    if any(a in prices and b in prices for a, b in _DOUBLED):
        tables.append(growth_table(prices))
    if settings.cached_network is not None:
        tables.append(cache_table(settings.cached_network))
    return tables


def _measure(problem: Problem, steps: int, repeats: int) -> dict[str, Price]:
    made = {
        name: train_step(problem, make(problem)) for name, make in OPTIMIZERS.items()
    }
    compiled = {}
    # The first compilation in a process takes longer, so it is repeated.
    for name in (_BASELINE, *OPTIMIZERS):
        step, state = made[name]
        args = (problem.params, state, problem.batch)
        compiled[name] = compile_timed(step, args, donate_argnums=(0, 1))
    gradient = jax.jit(jax.value_and_grad(problem.loss_fn))
    calls = [
        lambda: gradient(problem.params, problem.batch),
        *(_step(compiled[name][0], problem, made[name][1]) for name in OPTIMIZERS),
    ]
    one, *taken = interleaved_seconds(
        [functools.partial(_repeat, call, steps) for call in calls],
        repeats=repeats,
        minimum=0.0,
    )
    size = _num_bytes(problem.params)
    return {
        name: Price(
            compiled[name][1],
            *count_instructions(compiled[name][0]),
            step / steps,
            one / steps,
            planned_memory(compiled[name][0]).peak / size,
            _num_bytes(made[name][1]) / size,
        )
        for name, step in zip(OPTIMIZERS, taken, strict=True)
    }


def _step(
    program: jax.stages.Compiled, problem: Problem, state: Any
) -> Callable[[], Any]:
    """A step from the initial parameters that carries on the optimizer's state.

    With real training, the batch would soon be memorised, and solvers would then stop
    early. The copy that each step overwrites is part of the time, about 5 % of a
    gradient.

    Raises:
      RuntimeError: such a step is refused, so that its cost means nothing.
    """
    # One program: copying leaf by leaf takes as long as a small network's gradient.
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    state = copy(state)  # the first step overwrites it

    def run() -> Any:
        nonlocal state
        params, state, _ = program(copy(problem.params), state, problem.batch)
        return params

    run()
    if optax.tree.get(state, "NaturalGradientInfo") is not None:
        check_taken(state)
    return run


def _repeat(function: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        jax.block_until_ready(function())


def _tabulate(prices: Mapping[str, Mapping[str, Price]]) -> Table:
    rows = []
    for network, of_network in prices.items():
        adam = of_network[_BASELINE]
        for name, price in of_network.items():
            rows.append(
                [
                    network,
                    name,
                    f"{price.compiling:.2f}",
                    f"{price.compiling / adam.compiling:.2f}",
                    f"{price.num_instructions:,}",
                    f"{price.num_fusions:,}",
                    f"{price.step / price.gradient:.2f}",
                    f"{price.step / adam.step:.2f}",
                    f"{price.memory:.2f}",
                    f"{price.state:.2f}",
                ]
            )
    head = ("network", "optimizer", "compiling, CPU s", "× Adam's", "instructions")
    head += ("fusions", "a step, gradients", "× Adam's", "memory / P", "state / P")
    return Table("A step of each optimizer", head, rows, notes=[_NOTE])


def growth_table(prices: Mapping[str, Mapping[str, Price]]) -> Table:
    """Growth of the optimized programs when a Transformer's depth doubles."""
    pairs = [(a, b) for a, b in _DOUBLED if a in prices and b in prices]

    def growth(name: str, a: str, b: str) -> float:
        return prices[b][name].num_instructions / prices[a][name].num_instructions

    rows = [
        [name, *(f"{growth(name, *pair):.2f}" for pair in pairs)] for name in OPTIMIZERS
    ]
    head = ["optimizer", *(f"{a} → {b}" for a, b in pairs)]
    return Table("Instructions at twice the depth, relative", head, rows)


def first_step_seconds(network: str, optimizer: str) -> float:
    """CPU seconds until the first step in this process is done."""
    problem = NETWORKS[network]()
    step, state = train_step(problem, OPTIMIZERS[optimizer](problem))
    start = time.process_time()
    jax.block_until_ready(jax.jit(step)(problem.params, state, problem.batch))
    return time.process_time() - start


def cache_table(network: str) -> Table:
    """First steps of two processes that share a compilation cache on disk."""
    rows = []
    for name in (_BASELINE, "default"):
        with tempfile.TemporaryDirectory() as folder:
            first, second = (
                value_in_process(
                    __name__,
                    first_step_seconds.__name__,
                    [network, name],
                    {"JAX_COMPILATION_CACHE_DIR": folder},
                )
                for _ in range(2)
            )
        rows.append([name, f"{first:.2f}", f"{second:.2f}", f"{second / first:.2f}"])
    head = ["optimizer", "first process", "second process", "second / first"]
    title = f"The first step with a compilation cache on disk, CPU s, {network}"
    note = "JAX keeps only programs that took XLA a second or more."
    return Table(title, head, rows, notes=[note])


def count_instructions(program: jax.stages.Compiled) -> tuple[int, int]:
    """All instructions of the optimized program, and those that are fusions."""
    text = program.as_text() or ""
    instructions = re.findall(r"^\s+(?:ROOT )?%?\S+ = ", text, re.MULTILINE)
    return len(instructions), text.count(" fusion(")


def _num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
