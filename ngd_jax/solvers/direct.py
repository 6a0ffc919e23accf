"""Direct solves of (F + λI) d = g on the dense matrix, for few parameters.

    F + λI = L Lᵀ,    d = L⁻ᵀ L⁻¹ g

The one place where trees become vectors. The factor of a matrix in lower precision
serves as well, to precondition conjugate gradients on products with F, which need few
steps then.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ngd_jax import tree
from ngd_jax.fisher.dense_root import sum_of_squares
from ngd_jax.fisher.rows import NoRowsError
from ngd_jax.solvers.conjugate_gradient import conjugate_gradient
from ngd_jax.solvers.interface import SolverInfo, check_system
from ngd_jax.solvers.positive_definite import (
    check_factor_dtype,
    factorise,
    frobenius_norm,
    is_narrower,
    make_positive_definite,
    report,
    solve,
    solve_refined,
    with_least_jitter,
)
from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = ["Cholesky"]

# Steps that a factor of lower precision may take: more cost as much as a better one.
_MAX_REFINEMENTS = 20
# In units of the round-off of what it is made of: what a residual may be in the end.
_ROUND_OFF = 16.0


@dataclasses.dataclass(frozen=True)
class Cholesky:
    """Cholesky factorisation of F + λI in parameter space: exact, O(P³), P² memory.

    Builds F (see `Fisher.dense`), then refines the solution once with its
    true residual. Where the factorisation fails, which says that λ is below the
    round-off of F, it is repeated with ε·P times the diagonal added: the smallest
    damping that working precision can tell from none. `relative_residual` is of the
    system asked for, so it shows what that cost; above the square root of the machine
    precision the status is STAGNATED.

    Attributes:
      factor_dtype: None, or `jnp.float32` for arithmetic in float64: F is made and
        factorised in it, at half the cost, and the solution found by conjugate
        gradients on products with F, with that factor as the preconditioner. They go
        on to a residual of 16 ε (‖g‖ + ‖F + λI‖ ‖d‖), which is as good as that of a
        factor in float64; where 20 steps do not get there, as for λ below 1e-6 of the
        largest eigenvalue, all is done again in float64. `num_steps` counts the steps,
        and is 0 where there were none. Where F is not made from the rows of single
        examples, only the factorisation is in this dtype.

    Raises:
      TypeError: on a `factor_dtype` that is neither of these.

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
      Langou et al., Exploiting the performance of 32 bit floating point arithmetic in
      obtaining 64 bit accuracy, 2006, which refines without conjugate gradients.
    """

    factor_dtype: Any = None

    def __post_init__(self) -> None:
        check_factor_dtype(self.factor_dtype)

    def __call__(
        self,
        fisher: Any,
        rhs: PyTree,
        *,
        damping: ArrayLike,
        x0: PyTree | None = None,
    ) -> tuple[PyTree, SolverInfo]:
        """Solves (F + λI) d = g; see `Solver`. Nothing to start from, so no `x0`."""
        check_system(rhs, damping, x0)
        wide = tree.widen(rhs)

        def in_full() -> _Found:
            return _solve_in_full(fisher, wide, damping)

        if is_narrower(self.factor_dtype, wide):
            found, is_good = _solve_refining(fisher, wide, damping, self.factor_dtype)
            found = jax.lax.cond(is_good, lambda: found, in_full)
        else:
            found = in_full()
        return report(found.solution, rhs, *found[1:])


class _Found(NamedTuple):
    """A solution in the arithmetic of the solver, and what `report` asks for."""

    solution: PyTree
    relative_residual: Scalar
    is_finite: Array
    num_steps: Array


def _solve_in_full(fisher: Any, rhs: PyTree, damping: ArrayLike) -> _Found:
    """By a factor in the precision of `rhs`."""
    g, unravel = ravel_pytree(rhs)
    dtype = tree.accumulator_dtype(g)
    dense = fisher.dense().astype(g.dtype)
    finite = jnp.all(jnp.isfinite(dense)) & jnp.all(jnp.isfinite(g))

    # Units in which the largest diagonal entry and the largest |gᵢ| are one.
    system = make_positive_definite(dense, damping, finite)
    largest = jnp.max(jnp.abs(g), initial=0.0)
    largest = jnp.where(finite & (largest > 0), largest, 1.0).astype(dtype)
    b = jnp.where(finite, g / largest, 0.0)

    x, residual = with_least_jitter(
        system, lambda _, factor: solve_refined(system, factor, b)
    )
    norm = jnp.linalg.norm(b)
    relative = jnp.linalg.norm(residual) / jnp.where(norm > 0, norm, 1.0)
    solution = unravel((x / system.unit * largest).astype(g.dtype))
    return _Found(solution, relative, finite, jnp.zeros((), jnp.int32))


def _solve_refining(
    fisher: Any, rhs: PyTree, damping: ArrayLike, factor_dtype: Any
) -> tuple[_Found, Array]:
    """By products, with a factor of lower precision; and whether that is as good."""
    dense = _dense_in(fisher, factor_dtype)
    low, is_finite = dense.dtype, jnp.all(jnp.isfinite(jnp.diagonal(dense)))
    shift = jnp.asarray(damping, factor_dtype)
    system = make_positive_definite(dense, shift, is_finite)
    factor, exists = factorise(system)

    def precondition(vector: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(vector)
        return unravel(solve(factor, flat.astype(low)).astype(flat.dtype))

    eps = float(jnp.finfo(tree.accumulator_dtype(rhs)).eps)
    solution, info = conjugate_gradient(
        fisher.matvec,
        rhs,
        max_steps=_MAX_REFINEMENTS,
        rtol=_ROUND_OFF / 2 * eps,
        damping=damping,
        preconditioner=precondition,
    )
    # The residual of conjugate gradients is a recurrence; this is the true one.
    product = tree.axpy(damping, solution, fisher.matvec(solution))
    residual = tree.norm(tree.axpy(-1.0, product, rhs))
    norm = tree.norm(rhs)
    size = (frobenius_norm(dense) + damping).astype(norm.dtype)
    is_good = residual <= _ROUND_OFF * eps * (norm + size * tree.norm(solution))
    relative = residual / jnp.where(norm > 0, norm, 1.0)
    found = _Found(solution, relative, tree.all_finite(rhs), info.num_steps)
    return found, is_good & exists


def _dense_in(fisher: Any, dtype: Any) -> Array:
    """F, made in this precision where there are rows.

    Where the model mixes its examples, which its rows do not know of, it is another
    matrix, and the solution by it will not be good.
    """
    try:
        found = sum_of_squares(fisher, dtype)
    except NoRowsError:
        found = None
    if found is not None:
        return found[0]
    dense = fisher.dense()
    if jnp.iscomplexobj(dense):
        dtype = jnp.promote_types(dtype, jnp.complex64)
    return dense.astype(dtype)
