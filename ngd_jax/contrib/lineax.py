"""Any Lineax solver as a solver of (F + λI) d = g.

    F + λI as a `lineax.FunctionLinearOperator`, symmetric positive semi-definite

Owns the translation of results; Lineax is imported when a solver is first used.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.solvers.protocol import (
    RightHandSide,
    Solution,
    Solver,
    SolverInfo,
    SolverStatus,
    first_cause,
)
from ngd_jax.types import ArrayLike, PyTree

__all__ = ["Lineax"]


@dataclasses.dataclass(frozen=True)
class Lineax(Solver):
    """Solves (F + λI) d = g with a solver of the Lineax library.

    The operator is not built as a matrix, except by dense solvers of Lineax. The
    reported residual is the true one, at the cost of one product.

    Attributes:
      solver: a `lineax.AbstractLinearSolver`, say `lineax.GMRES(1e-6, 1e-6)`.

    Raises:
      ImportError: on the first solve, if Lineax is not installed.

    Example:
      >>> import jax.numpy as jnp, lineax, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
      ... )
      >>> solver = Lineax(lineax.Cholesky())
      >>> d, info = solver(fisher, jnp.array([[12.0], [17.0]]), damping=0.0)
      >>> d.ravel().round(2)
      Array([1., 1.], dtype=float32)

    References:
      Rader, Lyons and Kidger, Lineax: unified linear solves and linear least-squares in
      JAX and Equinox, 2023.

    Note:
      Lineax 0.1 declares a breakdown of its CG by an absolute test which, in float32,
      stops well-conditioned systems of network size; see `ngd_jax.CG`.
    """

    solver: Any

    def solve(
        self, fisher: Any, rhs: RightHandSide, *, damping: ArrayLike, state: PyTree = ()
    ) -> Solution:
        """Solves (F + λI) d = g; see `Solver`. Uses the guess."""
        lineax = _import_lineax()
        g = rhs.gradient

        def matvec(vector: PyTree) -> PyTree:
            return tree.axpy(damping, vector, fisher.matvec(vector))

        operator = lineax.FunctionLinearOperator(
            matvec, jax.eval_shape(lambda: g), tags=lineax.positive_semidefinite_tag
        )
        options = {} if rhs.guess is None else {"y0": tree.widen(rhs.guess)}
        result = lineax.linear_solve(
            operator, g, self.solver, options=options, throw=False
        )
        is_sound = tree.all_finite(result.value)
        zeros = jax.tree.map(jnp.zeros_like, g)
        direction = tree.select(is_sound, result.value, zeros)
        norm = tree.norm(g)
        residual = tree.norm(tree.axpy(-1.0, matvec(direction), g))
        residual /= jnp.where(norm > 0, norm, 1.0)

        # If even the product with zero is not finite, there is nothing to go by.
        is_finite = jnp.isfinite(residual)
        results = lineax.RESULTS
        status = first_cause(
            (~is_finite, SolverStatus.NON_FINITE),
            (~is_sound, SolverStatus.BREAKDOWN),
            (result.result == results.successful, SolverStatus.CONVERGED),
            (result.result == results.max_steps_reached, SolverStatus.MAX_STEPS),
            (result.result == results.stagnation, SolverStatus.STAGNATED),
            otherwise=SolverStatus.BREAKDOWN,
        )
        info = SolverInfo(
            num_steps=jnp.asarray(result.stats.get("num_steps", 0), jnp.int32),
            relative_residual=jnp.where(is_finite & is_sound, residual, 1.0),
            status=status,
        )
        direction = tree.select(is_finite, direction, zeros)
        return Solution(direction, None, info, state)


def _import_lineax() -> Any:
    try:
        import lineax
    except ImportError as error:
        raise ImportError(
            "`Lineax` needs the lineax package: pip install 'ngd-jax[lineax]'."
        ) from error
    return lineax
