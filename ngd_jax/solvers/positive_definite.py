"""Dense symmetric positive systems, and the end of a direct solve.

    A = (S + λI) / u,    D⁻¹ A D⁻¹ = L Lᵀ with D² = diag(A),    x = D⁻¹ L⁻ᵀ L⁻¹ D⁻¹ b

In units of its own diagonal neither a matrix nor any of its rows has a scale: a jitter
that is small there is small for every row. Shared by the solvers in the space of
parameters and in the space of samples; knows nothing of models.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.solvers.protocol import (
    RightHandSide,
    Solution,
    SolverInfo,
    SolverStatus,
    check_solution,
)
from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = [
    "Factor",
    "PositiveDefinite",
    "direct_solution",
    "factorise",
    "make_positive_definite",
    "solve",
    "solve_refined",
    "unit_of",
    "with_least_jitter",
]


class PositiveDefinite(NamedTuple):
    """A = (S + λI) / u for a symmetric positive semi-definite S.

    Attributes:
      matrix: S, `[M, M]`; A itself is never made.
      shift: λ / u.
      unit: u, the largest entry on the diagonal of S + λI.
    """

    matrix: Array
    shift: Scalar
    unit: Scalar

    @property
    def diagonal(self) -> Array:
        """The diagonal of S; a strided slice costs no gather."""
        return self.matrix.reshape(-1)[:: len(self.matrix) + 1]

    def product(self, x: Array) -> Array:
        """A x."""
        return self.without_shift(x) + self.shift * x

    def without_shift(self, x: Array) -> Array:
        """S x / u."""
        return jnp.matmul(self.matrix, x, precision=_HIGHEST) / self.unit

    def size(self) -> Scalar:
        """The Frobenius norm of S, in units of u so that no square overflows."""
        # Row by row: it is slow over both axes at once.
        rows = jnp.linalg.norm(self.matrix / self.unit, axis=1)
        return jnp.linalg.norm(rows) * self.unit


_HIGHEST = jax.lax.Precision.HIGHEST


class Factor(NamedTuple):
    """A factorisation of A + jitter · diag(A).

    Attributes:
      scale: the inverse of D, `[M]`.
      transposed: Lᵀ. LAPACK stores columns where JAX stores rows, so this is L as
        LAPACK returns it, and nothing has to move.
    """

    scale: Array
    transposed: Array


def make_positive_definite(matrix: Array, damping: ArrayLike) -> PositiveDefinite:
    """S + λI in units of the largest entry on its diagonal.

    Args:
      matrix: S, `[M, M]`.
      damping: λ ≥ 0.
    """
    system = PositiveDefinite(matrix, jnp.zeros(()), jnp.ones(()))
    damping = jnp.asarray(damping).astype(matrix.dtype)
    unit = unit_of(system.diagonal, damping)
    return PositiveDefinite(matrix, damping / unit, unit)


def unit_of(diagonal: Array, damping: Scalar) -> Scalar:
    """The largest entry on the diagonal of S + λI, or 1 where none can be a unit."""
    unit = jnp.max(diagonal, initial=0.0) + damping
    return jnp.where(jnp.isfinite(unit) & (unit > 0), unit, 1.0)


def factorise(
    system: PositiveDefinite, jitter: ArrayLike = 0.0
) -> tuple[Factor, Array]:
    """Factorises A + jitter · diag(A).

    Args:
      system: A.
      jitter: at least 0.

    Returns:
      The factor, and whether there is one: False where A is singular to working
      precision, or not finite.
    """
    added = system.shift * system.unit
    diagonal = system.diagonal + added
    is_positive = diagonal > 0
    inverse = jnp.where(is_positive, jnp.where(is_positive, diagonal, 1) ** -0.5, 1)
    scaled = system.matrix * inverse[:, None] * inverse[None, :]
    scaled += jnp.diag((added * inverse**2 + jitter).astype(scaled.dtype))
    # Only one triangle is read, so there is nothing to symmetrise. The transpose is for
    # the order of the entries in memory.
    lower = jax.lax.linalg.cholesky(scaled.T, symmetrize_input=False)
    # A failure shows in every entry.
    exists = jnp.all(jnp.isfinite(lower[-1:, -1:]))
    return Factor(inverse * jnp.sqrt(system.unit), lower.T), exists


def with_least_jitter(
    system: PositiveDefinite, fn: Callable[[Scalar, Factor], PyTree]
) -> PyTree:
    """`fn(jitter, factor)` for the least of three jitters for which A has a factor.

    If Cholesky fails, the matrix is singular to working precision. It is repeated with
    M·ε times the diagonal added, the least that this precision can tell from zero, and,
    if sums over many parameters have more round-off than that, with √ε times.

    Args:
      system: A.
      fn: what to do with the factor. Its result should be small; the factor itself is
        for use inside, so that it is never copied.
    """
    eps = float(jnp.finfo(system.matrix.dtype).eps)
    size = len(system.matrix)
    jitters = jnp.asarray([0.0, size * eps, eps**0.5], system.matrix.dtype)

    def attempt(carry: tuple[Any, ...]) -> tuple[Array, Array, PyTree]:
        count, *_ = carry
        factor, exists = factorise(system, jitters[count])
        return count + 1, exists, fn(jitters[count], factor)

    def is_running(carry: tuple[Array, Array, PyTree]) -> Array:
        count, exists, _ = carry
        return (count < len(jitters)) & ~exists

    like = jax.eval_shape(attempt, (jnp.zeros((), jnp.int32),))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.lax.while_loop(is_running, attempt, start)[2]


def solve(factor: Factor, b: Array) -> Array:
    """Solves with the matrix that was factorised."""
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


def direct_solution(
    fisher: Any,
    rhs: RightHandSide,
    direction: PyTree,
    damping: ArrayLike,
    state: PyTree,
    *,
    residual: Array,
    size: Array,
    verify: bool,
) -> Solution:
    """The end of every direct solve: verified by one product with F itself.

    Args:
      fisher, rhs, direction, damping: as in `check_solution`.
      state: the solver's state.
      residual: ‖g - (M + λI) d‖ with the matrix M that the solver worked with.
      size: ‖M‖, or something of that size.
      verify: whether to verify; if not, `residual` is reported.

    Returns:
      The solution; its direction is zero if it is not what the solver's own matrix
      promises.
    """
    norm = tree.norm(rhs.gradient)
    own_residual = residual / jnp.where(norm > 0, norm, 1).astype(residual.dtype)
    if not verify:
        eps = float(jnp.finfo(own_residual.dtype).eps)
        status = jnp.where(
            own_residual <= eps**0.5, SolverStatus.CONVERGED, SolverStatus.STAGNATED
        )
        info = SolverInfo(jnp.zeros((), jnp.int32), own_residual, status)
        return Solution(direction, None, info, state)
    pushed, info, is_taken = check_solution(
        fisher, rhs, direction, damping, own_residual=own_residual, size=size
    )
    # Zero for a refused direction; one that is not finite stays so, to be reported.
    nothing = info.relative_residual - info.relative_residual
    residual = jnp.where(is_taken, info.relative_residual, 1 + nothing)
    info = info._replace(relative_residual=residual)
    direction, pushed = tree.scale(jnp.where(is_taken, 1, nothing), (direction, pushed))
    return Solution(direction, pushed, info, state)
