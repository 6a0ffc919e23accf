"""Dense symmetric positive systems, and the report of a direct solve.

    A = (S + λI) / u,    D⁻¹ A D⁻¹ = L Lᵀ with D² = diag(A),    x = D⁻¹ L⁻ᵀ L⁻¹ D⁻¹ b

In units of its own diagonal a matrix has no scale, and neither have its rows: a jitter
that is small there is small for each of them. Shared by the solvers in the space of
parameters and in the space of samples.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.solvers.interface import SolverInfo, SolverStatus
from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = [
    "Factor",
    "PositiveDefinite",
    "check_factor_dtype",
    "factorise",
    "frobenius_norm",
    "is_narrower",
    "make_positive_definite",
    "report",
    "solve",
    "solve_refined",
    "with_least_jitter",
]


class PositiveDefinite(NamedTuple):
    """A = (S + λI) / u for a Hermitian positive semi-definite S.

    Attributes:
      matrix: S, `[M, M]`; the matrix in units of u is made nowhere.
      shift: λ / u.
      unit: u, the largest entry on the diagonal of S + λI.
    """

    matrix: Array
    shift: Scalar
    unit: Scalar

    def product(self, x: Array) -> Array:
        """A x."""
        return self.matrix @ x / self.unit + self.shift * x


class Factor(NamedTuple):
    """A factorisation of A + jitter · diag(A).

    Attributes:
      scale: the inverse of D, `[M]`.
      transposed: Lᵀ. LAPACK has columns where JAX has rows, so that this is L as it
        comes from there, and nothing has to move.
    """

    scale: Array
    transposed: Array


def make_positive_definite(
    matrix: Array, damping: ArrayLike, is_sound: Array
) -> PositiveDefinite:
    """S + λI in units of the largest entry on its diagonal.

    Args:
      matrix: S, `[M, M]`.
      damping: λ, at least 0.
      is_sound: whether S and λ are finite; where not, the unit is one.
    """
    largest = jnp.max(jnp.real(jnp.diagonal(matrix)), initial=0.0)
    damping = jnp.asarray(damping, largest.dtype)
    unit = largest + damping
    unit = jnp.where(is_sound & (unit > 0), unit, 1.0)
    return PositiveDefinite(matrix, damping / unit, unit)


def factorise(
    system: PositiveDefinite, jitter: ArrayLike = 0.0, shift: Scalar | None = None
) -> tuple[Factor, Array]:
    """Factorises A + jitter · diag(A), and says whether there is such a factor.

    Args:
      system: A, of finite entries.
      jitter: at least 0.
      shift: λ / u, where it shall be another one.
    """
    shift = system.shift if shift is None else shift
    diagonal = jnp.real(jnp.diagonal(system.matrix)) + shift * system.unit
    inverse = jnp.where(diagonal > 0, jnp.where(diagonal > 0, diagonal, 1) ** -0.5, 1)
    scaled = system.matrix * inverse[:, None] * inverse[None, :]
    added = shift * system.unit * inverse**2 + jitter
    scaled += jnp.diag(added.astype(scaled.dtype))
    # Only one triangle is read: nothing to make symmetric first. The other one, for
    # the sake of the order of the entries in memory.
    lower = jax.lax.linalg.cholesky(jnp.conj(scaled.T), symmetrize_input=False)
    # A failure shows in every entry.
    exists = jnp.all(jnp.isfinite(jnp.diagonal(lower)))
    return Factor(inverse * jnp.sqrt(system.unit), lower.T), exists


def with_least_jitter(
    system: PositiveDefinite, fn: Callable[[Scalar, Factor], PyTree]
) -> PyTree:
    """`fn(jitter, factor)` for the least jitter of three for which A has a factor.

    Where Cholesky fails, the matrix is singular to working precision. It is repeated
    with M·ε times the diagonal added, the least that precision can tell from nothing,
    and where sums over many parameters have more round-off than that, with √ε times.

    Args:
      system: A.
      fn: what to do with the factor; its result should be small, the factor itself is
        for use inside, so that no copy of it is ever made.
    """
    dtype = system.unit.dtype
    eps = float(jnp.finfo(dtype).eps)
    jitters = jnp.asarray([0.0, len(system.matrix) * eps, eps**0.5], dtype)

    def attempt(count: Array) -> tuple[Array, PyTree]:
        factor, exists = factorise(system, jitters[count])
        return exists, fn(jitters[count], factor)

    def is_running(carry: tuple[Array, Array, PyTree]) -> Array:
        count, exists, _ = carry
        return (count < len(jitters)) & ~exists

    def body(carry: tuple[Array, Array, PyTree]) -> tuple[Array, Array, PyTree]:
        count, _, _ = carry
        return count + 1, *attempt(count)

    zero = jnp.zeros((), jnp.int32)
    like = jax.eval_shape(attempt, zero)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.lax.while_loop(is_running, body, (zero, *start))[2]


def solve(factor: Factor, b: Array) -> Array:
    """Solves with what was factorised."""
    lower = factor.transposed.T, True
    return factor.scale * jax.scipy.linalg.cho_solve(lower, factor.scale * b)


def solve_refined(
    system: PositiveDefinite, factor: Factor, b: Array
) -> tuple[Array, Array]:
    """Solves A x = b, refined once with the true residual; x and b - A x."""
    x = solve(factor, b)
    residual = b - system.product(x)
    refined = x + solve(factor, residual)
    new_residual = b - system.product(refined)
    # Refinement helps unless the jitter is large against A; then it may diverge.
    is_better = jnp.linalg.norm(new_residual) < jnp.linalg.norm(residual)
    return (
        jnp.where(is_better, refined, x),
        jnp.where(is_better, new_residual, residual),
    )


def frobenius_norm(matrix: Array) -> Scalar:
    """√(Σ aᵢⱼ²), row by row: a sum over both axes at once is slow to compute."""
    return jnp.linalg.norm(jnp.linalg.norm(matrix, axis=1))


def check_factor_dtype(dtype: Any) -> None:
    """Raises on a dtype in which nothing can be factorised.

    Raises:
      TypeError: on anything but None, float32 and float64.
    """
    if dtype is None:
        return
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in ("float32", "float64"):
        raise TypeError(
            f"`factor_dtype` must be None, jnp.float32 or jnp.float64, got {name}."
        )


def is_narrower(factor_dtype: Any, values: PyTree) -> bool:
    """Whether a factor in this dtype is of lower precision than the arithmetic."""
    if factor_dtype is None:
        return False
    eps = jnp.finfo(tree.accumulator_dtype(values)).eps
    return bool(jnp.finfo(factor_dtype).eps > eps)


def report(
    solution: PyTree,
    rhs: PyTree,
    relative_residual: Scalar,
    is_finite: Array,
    num_steps: ArrayLike = 0,
) -> tuple[PyTree, SolverInfo]:
    """The solution in the dtypes of `rhs`, zero where it is not finite; the report.

    Args:
      solution: as it came out.
      rhs: g.
      relative_residual: of the system asked for.
      is_finite: whether what went in was.
      num_steps: that it took; 0 for none.
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
        num_steps=jnp.asarray(num_steps, jnp.int32),
        relative_residual=jnp.where(is_solved, relative_residual, 1.0).astype(dtype),
        status=status.astype(jnp.int32),
    )
