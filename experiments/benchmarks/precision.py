"""The table of precision: how accurate the direction is, by the dtype of the model.

    error(d, d*) = ‖d - d*‖ / ‖d*‖,    (F + λI) d* = g

against three reference solutions, dense and in float64, since a model in bfloat16 is a
different function from the same model in float64:

    the model      F and g of the float64 model at the float64 parameters
    its rounding   F and g of the float64 model at the rounded parameters and data: the
                   remaining error is the arithmetic of the model and of the solver
    its products   the matrix of the products that the solver is given, and the g that
                   it is given: the remaining error is the solver. Solvers in output
                   space are not given that g, and for λ below the rounding of F this is
                   no valid reference

The first two are min ‖A d - w‖² + λ‖d‖² with F = AᵀA and g = Aᵀw, which keeps the
digits that forming F would lose. As in the library, the solver's vectors are float32
for both narrower models.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from experiments.benchmarks.contestants import (
    Problem,
    cast_problem,
    count_parameters,
    make_problem,
    widths_of,
)
from experiments.benchmarks.markdown import Table
from experiments.benchmarks.settings import PrecisionSettings
from ngd_jax import dense, tree

__all__ = [
    "dense_system",
    "directions",
    "least_squares_system",
    "precision_tables",
    "relative_error",
    "solve_least_squares",
]

_TRUTHS = ("the model", "its rounding", "its products")

_Vector = np.ndarray


def relative_error(found: _Vector, truth: _Vector) -> float:
    """‖found - truth‖ / ‖truth‖."""
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def dense_system(problem: Problem) -> tuple[np.ndarray, _Vector]:
    """F from the model's own products, and g; then converted to float64."""

    @jax.jit
    def build(params: Any, batch: Any) -> Any:
        matrix = dense.dense(problem.linearize(params, batch))
        return matrix, ravel_pytree(tree.widen(_gradient(problem, params, batch)))[0]

    matrix, gradient = build(problem.params, problem.batch)
    return np.asarray(matrix, np.float64), np.asarray(gradient, np.float64)


def least_squares_system(problem: Problem) -> tuple[np.ndarray, _Vector]:
    """A and w, then converted to float64."""

    @jax.jit
    def build(params: Any, batch: Any) -> Any:
        fisher = problem.linearize(params, batch)
        flat, unravel = ravel_pytree(tree.widen(params))

        def column(vector: jax.Array) -> jax.Array:
            return ravel_pytree(fisher.sqrt_matvec(unravel(vector)))[0]

        columns = jax.vmap(column)(jnp.eye(flat.size, dtype=flat.dtype))
        return columns.T, ravel_pytree(_coefficients(problem, fisher, batch))[0]

    root, coefficients = build(problem.params, problem.batch)
    return np.asarray(root, np.float64), np.asarray(coefficients, np.float64)


def solve_least_squares(
    root: np.ndarray, coefficients: _Vector, damping: float
) -> _Vector:
    """(AᵀA + λI)⁻¹ Aᵀw without forming AᵀA."""
    size = root.shape[1]
    stacked = np.vstack([root, np.sqrt(damping) * np.eye(size)])
    right = np.concatenate([coefficients, np.zeros(size)])
    return np.linalg.lstsq(stacked, right)[0]


def directions(
    problem: Problem, solver: ngd.Solver, dampings: Sequence[float]
) -> list[_Vector]:
    """The solution that the transformation computes, without step size, per damping."""

    @jax.jit
    def solve(params: Any, batch: Any, damping: jax.Array) -> jax.Array:
        fisher = problem.linearize(params, batch)
        rhs = ngd.RightHandSide(
            tree.widen(_gradient(problem, params, batch)),
            _coefficients(problem, fisher, batch),
        )
        found = ngd.solve_scaled(
            solver, fisher, rhs, damping=damping, state=solver.init(params)
        )
        return ravel_pytree(found.direction)[0]

    return [
        np.asarray(solve(problem.params, problem.batch, jnp.asarray(x)), np.float64)
        for x in dampings
    ]


def precision_tables(settings: PrecisionSettings) -> list[Table]:
    """One table for each network."""
    return [_table(cell, settings) for cell in settings.cells]


def _table(cell: Sequence[int], settings: PrecisionSettings) -> Table:
    problem = make_problem(widths_of(cell), cell[1])
    exact = _truth(problem)
    mean = float(np.sum(exact[0] ** 2)) / exact[0].shape[1]
    rows = []
    for dtype in settings.dtypes:
        with jax.enable_x64(dtype == "float64"):
            rounded = cast_problem(problem, dtype)
            own = dense_system(rounded)
        same = _truth(rounded)
        dampings = [relative * mean for relative in settings.dampings]
        truths = [
            (
                solve_least_squares(*exact, damping),
                solve_least_squares(*same, damping),
                np.linalg.solve(own[0] + damping * np.eye(len(own[1])), own[1]),
            )
            for damping in dampings
        ]
        for name, solver in _solvers(dtype, settings.max_steps).items():
            with jax.enable_x64(dtype == "float64"):
                found = directions(rounded, solver, dampings)
            for relative, d, expected in zip(
                settings.dampings, found, truths, strict=True
            ):
                errors = [f"{relative_error(d, truth):.1e}" for truth in expected]
                rows.append([dtype, name, f"{relative:g}", *errors])
    where = f"P = {count_parameters(problem):,}, N = {cell[1]}, K = {cell[2]}"
    return Table(
        f"Relative error of the direction ({where}) against the truth for",
        [
            "model",
            "solver",
            "λ P / trace F",
            *_TRUTHS,
        ],
        rows,
        notes=[
            "All truths are dense and float64.",
            "The model: F and g of the float64 model.",
            "Its rounding: of the float64 model at the parameters and data as rounded.",
            "Its products: the matrix and the g that the solver was given.",
            "Vectors of the solvers are float32, float64 for the float64 model.",
        ],
    )


def _solvers(dtype: str, max_steps: int) -> dict[str, ngd.Solver]:
    """The solvers, each run until round-off or its step limit."""
    eps = float(jnp.finfo("float64" if dtype == "float64" else "float32").eps)
    return {
        "CG": ngd.CG(max_steps=max_steps, rtol=eps),
        "LSMR": ngd.LSMR(max_steps=max_steps, rtol=eps),
        "Cholesky": ngd.Cholesky(),
        "SampleSpace": ngd.SampleSpace(),
    }


def _truth(problem: Problem) -> tuple[np.ndarray, _Vector]:
    with jax.enable_x64(True):
        return least_squares_system(cast_problem(problem, "float64"))


def _coefficients(problem: Problem, fisher: ngd.Fisher, batch: Any) -> Any:
    cotangents = jax.grad(problem.output_loss_fn)(fisher.outputs, batch)
    return fisher.sqrt_solve(cotangents)


def _gradient(problem: Problem, params: Any, batch: Any) -> Any:
    return jax.grad(problem.loss_fn)(params, batch)
