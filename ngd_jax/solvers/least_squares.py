"""Least squares without squaring: LSMR on the square root A of the Fisher, F = Aᵀ A.

    (F + λI) d = g,    g = Aᵀ w + r,    min ‖[A; √λ I] d - [w; r/√λ]‖²

The condition number of A is the square root of that of F. Where g is known as
coefficients w, the round-off in d is of the order of cond(A)·ε, where every solver that
sees g in parameter space, such as CG, ends at cond(F)·ε: in float32 that is no digit
from cond(F) = 10⁷ on, against no digit from 10¹⁴ on.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.solvers import golub_kahan
from ngd_jax.solvers.conjugate_gradient import check_budget
from ngd_jax.solvers.interface import (
    SolverInfo,
    StatefulSolver,
    check_system,
    forward_only,
)
from ngd_jax.types import ArrayLike, MatVec, PyTree, Scalar

__all__ = ["LSMR", "lsmr"]


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

    Stops where ‖Aᵀ(b - A x) - λx‖ ≤ rtol·‖Aᵀ b‖, after `max_steps` steps, or where
    round-off leaves nothing to gain. Of many minimisers, for λ = 0, the shortest.

    Args:
      matvec: v -> A v, from trees like `rmatvec(rhs)` to trees like `rhs`.
      rmatvec: u -> Aᵀ u, its adjoint for ⟨a, b⟩ = Re Σ conj(a) b.
      rhs: b, a tree of real or complex floating point arrays.
      damping: λ ≥ 0, may be traced. The `damp` of SciPy is √λ.
      max_steps: the step budget, a Python int of at least 1. A step is one product with
        A and one with Aᵀ; the report costs as much as one step.
      rtol: relative tolerance; 0 goes on to working precision. It means something below
        the machine precision ε, down to ε²: a small singular value of A shows in
        Aᵀ(b - A x) by its square.
      reorthogonalize: makes each vector v orthogonal to all before it anew, so that no
        more steps than the rank of A are needed; where A is ill-conditioned, it may be
        ten times as many without. Costs `max_steps` vectors like x of memory. Doing so
        for the last few vectors only is no help.

    Returns:
      x in the structure of `rmatvec(rhs)`, float32 or wider, always finite; and a
      `SolverInfo` with ‖Aᵀ(b - A x) - λx‖ / ‖Aᵀ b‖ as computed at x, which round-off
      may keep above `rtol` when x has long been as good as it gets: STAGNATED.

    Raises:
      ValueError: on a step budget below 1, a negative tolerance or damping, or a
        `matvec` that returns something unlike `rhs`.

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
    check_budget(max_steps, rtol, 0.0, None)
    check_system(rhs, damping, None)
    tree.check_parameters(rhs, name="rhs")
    w = tree.widen(rhs)
    image = jax.eval_shape(matvec, jax.eval_shape(rmatvec, w))
    tree.check_like(image, rhs, name="matvec(v)", like_name="rhs")
    precision = _precision(rhs)
    system = golub_kahan.LeastSquares(matvec, rmatvec, w, None, damping, precision)
    limits = golub_kahan.Limits(max_steps, rtol, reorthogonalize)
    solution, info = golub_kahan.solve(system, limits)
    return forward_only(solution, what="lsmr"), info


@dataclasses.dataclass(frozen=True)
class LSMR(StatefulSolver):
    """LSMR on the square root of F: for small damping, or none, and low precision.

    For a right-hand side known as coefficients w, g = Aᵀ w, which the transformation
    hands over where it has an `output_loss_fn`. With g in parameter space only it works
    as well, for λ = 0 too, and its residual never grows; but it is no more exact than
    CG, since the round-off in g itself comes back times the condition number of F.

    Attributes:
      max_steps: the step budget. A step costs what one of CG does.
      rtol: relative residual at which to stop, meaningful down to ε²; 0 goes on to
        working precision. See `lsmr`.
      reorthogonalize: saves most of the steps where F is ill-conditioned, and costs
        `max_steps` times the memory of the parameters; False for networks too large
        for that. See `lsmr`.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
      ... )
      >>> d, info = LSMR(rtol=1e-6)(fisher, jnp.array([[12.0], [17.0]]), damping=0.0)
      >>> d.ravel().round(2)
      Array([1., 1.], dtype=float32)
    """

    uses_coefficients: ClassVar[bool] = True

    max_steps: int = 100
    rtol: float = 1e-6
    reorthogonalize: bool = True

    def __post_init__(self) -> None:
        check_budget(self.max_steps, self.rtol, 0.0, None)

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
        """Solves (F + λI) d = g; see `StatefulSolver`.

        With coefficients w, g - Aᵀ w is dropped where it is no more than what two
        computations of one gradient may differ by, ‖g - Aᵀ w‖ ≤ 64 ε (‖g‖ + ‖A‖‖w‖)
        with ‖A‖ ≈ ‖A g‖/‖g‖; the report counts it all the same. A larger rest is part
        of the system as it is. There is no use for `objective`.

        Raises:
          ValueError: on `coefficients` unlike what `fisher.sqrt_matvec` returns.
        """
        del objective
        check_system(rhs, damping, x0)
        g = tree.widen(rhs)
        if coefficients is not None:
            image = jax.eval_shape(fisher.sqrt_matvec, g)
            tree.check_like(coefficients, image, name="coefficients", like_name="A d")
            coefficients = optax.tree.cast_like(coefficients, image)
        system = golub_kahan.LeastSquares(
            fisher.sqrt_matvec,
            fisher.sqrt_rmatvec,
            coefficients,
            g,
            damping,
            _precision((fisher.params, fisher.outputs)),
        )
        limits = golub_kahan.Limits(self.max_steps, self.rtol, self.reorthogonalize)
        solution, info = golub_kahan.solve(system, limits, x0)
        solution = forward_only(optax.tree.cast_like(solution, rhs), what="LSMR")
        return solution, info, state


def _precision(values: PyTree) -> float:
    """The machine precision of the narrowest leaf."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(values)]
    return max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)
