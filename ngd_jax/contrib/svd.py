"""Least squares by the singular values of the square root A of the Fisher, F = Aᵀ A.

    A = U σ Vᵀ,    d = V σ/(σ² + λ) Uᵀ w    for g = Aᵀ w,    where σ > rcond · max σ

Dense in the space of parameters, as `Cholesky` is, but without the square: A loses a
direction at σ = ε, F already at σ = √ε.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.coordinates import ravel_real
from ngd_jax.dense import dense_root
from ngd_jax.solvers.positive_definite import direct_solution
from ngd_jax.solvers.protocol import RightHandSide, Solution, Solver
from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = ["SVD", "SingularRoot", "decompose", "known_coefficients", "negligible"]

# How long a rest g - Aᵀ w may be, in round-off of its terms, to count as zero.
_ROUND_OFF = 64.0
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class SVD(Solver):
    """Truncated singular values of the square root of F: exact, and without squaring.

        A = U σ Vᵀ,    d = V σ/(σ² + λ) Uᵀ w    for g = Aᵀ w

    Solves (F + λI) d = g with F = Aᵀ A, `[M, P]` for M real outputs of all examples and
    P real parameters, in O(M P²) operations (O(M² P) for M < P) and M·P memory. Made
    for a few hundred parameters whose F is singular to working precision from the
    start, with λ = 0 or close to it: above all, physics-informed networks.

    Directions whose singular value is at most `rcond` times the largest one are left
    out of A, where λI would only shrink them. For the directions that are left,

    * with `rhs.coefficients` w, g = Aᵀ w + r, which the transformation passes if it has
      a `loss_fn`, d = V σ/(σ² + λ) Uᵀ w + r/λ: relative errors are of the order of
      ε/rcond;
    * with g alone, d = V 1/(σ² + λ) Vᵀ g + r/λ with r = g - V Vᵀ g: the round-off in g
      is multiplied by 1/rcond².

    r is dropped at λ = 0, which gives the shortest of all minimisers, and where it is
    no longer than the round-off of its terms.

    Args:
      rcond: in [0, 1), or None for ε·max(M, P). It regularises as damping does: in
        float64 1e-8 is about right for zero-residual problems.
      verify: whether to check the solution against the operator, at the cost of one
        product with F; see `Cholesky`.

    Raises:
      ValueError: for an `rcond` outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
      ... )
      >>> d, info = SVD()(fisher, jnp.array([[12.0], [17.0]]), damping=0.0)
      >>> d.ravel().round(2)
      Array([1., 1.], dtype=float32)

    References:
      Golub and Van Loan, Matrix computations, 4th edition, section 5.5 (least squares
      of deficient rank); Müller and Zeinhofer, Achieving high accuracy with PINNs via
      energy natural gradient descent, 2023, for the systems that need it.

    Note:
      `relative_residual` refers to the system asked for, with all its directions, so it
      shows what truncation left out.
    """

    rcond: float | None = None
    verify: bool = True

    uses_coefficients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        rcond = self.rcond
        if rcond is not None and not 0 <= rcond < 1:
            raise ValueError(f"`rcond` must be None or in [0, 1), got {rcond}.")

    def solve(
        self, fisher: Any, rhs: RightHandSide, *, damping: ArrayLike, state: PyTree = ()
    ) -> Solution:
        """Solves (F + λI) d = g; see `Solver.solve`.

        Raises:
          ValueError: for coefficients unlike what `fisher.sqrt_matvec` returns.
        """
        matrix = dense_root(fisher)
        g, unravel = ravel_real(rhs.gradient)
        g, w = g.astype(matrix.dtype), known_coefficients(fisher, rhs)
        # In units of the largest entry of A, so that no σ² over- or underflows.
        largest = jnp.max(jnp.abs(matrix), initial=0.0)
        is_finite = jnp.isfinite(largest)
        unit = jnp.where(is_finite & (largest > 0), largest, 1.0)
        matrix = jnp.where(is_finite, matrix / unit, 0.0)
        w = None if w is None else w.astype(matrix.dtype) * unit
        shift = jnp.asarray(damping).astype(matrix.dtype) / unit / unit

        root = decompose(matrix, w, self.rcond)
        d = _solve(root, matrix, g, w, shift)
        residual = g - (matrix.T @ (matrix @ d) + shift * d)
        # Values that are not finite are reported by `solve_scaled`, and never
        # decomposed.
        d = jnp.where(is_finite, d / unit / unit, jnp.nan)
        return direct_solution(
            fisher,
            rhs,
            unravel(d),
            damping,
            state,
            residual=jnp.linalg.norm(residual),
            size=(jnp.max(root.values, initial=0.0) * unit) ** 2,
            verify=self.verify,
        )


def known_coefficients(fisher: Any, rhs: RightHandSide) -> Array | None:
    """The coefficients of the right-hand side as a vector; None if there are none.

    Raises:
      ValueError: for coefficients unlike what `fisher.sqrt_matvec` returns.
    """
    if rhs.coefficients is None:
        return None
    like = jax.eval_shape(fisher.sqrt_matvec, fisher.params)
    tree.check_like(rhs.coefficients, like, name="coefficients", like_name="A d")
    return ravel_real(rhs.coefficients)[0]


class SingularRoot(NamedTuple):
    """A = U σ Vᵀ, without U.

    Attributes:
      values: σ, `[R]`.
      rights: Vᵀ, `[R, P]`.
      along: Uᵀ w, `[R]`, or None.
      is_kept: which of them count.
    """

    values: Array
    rights: Array
    along: Array | None
    is_kept: Array


def decompose(
    matrix: Array, w: Array | None, rcond: float | None = None
) -> SingularRoot:
    """The singular values of a finite A, `[M, P]`, and the components of w."""
    num_rows, num_columns = matrix.shape
    if num_rows > num_columns:
        # The triangular factor has all that is needed, and w in its last column
        # becomes Qᵀ w: neither Q nor U, both as large as A, is ever made.
        wide = matrix if w is None else jnp.concatenate([matrix, w[:, None]], axis=1)
        triangle = jnp.linalg.qr(wide, mode="r")[:num_columns]
        matrix = triangle[:, :num_columns]
        w = None if w is None else triangle[:, num_columns]
    lefts, values, rights = jnp.linalg.svd(matrix, full_matrices=False)
    if rcond is None:
        rcond = float(jnp.finfo(matrix.dtype).eps) * max(num_rows, num_columns)
    largest = jnp.max(values, initial=0.0)
    is_kept = (values > rcond * largest) & (values > 0)
    along = None if w is None else jnp.matmul(lefts.T, w, precision=_HIGHEST)
    return SingularRoot(values, rights, along, is_kept)


def negligible(rest: Array, size: Scalar) -> Array:
    """Whether `rest` is round-off of terms as long as `size`."""
    eps = float(jnp.finfo(rest.dtype).eps)
    return jnp.linalg.norm(rest) <= _ROUND_OFF * eps * size


def _solve(
    root: SingularRoot, matrix: Array, g: Array, w: Array | None, damping: Array
) -> Array:
    values = jnp.where(root.is_kept, root.values, 1.0)
    if w is None or root.along is None:
        along = jnp.where(root.is_kept, root.rights @ g, 0.0)
        d = root.rights.T @ (along / (values**2 + damping))
        rest, size = g - root.rights.T @ along, jnp.linalg.norm(g)
    else:
        along = jnp.where(root.is_kept, root.along, 0.0)
        d = root.rights.T @ (along * values / (values**2 + damping))
        rest = g - matrix.T @ w
        norm = jnp.max(root.values, initial=0.0)
        size = jnp.linalg.norm(g) + norm * jnp.linalg.norm(w)
    is_kept = ~negligible(rest, size) & (damping > 0)
    return d + jnp.where(is_kept, rest / jnp.where(is_kept, damping, 1.0), 0.0)
