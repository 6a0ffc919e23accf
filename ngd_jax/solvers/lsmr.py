"""Least squares without squaring: LSMR on the square root A of the Fisher, F = Aᵀ A.

    (F + λI) d = g,    g = Aᵀ w + r,    min ‖[A; √λ I] d - [w; r/√λ]‖²

The condition number of A is the square root of that of F. If g is known as
coefficients w, the round-off in d is of the order of cond(A)·ε. Solvers that see g in
parameter space, such as CG, end at cond(F)·ε: in float32 they have no digit left beyond
cond(F) = 10⁷, while LSMR goes on to 10¹⁴.

Owns the formulation and the units; the iteration is in `golub_kahan`.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.per_example import precision
from ngd_jax.solvers.golub_kahan import LeastSquares, inverse, solve
from ngd_jax.solvers.protocol import (
    RightHandSide,
    Solution,
    Solver,
    SolverInfo,
    SolverStatus,
    check_budget,
    forward_only,
    solve_scaled,
)
from ngd_jax.types import ArrayLike, MatVec, PyTree

__all__ = ["LSMR", "lsmr"]

# How much two computations of one gradient may differ, in units of ε (‖g‖ + ‖A‖‖w‖).
_TWO_WAYS = 16.0


def lsmr(
    matvec: MatVec,
    rmatvec: MatVec,
    rhs: PyTree,
    *,
    damping: ArrayLike = 0.0,
    max_steps: int,
    rtol: float = 0.0,
    reorthogonalize: bool = True,
) -> tuple[PyTree, SolverInfo]:
    """Solves min ‖A x - b‖² + λ‖x‖², with products of A and Aᵀ only.

    Stops when ‖Aᵀ(b - A x) - λx‖ ≤ rtol·‖Aᵀ b‖, after `max_steps` steps, or when
    round-off leaves nothing to gain. If λ = 0 and there are many minimisers, it finds
    the shortest.

    Args:
      matvec: v -> A v, from trees like `rmatvec(rhs)` to trees like `rhs`.
      rmatvec: u -> Aᵀ u, its adjoint for ⟨a, b⟩ = Re Σ conj(a) b.
      rhs: b, a tree of real or complex floating point arrays.
      damping: λ ≥ 0, may be traced. The `damp` of SciPy is √λ.
      max_steps: the step budget, a Python int of at least 1. A step is one product with
        A and one with Aᵀ; the report costs as much as one step.
      rtol: relative tolerance; 0 goes on to working precision. Values below the machine
        precision ε make sense, down to ε²: a small singular value of A enters
        Aᵀ(b - A x) as its square.
      reorthogonalize: makes each vector v orthogonal to all before it again, so that no
        more steps than the rank of A are needed; without it, an ill-conditioned A may
        need ten times as many. Costs `max_steps` vectors like x of memory. (Keeping
        only the last few vectors does not help.)

    Returns:
      x in the structure of `rmatvec(rhs)`, float32 or wider, always finite; and a
      `SolverInfo` with ‖Aᵀ(b - A x) - λx‖ / ‖Aᵀ b‖ as computed at x. Round-off may keep
      that above `rtol` when x has long been as good as it gets: STAGNATED.

    Raises:
      ValueError: for a step budget below 1, a negative tolerance or damping, or a
        `matvec` whose result is unlike `rhs`.
      TypeError: for a step budget that is not a Python int, or an integer `rhs`.

    Example:
      >>> import jax.numpy as jnp
      >>> a = jnp.array([[1.0, 0.0], [0.0, 1e-5], [0.0, 0.0]])
      >>> x, info = lsmr(
      ...     lambda v: a @ v,
      ...     lambda u: a.T @ u,
      ...     jnp.array([1.0, 1e-5, 0.0]),
      ...     max_steps=9,
      ... )
      >>> x.round(3)
      Array([1., 1.], dtype=float32)

    References:
      Fong and Saunders, LSMR: an iterative algorithm for sparse least-squares problems,
      2011, sections 2.7 and 6.3.

    Note:
      Bounded by `lax.while_loop`: forward-mode differentiable, not reverse-mode.
    """
    solver = LSMR(max_steps, rtol, reorthogonalize)
    tree.check_parameters(rhs, name="rhs")
    # In units of its own, since Aᵀ b could over- or underflow.
    w, unit, _ = tree.in_units(tree.widen(rhs))
    gradient = tree.widen(rmatvec(w))
    like = jax.eval_shape(matvec, gradient)
    tree.check_like(like, rhs, name="matvec(v)", like_name="rhs")
    root = _Root(matvec, rmatvec, gradient, rhs)
    system = RightHandSide(gradient, coefficients=w)
    solution = solve_scaled(solver, root, system, damping=damping)

    x, info = tree.scale(unit, solution.direction), solution.info
    is_finite = jnp.isfinite(tree.max_abs(x))
    status = jnp.where(is_finite, info.status, SolverStatus.NON_FINITE)
    residual = jnp.where(is_finite, info.relative_residual, 1.0)
    x = jax.tree.map(lambda leaf: jnp.where(is_finite, leaf, 0), x)
    return forward_only(x, what="lsmr"), SolverInfo(info.num_steps, residual, status)


@dataclasses.dataclass(frozen=True)
class LSMR(Solver):
    """LSMR on the square root of F: for small damping, or none, and low precision.

    For a right-hand side known as coefficients w, g = Aᵀ w, which the transformation
    passes if it has a `loss_fn`. It also works with g in parameter space only, even for
    λ = 0, and its residual never grows; but it is then no more accurate than CG, since
    the round-off in g itself is multiplied by the condition number of F.

    Attributes:
      max_steps: the step budget. A step costs what one of CG does.
      rtol: relative residual at which to stop, meaningful down to ε²; 0 goes on to
        working precision. See `lsmr`.
      reorthogonalize: saves most of the steps if F is ill-conditioned, and costs
        `max_steps` times the memory of the parameters; False for networks too large
        for that. See `lsmr`.

    Raises:
      ValueError, TypeError: for a step budget below 1 or not an int, or a negative
        tolerance.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
      ... )
      >>> d, info = LSMR(rtol=1e-6)(fisher, jnp.array([[12.0], [17.0]]), damping=0.0)
      >>> d.ravel().round(2)
      Array([1., 1.], dtype=float32)

    References:
      See `lsmr`.
    """

    uses_coefficients: ClassVar[bool] = True

    max_steps: int = 100
    rtol: float = 1e-6
    reorthogonalize: bool = True

    def __post_init__(self) -> None:
        check_budget(self.max_steps, self.rtol)

    def solve(
        self, fisher: Any, rhs: RightHandSide, *, damping: ArrayLike, state: PyTree = ()
    ) -> Solution:
        """Solves (F + λI) d = g; see `Solver`. Uses the coefficients and the guess.

        With coefficients w, the rest r = g - Aᵀ w is dropped if it is no more than the
        difference that two computations of one gradient may have,

            ‖g - Aᵀ w‖ ≤ 16 ε (‖g‖ + ‖A‖‖w‖),    ‖A‖ ≈ ‖A g‖/‖g‖.

        If kept, it would be solved for, and grow by the condition number of F. The
        report still counts it. A larger rest stays part of the system.

        Raises:
          ValueError: for coefficients unlike what `fisher.sqrt_matvec` returns.
        """
        g, w, eps = rhs.gradient, rhs.coefficients, precision(fisher)
        like = jax.eval_shape(fisher.sqrt_matvec, g)
        r = dropped = zeros = jax.tree.map(jnp.zeros_like, g)
        gradient = g
        if w is None:
            w, r = jax.tree.map(jnp.zeros_like, like), g
        elif not isinstance(fisher, _Root):
            tree.check_like(w, like, name="coefficients", like_name="A d")
            w = tree.widen(optax.tree.cast_like(w, like))
            gradient = tree.widen(fisher.sqrt_rmatvec(w))
            rest = tree.axpy(-1.0, gradient, g)
            g_norm = tree.norm(g)
            a_norm = tree.norm(fisher.sqrt_matvec(g)) * inverse(g_norm)
            limit = _TWO_WAYS * eps * (g_norm + a_norm * tree.norm(w))
            is_round_off = tree.norm(rest) <= limit
            r = tree.select(is_round_off, zeros, rest)
            dropped = tree.select(is_round_off, rest, zeros)
            gradient = tree.select(is_round_off, gradient, g)
        system = LeastSquares(
            matvec=fisher.sqrt_matvec,
            rmatvec=fisher.sqrt_rmatvec,
            w=w,
            r=r,
            dropped=dropped,
            damping=jnp.asarray(damping),
            precision=eps,
            limits=self,
        )
        direction, info = solve(system, gradient, rhs.guess)
        return Solution(direction, None, info, state)


class _Root(NamedTuple):
    """A matrix A as the Fisher that `LSMR` needs; then g = Aᵀ w to the last bit."""

    sqrt_matvec: MatVec
    sqrt_rmatvec: MatVec
    params: PyTree
    outputs: PyTree
