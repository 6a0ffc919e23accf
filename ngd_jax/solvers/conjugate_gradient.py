"""Conjugate gradients for any product v -> A v: the arguments, explained."""

from collections.abc import Callable
from typing import Any

from ngd_jax.arguments import check_count
from ngd_jax.solvers.cg_loop import conjugate_gradient_with_image
from ngd_jax.solvers.interface import SolverInfo, check_system
from ngd_jax.types import ArrayLike, MatVec, PyTree, Scalar

__all__ = ["check_budget", "conjugate_gradient"]


def conjugate_gradient(
    matvec: MatVec,
    rhs: PyTree,
    *,
    x0: PyTree | None = None,
    max_steps: int,
    rtol: float = 0.0,
    atol: float = 0.0,
    damping: ArrayLike = 0.0,
    preconditioner: MatVec | None = None,
    progress_tol: float | None = None,
    objective: Callable[[PyTree], Scalar] | None = None,
) -> tuple[PyTree, SolverInfo]:
    """Solves (A + λI) x = b for a symmetric positive (semi-)definite A.

    Stops where the residual is at most max(rtol·‖b‖, atol), after `max_steps` steps,
    where round-off leaves nothing to gain, or, if asked, where the quadratic model
    φ(x) = ½ xᵀ(A + λI)x - bᵀx has stopped improving.

    Args:
      matvec: v -> A v on trees of the structure of `rhs`, float32 or wider: rounded to
        narrower dtypes, A would not be symmetric and the iteration diverge.
      rhs: b, a tree of floating point arrays. Vectors are held in float32 or wider.
      x0: a first guess; its best multiple ⟨x0, b⟩ / ⟨x0, (A + λI) x0⟩ is what is
        started from, so that a poor one is never worse than zero. Costs one product.
      max_steps: the step budget, a Python int of at least 1.
      rtol: relative tolerance; 0 spends the whole budget.
      atol: absolute tolerance in units of `rhs`; 0 means relative only.
      damping: λ; saves a pass over the vectors against adding it in `matvec`.
      preconditioner: v -> M⁻¹ v, symmetric positive definite.
      progress_tol: ε; stops also at the first step i > k = max(10, ⌈0.1 i⌉) with
        φᵢ < 0 and (φᵢ - φᵢ₋ₖ) / φᵢ < k ε. None: never.
      objective: x -> a scalar, smaller is better, for instance the loss after a step of
        x. Where given, the iterates of steps ⌈1.3ʲ⌉ and the last are kept, and the
        result is the one reached by going back from the last while the objective falls;
        NaN is the worst. Costs log(max_steps) / log(1.3) vectors of memory, 10 for 20
        steps and 20 for 250, and at most as many evaluations.

    Returns:
      x in the structure and the dtypes of `rhs`, always finite, and a `SolverInfo`,
      which counts all steps, and otherwise is about the x that is returned.

    Raises:
      ValueError: on a step budget below 1, a negative tolerance, a `progress_tol` that
        is not positive, an `x0` unlike `rhs`.

    Example:
      >>> import jax.numpy as jnp
      >>> a = jnp.array([[4.0, 1.0], [1.0, 3.0]])
      >>> x, info = conjugate_gradient(
      ...     lambda v: a @ v, jnp.array([1.0, 2.0]), max_steps=10, rtol=1e-6
      ... )
      >>> x, info.num_steps
      (Array([0.0909..., 0.636...], dtype=float32), Array(2, dtype=int32))

    References:
      Hestenes and Stiefel 1952; van der Vorst and Ye, Residual replacement strategies
      for Krylov subspace iterative methods, 2000, equations 17 and 18. Martens, Deep
      learning via Hessian-free optimization, 2010, sections 4.4 (`progress_tol`, there
      5e-4) and 4.6 (`objective`).

    Note:
      Bounded by `lax.while_loop`: forward-mode differentiable, not reverse-mode.
    """
    check_budget(max_steps, rtol, atol, progress_tol)
    check_system(rhs, damping, x0)
    solution, _, info = conjugate_gradient_with_image(
        lambda vector: (matvec(vector), ()),
        rhs,
        x0=x0,
        max_steps=max_steps,
        rtol=rtol,
        atol=atol,
        damping=damping,
        preconditioner=preconditioner,
        progress_tol=progress_tol,
        objective=objective,
    )
    return solution, info


def check_budget(
    max_steps: Any, rtol: float, atol: float, progress_tol: float | None
) -> None:
    """Raises on a budget or tolerances with which nothing can be solved.

    Raises:
      TypeError: on a step budget that is not a Python int.
      ValueError: on numbers out of range.
    """
    check_count("max_steps", max_steps)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not value >= 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")
    if progress_tol is not None and not progress_tol > 0:
        raise ValueError(
            f"`progress_tol` must be positive, or None for no such rule, got "
            f"{progress_tol}."
        )
