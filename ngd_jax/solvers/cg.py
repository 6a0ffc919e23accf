"""Conjugate gradients as a solver of (F + λI) d = g: preconditioned, with state."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ngd_jax.preconditioners import Preconditioner
from ngd_jax.preconditioners.base import prepare
from ngd_jax.solvers.cg_loop import conjugate_gradient_with_image
from ngd_jax.solvers.conjugate_gradient import check_budget
from ngd_jax.solvers.interface import SolverInfo, SolverWithImages, check_system
from ngd_jax.types import ArrayLike, MatVec, Params, PyTree, Scalar

__all__ = ["CG"]


@dataclasses.dataclass(frozen=True)
class CG(SolverWithImages):
    """Conjugate gradients on F + λI: the reference, for every size of problem.

    Attributes:
      max_steps: products spent at most. 20 is twice TRPO's; deep autoencoders take
        more (Martens 2010 allows 250).
      rtol: relative residual at which to stop; 0 spends the budget.
      preconditioner: None, a `Preconditioner` such as `Jacobi`, `Nystrom` or
        `Kronecker`, whose state is kept between steps, or a function
        (fisher, damping) -> (v -> M⁻¹ v), called once for each solve; M symmetric
        positive definite.
      progress_tol: stops also where the quadratic model gains less than this for each
        step, relative, over the last max(10, ⌈0.1 i⌉) steps; None for no such rule.
        Martens 2010, section 4.4, has 5e-4 and no other rule (so rtol=0).
      backtracking: returns, of the iterates of steps ⌈1.3ʲ⌉ and the last, the one
        reached by going back from the last while the loss falls (section 4.6 there).
        Needs the loss, see `solve`; keeps log(max_steps) / log(1.3) vectors more.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
      ... )
      >>> d, info = CG(rtol=1e-6)(fisher, jnp.array([[12.0], [17.0]]), damping=0.0)
      >>> d.ravel().round(2)
      Array([1., 1.], dtype=float32)
    """

    max_steps: int = 20
    rtol: float = 1e-4
    preconditioner: Preconditioner | Callable[[Any, ArrayLike], MatVec] | None = None
    progress_tol: float | None = None
    backtracking: bool = False

    def __post_init__(self) -> None:
        check_budget(self.max_steps, self.rtol, 0.0, self.progress_tol)

    @property
    def uses_objective(self) -> bool:
        """Whether `solve` needs the loss."""
        return self.backtracking

    def init(self, params: Params) -> PyTree:
        """The state before the first solve: the preconditioner's; () without one."""
        if isinstance(self.preconditioner, Preconditioner):
            return self.preconditioner.init(params)
        return ()

    def solve_with_image(
        self,
        fisher: Any,
        rhs: PyTree,
        *,
        damping: ArrayLike,
        x0: PyTree | None = None,
        coefficients: PyTree | None = None,
        objective: Callable[[PyTree], Scalar] | None = None,
        state: PyTree = (),
    ) -> tuple[PyTree, PyTree | None, SolverInfo, PyTree]:
        """Solves (F + λI) d = g; see `StatefulSolver`.

        `coefficients` are of no use here. The state () builds the preconditioner anew
        and keeps nothing.

        Raises:
          ValueError: for backtracking without an `objective`.
        """
        del coefficients
        check_system(rhs, damping, x0)
        if self.backtracking and objective is None:
            raise ValueError(
                "CG(backtracking=True) needs the loss: give `output_loss_fn` to "
                "natural_gradient, or call tx.update(..., value_fn=value_fn) with "
                "value_fn(params, batch); outside of it, call solver.solve(..., "
                "objective=objective) with objective(d) the loss after a step of -d."
            )
        precondition = None
        if self.preconditioner is not None:
            precondition, state = prepare(self.preconditioner, fisher, state, damping)
        # By microbatches J v is one more pass; and others than ours may not have it.
        has_images = getattr(fisher, "is_kept", False)
        solution, image, info = conjugate_gradient_with_image(
            fisher.matvec_with_image
            if has_images
            else lambda vector: (fisher.matvec(vector), ()),
            rhs,
            x0=x0,
            max_steps=self.max_steps,
            rtol=self.rtol,
            damping=damping,
            preconditioner=precondition,
            progress_tol=self.progress_tol,
            objective=objective if self.backtracking else None,
        )
        return solution, image if has_images else None, info, state
