"""Dense symmetric positive systems, and the report of a direct solve.

    D⁻¹ A D⁻¹ = L Lᵀ with D² = diag(A),    x = D⁻¹ L⁻ᵀ L⁻¹ D⁻¹ b

In units of its own diagonal a matrix has no scale, and neither have its rows: a jitter
that is small there is small for each of them. Shared by the solvers in the space of
parameters and in the space of samples.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.solvers.interface import SolverInfo, SolverStatus
from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = ["Factor", "factorise", "report", "solve", "solve_refined"]


class Factor(NamedTuple):
    """A factorisation of A = S + λI, positive semi-definite.

    Attributes:
      matrix: S, `[M, M]`.
      shift: λ.
      scale: the inverse of D, `[M]`.
      transposed: Lᵀ, of the matrix plus `diag(jitter)`. LAPACK has columns where JAX
        has rows, so that this is L as it comes from there, and nothing has to move.
      jitter: what had to be added to the diagonal, `[M]`; zeros where nothing.
    """

    matrix: Array
    shift: Scalar
    scale: Array
    transposed: Array
    jitter: Array

    def product(self, x: Array) -> Array:
        """A x."""
        return self.matrix @ x + self.shift * x


def factorise(matrix: Array, shift: ArrayLike = 0.0) -> Factor:
    """Factorises S + λI for a Hermitian positive semi-definite S of finite entries.

    Where Cholesky fails, the matrix is singular to working precision. It is repeated
    with M·ε times the diagonal added, the least that precision can tell from nothing,
    and where sums over many parameters have more round-off than that, with √ε times.

    Args:
      matrix: S, `[M, M]`.
      shift: λ, at least 0.
    """
    diagonal = jnp.real(jnp.diagonal(matrix))
    shift = jnp.asarray(shift, diagonal.dtype)
    diagonal = diagonal + shift
    scale = jnp.where(diagonal > 0, jnp.where(diagonal > 0, diagonal, 1) ** -0.5, 1)
    eps = float(jnp.finfo(matrix.dtype).eps)

    def attempt(jitters: tuple[float, ...]) -> tuple[Array, Array]:
        jitter, *others = jitters
        scaled = matrix * scale[:, None] * scale[None, :]
        added = (shift * scale**2 + jitter).astype(matrix.dtype)
        scaled += jnp.diag(added)
        # Only one triangle is read: nothing to make symmetric first. The other one,
        # for the sake of the order of the entries in memory.
        lower = jax.lax.linalg.cholesky(jnp.conj(scaled.T), symmetrize_input=False)
        found = lower.T, jnp.asarray(jitter, diagonal.dtype)
        if not others:
            return found
        # A failure shows in every entry.
        is_finite = jnp.all(jnp.isfinite(jnp.diagonal(lower)))
        return jax.lax.cond(is_finite, lambda: found, lambda: attempt(tuple(others)))

    transposed, jitter = attempt((0.0, len(matrix) * eps, eps**0.5))
    return Factor(matrix, shift, scale, transposed, jitter * scale**-2)


def solve(factor: Factor, b: Array) -> Array:
    """Solves (A + diag(jitter)) x = b."""
    lower = factor.transposed.T, True
    return factor.scale * jax.scipy.linalg.cho_solve(lower, factor.scale * b)


def solve_refined(factor: Factor, b: Array) -> tuple[Array, Array]:
    """Solves A x = b, refined once with the true residual; x and b - A x."""
    x = solve(factor, b)
    residual = b - factor.product(x)
    refined = x + solve(factor, residual)
    new_residual = b - factor.product(refined)
    # Refinement helps unless the jitter is large against A; then it may diverge.
    is_better = jnp.linalg.norm(new_residual) < jnp.linalg.norm(residual)
    return (
        jnp.where(is_better, refined, x),
        jnp.where(is_better, new_residual, residual),
    )


def report(
    solution: PyTree, rhs: PyTree, relative_residual: Scalar, is_finite: Array
) -> tuple[PyTree, SolverInfo]:
    """The solution in the dtypes of `rhs`, zero where it is not finite; the report.

    Args:
      solution: as it came out.
      rhs: g.
      relative_residual: of the system asked for.
      is_finite: whether what went in was.
    """
    dtype = tree.accumulator_dtype(rhs)
    is_solved = is_finite & tree.all_finite(solution) & jnp.isfinite(relative_residual)
    is_small = relative_residual <= jnp.finfo(dtype).eps ** 0.5
    status = jnp.select(
        [~is_finite, ~is_solved, is_small],
        [SolverStatus.NON_FINITE, SolverStatus.BREAKDOWN, SolverStatus.CONVERGED],
        SolverStatus.STAGNATED,
    )
    solution = jax.tree.map(
        lambda d, r: jnp.where(is_solved, d, 0).astype(jnp.result_type(r)),
        solution,
        rhs,
    )
    return solution, SolverInfo(
        num_steps=jnp.zeros((), jnp.int32),
        relative_residual=jnp.where(is_solved, relative_residual, 1.0).astype(dtype),
        status=status.astype(jnp.int32),
    )
