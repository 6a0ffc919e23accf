"""Any Lineax solver behind our interface. Lineax is imported only when one is used."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.solvers.interface import SolverInfo, SolverStatus, check_system
from ngd_jax.types import ArrayLike, PyTree

__all__ = ["Lineax"]


@dataclasses.dataclass(frozen=True)
class Lineax:
    """Solves (F + λI) d = g with a solver of the Lineax library.

    The operator is handed over as symmetric and positive semi-definite, without being
    built; a dense solver of Lineax builds it. The residual that is reported is the true
    one, at the cost of one product.

    Attributes:
      solver: a `lineax.AbstractLinearSolver`, say `lineax.GMRES(1e-6, 1e-6)`.

    Raises:
      ImportError: on the first solve, where Lineax is not installed.

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

    Note:
      Lineax 0.1 declares a breakdown of its CG by an absolute test which, in float32,
      stops well-conditioned systems of network size; see `ngd_jax.CG`.
    """

    solver: Any

    def __call__(
        self,
        fisher: Any,
        rhs: PyTree,
        *,
        damping: ArrayLike,
        x0: PyTree | None = None,
    ) -> tuple[PyTree, SolverInfo]:
        """Solves (F + λI) d = g; see `Solver`."""
        lineax = _import_lineax()
        check_system(rhs, damping, x0)
        wide = tree.widen(rhs)
        dtype = tree.accumulator_dtype(rhs)
        finite = tree.all_finite(wide)
        wide = tree.select(finite, wide, tree.zeros_like_wide(rhs))

        def matvec(vector: PyTree) -> PyTree:
            return tree.axpy(damping, vector, fisher.matvec(vector))

        operator = lineax.FunctionLinearOperator(
            matvec,
            jax.eval_shape(lambda: wide),
            tags=lineax.positive_semidefinite_tag,
        )
        options = {} if x0 is None else {"y0": tree.widen(x0)}
        result = lineax.linear_solve(
            operator, wide, self.solver, options=options, throw=False
        )
        solved = finite & tree.all_finite(result.value)
        solution = tree.select(solved, result.value, tree.zeros_like_wide(rhs))

        residual = tree.axpy(-1.0, matvec(solution), wide)
        scale = tree.max_abs(wide)
        scale = jnp.where(scale > 0, scale, 1.0)
        norm = tree.norm(tree.scale(1 / scale, wide))
        relative = tree.norm(tree.scale(1 / scale, residual))
        relative = jnp.where(norm > 0, relative / jnp.where(norm > 0, norm, 1.0), 0.0)

        # Where even the product with zero is not finite, there is nothing to go by.
        finite &= jnp.isfinite(relative)
        solved &= finite
        solution = tree.select(solved, solution, tree.zeros_like_wide(rhs))

        results = lineax.RESULTS
        status = jnp.where(
            result.result == results.successful,
            SolverStatus.CONVERGED,
            jnp.where(
                result.result == results.max_steps_reached,
                SolverStatus.MAX_STEPS,
                jnp.where(
                    result.result == results.stagnation,
                    SolverStatus.STAGNATED,
                    SolverStatus.BREAKDOWN,
                ),
            ),
        )
        failed = jnp.where(finite, SolverStatus.BREAKDOWN, SolverStatus.NON_FINITE)
        status = jnp.where(solved, status, failed)
        return optax.tree.cast_like(solution, rhs), SolverInfo(
            num_steps=jnp.asarray(result.stats.get("num_steps", 0), jnp.int32),
            relative_residual=jnp.where(solved, relative, 1.0).astype(dtype),
            status=status.astype(jnp.int32),
        )


def _import_lineax() -> Any:
    try:
        import lineax
    except ImportError as error:
        raise ImportError(
            "`Lineax` needs the lineax package: pip install 'ngd-jax[lineax]'."
        ) from error
    return lineax
