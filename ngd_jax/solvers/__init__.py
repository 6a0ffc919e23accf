"""Solvers of (F + λI) d = g, behind one interface and with one report.

    solver(fisher, rhs, *, damping, x0=None) -> (solution, SolverInfo)

A solver is a frozen dataclass. It sees the Fisher as an operator, knows nothing of
steps or Optax, and never returns a non-finite solution: trouble goes into the report.
"""

from ngd_jax.solvers.approximate_inverse import ApproximateInverse
from ngd_jax.solvers.auto import Auto, Choice
from ngd_jax.solvers.cg import CG
from ngd_jax.solvers.conjugate_gradient import conjugate_gradient
from ngd_jax.solvers.damping_search import DampingSearch, DampingSearchState
from ngd_jax.solvers.direct import Cholesky
from ngd_jax.solvers.interface import (
    Solver,
    SolverInfo,
    SolverStatus,
    StatefulSolver,
)
from ngd_jax.solvers.least_squares import LSMR, lsmr
from ngd_jax.solvers.lineax_adapter import Lineax
from ngd_jax.solvers.sample_space import SampleSpace
from ngd_jax.solvers.singular_values import SVD

__all__ = [
    "CG",
    "LSMR",
    "SVD",
    "ApproximateInverse",
    "Auto",
    "Choice",
    "Cholesky",
    "DampingSearch",
    "DampingSearchState",
    "Lineax",
    "SampleSpace",
    "Solver",
    "SolverInfo",
    "SolverStatus",
    "StatefulSolver",
    "conjugate_gradient",
    "lsmr",
]
