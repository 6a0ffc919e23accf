"""Number of products to a small residual: no preconditioner, Jacobi, Nyström.

Two systems (F + λI) d = g, both after a few steps of training: a deep autoencoder, and
a network on inputs in their raw units, whose F + λI has a condition number above 1e8.
The cost of a preconditioner is counted in the same unit, so that rows can be compared:
a product is one `jvp` and one `vjp`, a pullback is half a product.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from experiments.benchmarks.settings import PreconditionersSettings
from experiments.benchmarks.systems import Problem, make_autoencoder, make_raw_wine
from ngd_jax import contrib, dense, tree
from ngd_jax.types import ArrayLike

__all__ = [
    "HEAD",
    "Row",
    "cells",
    "measure_preconditioners",
]

# For the condition number: parameters for the dense matrix, products without it.
_LARGEST_DENSE = 2000
_POWER_STEPS = 20
# Steps before a preconditioner is rebuilt: never, so it is built once for all solves.
_NEVER = 1_000_000


class Row(NamedTuple):
    """One system, one preconditioner.

    Attributes:
      problem: its name.
      damping: λ.
      condition: of F + λI.
      preconditioner: in words.
      build: cost of building it, in products.
      products: of the solve itself, including those that recompute the residual.
      residual: the true relative residual at the end.
      reached: whether it is at most the one asked for.
      gain: decrease of the quadratic model after a few products of the solve, relative
        to the largest known; building not counted.
    """

    problem: str
    damping: float
    condition: float
    preconditioner: str
    build: float
    products: int
    residual: float
    reached: bool
    gain: float


HEAD = (
    "system",
    "λ",
    "condition",
    "preconditioner",
    "to build",
    "to solve",
    "together",
    "residual",
    "model's gain",
)


def cells(row: Row) -> list[str]:
    """The row for the reader, under `HEAD`; costs in products."""
    above = "" if row.reached else "> "
    return [
        row.problem,
        f"{row.damping:g}",
        f"{row.condition:.1e}",
        row.preconditioner,
        f"{row.build:g}",
        f"{above}{row.products}",
        f"{above}{row.build + row.products:g}",
        f"{row.residual:.1e}",
        f"{row.gain:.3f}",
    ]


def measure_preconditioners(settings: PreconditionersSettings) -> list[Row]:
    """All rows; float32 for the autoencoder, float64 for the raw inputs."""
    rows = _measure(make_autoencoder(settings), settings.dampings, settings)
    # In float32, round-off alone exceeds the residual asked for.
    with jax.enable_x64(True):
        return rows + _measure(make_raw_wine(settings), settings.raw_dampings, settings)


class _Contestant(NamedTuple):
    name: str
    preconditioner: ngd.Preconditioner | None
    build: float  # in products
    is_reused: bool = False


def _contestants(
    problem: Problem, settings: PreconditionersSettings
) -> list[_Contestant]:
    key = jax.random.key(settings.seed + 1)
    probes = settings.num_probes
    jacobi = functools.partial(contrib.Jacobi, refresh_every=_NEVER)
    estimated = functools.partial(jacobi, num_probes=probes, key=key)
    entries = [_Contestant("none", None, 0)]
    if tree.size(problem.params) <= settings.exact_limit:
        outputs = problem.model_fn(problem.params, problem.batch)
        price = outputs.shape[-1] / 2  # one pullback per output
        entries += [
            _Contestant("Jacobi", jacobi(power=1.0), price),
            _Contestant("Jacobi, power 3/4", jacobi(power=0.75), price),
        ]
    name = f"Jacobi, {probes} probes"
    entries += [
        _Contestant(name, estimated(power=1.0), probes / 2),
        _Contestant(f"{name}, power 3/4", estimated(power=0.75), probes / 2),
    ]
    for rank in settings.ranks:
        name = f"Nyström, rank {rank}"
        preconditioner = contrib.Nystrom(rank, key, refresh_every=_NEVER)
        price = len(preconditioner.init(problem.params).eigenvalues)
        old = f"{name}, {settings.steps_between} steps old"
        entries += [
            _Contestant(name, preconditioner, price),
            _Contestant(old, preconditioner, 0, is_reused=True),
        ]
    return entries


def _measure(
    problem: Problem, dampings: list[float], settings: PreconditionersSettings
) -> list[Row]:
    matrix = _dense_fisher(problem)
    smallest, largest = _extreme_eigenvalues(problem, matrix)
    rows, decreases = [], _largest_decreases(problem, matrix, dampings)
    for contestant in _contestants(problem, settings):
        solve = _make_solve(problem, contestant, settings)
        for damping in dampings:
            solved = solve(damping)
            decreases[damping] = max(decreases[damping], solved.decrease)
            rows.append(
                Row(
                    problem=problem.name,
                    damping=damping,
                    condition=(largest + damping) / (smallest + damping),
                    preconditioner=contestant.name,
                    build=contestant.build,
                    products=solved.products,
                    residual=solved.residual,
                    # The last digit of a residual in float32 is noise.
                    reached=solved.residual <= 1.01 * settings.rtol,
                    gain=solved.early_decrease,
                )
            )
    rows = [row._replace(gain=row.gain / decreases[row.damping]) for row in rows]
    return sorted(rows, key=lambda row: -row.damping)


class _Solved(NamedTuple):
    products: int
    residual: float
    decrease: float  # of the quadratic model
    early_decrease: float  # after a few products


class _Counted(NamedTuple):
    """A Fisher that reports each product at run time."""

    fisher: ngd.Fisher
    calls: list[int]

    @property
    def chunks(self) -> None:
        return None

    def matvec_and_push(self, vector: Any) -> Any:
        jax.debug.callback(lambda: self.calls.append(1))
        return self.fisher.matvec_and_push(vector)


def _make_solve(
    problem: Problem, contestant: _Contestant, settings: PreconditionersSettings
) -> Callable[[float], _Solved]:
    """Makes a function from the damping to the result of the solve."""
    preconditioner, calls = contestant.preconditioner, []

    # Pass arrays as arguments: the compiler would constant-fold whole networks.
    @jax.jit
    def build(params: Any, batch: Any) -> Any:
        if preconditioner is None:
            return ()
        fisher = _linearize(problem, params, batch)
        return preconditioner.prepare(fisher, preconditioner.init(params), 0.0)[1]

    @jax.jit
    def run(params: Any, batch: Any, state: Any, damping: jax.Array) -> Any:
        fisher = _linearize(problem, params, batch)
        rhs = jax.grad(problem.loss_fn)(params, batch)

        def built(_: Any, damping: ArrayLike) -> Any:
            assert preconditioner is not None
            return preconditioner.prepare(fisher, state, damping)[0]

        def residual_and_decrease(steps: int, fisher_of_solve: Any) -> Any:
            solver = ngd.CG(
                max_steps=steps,
                rtol=settings.rtol if steps == settings.max_products else 0.0,
                preconditioner=None if preconditioner is None else built,
            )
            solution, _ = solver(fisher_of_solve, rhs, damping=damping)
            image = tree.axpy(damping, solution, fisher.matvec(solution))
            rest = tree.axpy(-1.0, image, rhs)
            decrease = (tree.vdot(solution, rhs) + tree.vdot(solution, rest)) / 2
            return jnp.sqrt(tree.vdot(rest, rest) / tree.vdot(rhs, rhs)), decrease

        _, early = residual_and_decrease(settings.few_products, fisher)
        whole = residual_and_decrease(settings.max_products, _Counted(fisher, calls))
        return *whole, early

    origin = problem.earlier if contestant.is_reused else problem.params
    state = build(origin, problem.batch)

    def solve(damping: float) -> _Solved:
        calls.clear()
        arguments = (problem.params, problem.batch, state, jnp.asarray(damping))
        residual, decrease, early = map(float, run(*arguments))
        jax.effects_barrier()
        return _Solved(len(calls), residual, decrease, early)

    return solve


def _linearize(problem: Problem, params: Any, batch: Any) -> ngd.Fisher:
    return ngd.linearize_fisher(problem.model_fn, params, batch, problem.likelihood)


def _dense_fisher(problem: Problem) -> np.ndarray | None:
    if tree.size(problem.params) > _LARGEST_DENSE:
        return None
    fisher = _linearize(problem, problem.params, problem.batch)
    return np.asarray(dense.dense(fisher), float)


def _largest_decreases(
    problem: Problem, matrix: np.ndarray | None, dampings: list[float]
) -> dict[float, float]:
    """½ gᵀ(F + λI)⁻¹g where F is small, else 0."""
    if matrix is None:
        return dict.fromkeys(dampings, 0.0)
    gradient, _ = ravel_pytree(jax.grad(problem.loss_fn)(problem.params, problem.batch))
    values, vectors = np.linalg.eigh(matrix)
    parts = (vectors.T @ np.asarray(gradient, float)) ** 2
    return {
        damping: float(np.sum(parts / (np.maximum(values, 0.0) + damping))) / 2
        for damping in dampings
    }


def _extreme_eigenvalues(
    problem: Problem, matrix: np.ndarray | None
) -> tuple[float, float]:
    """Of F: exact if it is small, else 0 and a power iteration from below."""
    if matrix is not None:
        values = np.linalg.eigvalsh(matrix)
        return max(float(values[0]), 0.0), float(values[-1])

    flat, unravel = ravel_pytree(problem.params)

    @jax.jit
    def power_iteration(params: Any, batch: Any, vector: Any) -> jax.Array:
        fisher = _linearize(problem, params, batch)

        def step(_: Any, vector: Any) -> Any:
            image = fisher.matvec(vector)
            return tree.divide(image, jnp.sqrt(tree.vdot(image, image)))

        return fisher.quadratic(jax.lax.fori_loop(0, _POWER_STEPS, step, vector))

    start = unravel(jax.random.normal(jax.random.key(0), flat.shape, flat.dtype))
    return 0.0, float(power_iteration(problem.params, problem.batch, start))
