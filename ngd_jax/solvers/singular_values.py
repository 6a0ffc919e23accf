"""Least squares by the singular values of the square root A of the Fisher, F = Aᵀ A.

    A = U σ Vᵀ,    d = V σ/(σ² + λ) Uᵀ w    for g = Aᵀ w,    where σ > rcond · max σ

Dense in the space of parameters, as `Cholesky` is, but without the square: what A knows
of a direction is lost at σ = ε, what F knows of it at σ = √ε.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.fisher.coefficients import ravel_real
from ngd_jax.solvers.interface import SolverInfo, StatefulSolver, check_system
from ngd_jax.solvers.positive_definite import report
from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = ["SVD", "SingularRoot", "decompose", "negligible"]

# How long a rest g - Aᵀ w may be, in round-off of its terms, and still be nothing.
_ROUND_OFF = 64.0


@dataclasses.dataclass(frozen=True)
class SVD(StatefulSolver):
    """Truncated singular values of the square root of F: exact, and without squaring.

    Solves (F + λI) d = g with F = Aᵀ A, `[M, P]` for M real outputs of all examples and
    P real parameters, in O(M P²) operations (O(M² P) for M < P) and M·P memory. Made
    for some hundred parameters whose F is singular to working precision at once, at
    λ = 0 or next to it: physics-informed networks above all.

    Directions whose singular value is at most `rcond` times the largest one are left
    out of A: damping that says no where λI says "less". Of what is left,

    * with `coefficients` w, g = Aᵀ w + r, which the transformation hands over where it
      has an `output_loss_fn`, d = V σ/(σ² + λ) Uᵀ w + r/λ: relative errors are of the
      order of ε/rcond;
    * with g alone, d = V 1/(σ² + λ) Vᵀ g + r/λ with r = g - V Vᵀ g: the round-off in g
      comes back times 1/rcond².

    r is dropped where λ = 0, of which comes the shortest of all minimisers, and where
    it is not longer than the round-off of what it is made of.

    Attributes:
      rcond: in [0, 1), or None for ε·max(M, P). It regularises as damping does: in
        float64 1e-8 is about right for a network whose residuals shall vanish.

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
      `relative_residual` is of the system asked for, with all directions in it, so that
      it tells what truncation left out. Forward-mode differentiable, not reverse-mode.
    """

    rcond: float | None = None

    uses_coefficients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        rcond = self.rcond
        if rcond is not None and not 0 <= rcond < 1:
            raise ValueError(f"`rcond` must be None or in [0, 1), got {rcond}.")

    def solve(
        self,
        fisher: Any,
        rhs: PyTree,
        *,
        damping: ArrayLike,
        x0: PyTree | None = None,
        coefficients: PyTree | None = None,
        objective: Callable[[PyTree], Scalar] | None = None,
        state: PyTree = (),
    ) -> tuple[PyTree, SolverInfo, PyTree]:
        """Solves (F + λI) d = g; see `StatefulSolver`. No use for `x0`, `objective`.

        Raises:
          ValueError: on `coefficients` unlike what `fisher.sqrt_matvec` returns.
        """
        del objective
        check_system(rhs, damping, x0)
        matrix = fisher.dense_root()
        dtype = matrix.dtype
        g, unravel = ravel_real(tree.widen(rhs))
        g = g.astype(dtype)
        w = None
        if coefficients is not None:
            like = jax.eval_shape(fisher.sqrt_matvec, tree.widen(rhs))
            tree.check_like(coefficients, like, name="coefficients", like_name="A d")
            coefficients = optax.tree.cast_like(coefficients, like)
            w = ravel_real(coefficients)[0].astype(dtype)
        damping = jnp.asarray(damping, dtype)

        # In units in which the largest entries of A and of g are about one.
        is_finite = jnp.all(jnp.isfinite(matrix)) & jnp.all(jnp.isfinite(g))
        is_finite &= jnp.isfinite(damping)
        if w is not None:
            is_finite &= jnp.all(jnp.isfinite(w))
        size = _unit(matrix, is_finite)
        unit = _unit(g, is_finite)
        matrix = jnp.where(is_finite, matrix / size, 0.0)
        g = jnp.where(is_finite, g / unit, 0.0)
        w = None if w is None else jnp.where(is_finite, w / unit * size, 0.0)
        damping = jnp.where(is_finite, damping / size / size, 0.0)

        root = decompose(matrix, w, self.rcond)
        d = _solve(root, matrix, g, w, damping)
        residual = g - (matrix.T @ (matrix @ d) + damping * d)
        norm = jnp.linalg.norm(g)
        relative = jnp.linalg.norm(residual) / jnp.where(norm > 0, norm, 1.0)
        solution = unravel(d / size / size * unit)
        solution, info = report(solution, rhs, relative, is_finite)
        return solution, info, state


class SingularRoot(NamedTuple):
    """A = U σ Vᵀ, without U.

    Attributes:
      values: σ, `[R]`.
      rights: Vᵀ, `[R, P]`.
      image: Uᵀ w, `[R]`, or None.
      is_kept: which of them count.
    """

    values: Array
    rights: Array
    image: Array | None
    is_kept: Array


def decompose(
    matrix: Array, w: Array | None, rcond: float | None = None
) -> SingularRoot:
    """The singular values of A, `[M, P]`, and what w is made of."""
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
    return SingularRoot(values, rights, None if w is None else lefts.T @ w, is_kept)


def negligible(rest: Array, size: Scalar) -> Array:
    """Whether `rest` is round-off of terms as long as `size`."""
    eps = float(jnp.finfo(rest.dtype).eps)
    return jnp.linalg.norm(rest) <= _ROUND_OFF * eps * size


def _solve(
    root: SingularRoot, matrix: Array, g: Array, w: Array | None, damping: Array
) -> Array:
    values = jnp.where(root.is_kept, root.values, 1.0)
    if w is None or root.image is None:
        along = jnp.where(root.is_kept, root.rights @ g, 0.0)
        d = root.rights.T @ (along / (values**2 + damping))
        rest, size = g - root.rights.T @ along, jnp.linalg.norm(g)
    else:
        along = jnp.where(root.is_kept, root.image, 0.0)
        d = root.rights.T @ (along * values / (values**2 + damping))
        rest = g - matrix.T @ w
        norm = jnp.max(root.values, initial=0.0)
        size = jnp.linalg.norm(g) + norm * jnp.linalg.norm(w)
    is_kept = ~negligible(rest, size) & (damping > 0)
    return d + jnp.where(is_kept, rest / jnp.where(is_kept, damping, 1.0), 0.0)


def _unit(values: Array, is_finite: Array) -> Array:
    """A power of two about as large as the largest entry, so that scaling is exact."""
    largest = jnp.max(jnp.abs(values), initial=0.0)
    is_usable = is_finite & (largest > 0)
    largest = jnp.where(is_usable, largest, 1.0)
    exponent = jnp.frexp(largest)[1]
    return jnp.ldexp(jnp.ones((), values.dtype), exponent)
