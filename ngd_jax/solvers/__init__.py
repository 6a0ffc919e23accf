"""Solvers of (F + λI) d = g behind one protocol.

* `protocol`: what they take and return, and how they are checked;
* `preconditioner`: what CG's preconditioners are, and when they are built anew;
* `cg`: conjugate gradients, for any size of problem;
* `lsmr`: least squares on the square root of F, for small damping;
* `cholesky`: dense F, for few parameters;
* `sample_space`: the Gram matrix of the samples, for few examples.
"""

from ngd_jax.solvers.cg import CG, conjugate_gradient
from ngd_jax.solvers.cholesky import Cholesky
from ngd_jax.solvers.lsmr import LSMR, lsmr
from ngd_jax.solvers.preconditioner import Preconditioner
from ngd_jax.solvers.protocol import (
    RightHandSide,
    Solution,
    Solver,
    SolverInfo,
    SolverStatus,
    check_solution,
    solve_scaled,
)
from ngd_jax.solvers.sample_space import SampleSpace

__all__ = [
    "CG",
    "LSMR",
    "Cholesky",
    "Preconditioner",
    "RightHandSide",
    "SampleSpace",
    "Solution",
    "Solver",
    "SolverInfo",
    "SolverStatus",
    "check_solution",
    "conjugate_gradient",
    "lsmr",
    "solve_scaled",
]
