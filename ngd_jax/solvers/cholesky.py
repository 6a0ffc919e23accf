"""Direct solves of (F + λI) d = g on the dense matrix, for few parameters.

    F + λI = L Lᵀ,    d = L⁻ᵀ L⁻¹ g

Trees become vectors here, in real coordinates. F comes from `ngd_jax.dense`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ngd_jax.coordinates import ravel_real
from ngd_jax.dense import dense
from ngd_jax.solvers.positive_definite import (
    direct_solution,
    make_positive_definite,
    solve_refined,
    with_least_jitter,
)
from ngd_jax.solvers.protocol import RightHandSide, Solution, Solver
from ngd_jax.types import ArrayLike, PyTree

__all__ = ["Cholesky"]


@dataclasses.dataclass(frozen=True)
class Cholesky(Solver):
    """Cholesky factorisation of F + λI in parameter space: exact, O(P³), P² memory.

        F + λI = L Lᵀ,    d = L⁻ᵀ L⁻¹ g

    Builds F as a matrix (see `ngd_jax.dense.dense`), which is right for every model,
    and refines the solution once. If the factorisation fails because λ is below the
    round-off of F, it is repeated with ε·P times the diagonal added: the smallest
    damping that working precision can tell from zero. `relative_residual` refers to the
    system asked for, so it shows what that cost; above the square root of the machine
    precision the status is STAGNATED.

    Args:
      verify: whether to check the solution against the operator, at the cost of one
        product with F. False is for benchmarks: the residual is that of the matrix.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
      ... )
      >>> d, info = Cholesky()(fisher, jnp.array([[12.0], [17.0]]), damping=0.0)
      >>> d.ravel().round(2)
      Array([1., 1.], dtype=float32)

    References:
      Golub and Van Loan, Matrix computations, 4th edition, sections 4.2 (Cholesky),
      3.5.3 (refinement).
    """

    verify: bool = True

    def solve(
        self, fisher: Any, rhs: RightHandSide, *, damping: ArrayLike, state: PyTree = ()
    ) -> Solution:
        """Solves (F + λI) d = g; see `Solver.solve`."""
        g, unravel = ravel_real(rhs.gradient)
        system = make_positive_definite(dense(fisher).astype(g.dtype), damping)
        x, residual = with_least_jitter(
            system, lambda _, factor: solve_refined(system, factor, g)
        )
        return direct_solution(
            fisher,
            rhs,
            unravel(x / system.unit),
            damping,
            state,
            residual=jnp.linalg.norm(residual),
            size=system.size(),
            verify=self.verify,
        )
