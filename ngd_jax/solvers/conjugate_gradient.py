"""Conjugate gradients for A x = b, A symmetric positive semi-definite, in tree space.

    α = ⟨r, z⟩ / ⟨p, A p⟩,  x ← x + α p,  r ← r - α A p,  z = M⁻¹ r,  p ← z + β p

What differs from the textbook loop, and why:

* the right-hand side is scaled to norm one first, so that nothing depends on its size
  and no test needs an absolute floor (lineax's absolute breakdown test returns NaN on
  well-conditioned systems of network size in float32);
* the residual of the recurrence drifts away from the true one by accumulated round-off.
  The drift is estimated as it grows, and the residual is replaced by b - A x when it
  matters, keeping the search direction: no restart (van der Vorst and Ye 2000). A
  replacement takes one turn of the same loop, so that A is traced and compiled once;
* curvature ⟨p, A p⟩ that round-off cannot tell from zero is a breakdown, relative to
  the largest curvature seen;
* the loop ends at convergence, and an iterate that has converged is never touched by a
  further division of round-off by round-off.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.solvers.interface import (
    SolverInfo,
    SolverStatus,
    check_system,
    forward_only,
)
from ngd_jax.types import Array, ArrayLike, MatVec, PyTree

__all__ = ["CG", "conjugate_gradient"]

_RUNNING = -1


class _State(NamedTuple):
    """The loop's carry, in units in which the largest entry of b is 1.

    `x_norm` bounds ‖x‖, `spread` is the largest Rayleigh quotient seen and so a lower
    bound of ‖A‖, `drift` estimates how far the recurrence's residual is from the true
    one. `replace` asks the next turn to compute the true one.
    """

    x: PyTree
    r: PyTree
    p: PyTree
    previous_rz: Array
    residual: Array
    x_norm: Array
    spread: Array
    drift: Array
    num_steps: Array
    replace: Array
    status: Array


def conjugate_gradient(
    matvec: MatVec,
    rhs: PyTree,
    *,
    x0: PyTree | None = None,
    max_steps: int,
    rtol: float = 0.0,
    atol: float = 0.0,
    preconditioner: MatVec | None = None,
) -> tuple[PyTree, SolverInfo]:
    """Solves A x = b for a symmetric positive (semi-)definite A.

    Stops where ‖b - A x‖ ≤ max(rtol·‖b‖, atol), after `max_steps` steps, or where
    round-off leaves nothing to gain.

    Args:
      matvec: v -> A v on trees of the structure and the dtypes of `rhs`.
      rhs: b, a tree of floating point arrays. Vectors are held in float32 or wider.
      x0: a first guess; its best multiple ⟨x0, b⟩ / ⟨x0, A x0⟩ is what is started
        from, so that a poor one is never worse than zero. Costs one product.
      max_steps: the step budget, a Python int of at least 1.
      rtol: relative tolerance; 0 spends the whole budget.
      atol: absolute tolerance in units of `rhs`; 0 means relative only.
      preconditioner: v -> M⁻¹ v, symmetric positive definite.

    Returns:
      x in the structure and the dtypes of `rhs`, always finite, and a `SolverInfo`.

    Raises:
      ValueError: on a step budget below 1, a negative tolerance, an `x0` unlike `rhs`.

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
      for Krylov subspace iterative methods, 2000, equations 17 and 18.

    Note:
      Bounded by `lax.while_loop`: forward-mode differentiable, not reverse-mode.
    """
    _check_budget(max_steps, rtol, atol)
    check_system(rhs, 0.0, x0)
    tree.check_parameters(rhs, name="rhs")
    dtype = tree.accumulator_dtype(rhs)
    eps = float(jnp.finfo(dtype).eps)

    b, unpack = tree.pack(tree.widen(rhs))
    zeros = optax.tree.zeros_like(b)
    start = zeros if x0 is None else tree.pack(tree.widen(x0))[0]

    def product(vector: PyTree) -> PyTree:
        image = matvec(optax.tree.cast_like(unpack(vector), rhs))
        return tree.pack(tree.widen(image))[0]

    def precondition(residual: PyTree) -> PyTree:
        if preconditioner is None:
            return residual
        image = preconditioner(optax.tree.cast_like(unpack(residual), rhs))
        return tree.pack(tree.widen(image))[0]

    # In units of its largest entry: the square of b itself could over- or underflow.
    largest = tree.max_abs(b)
    finite = jnp.isfinite(largest)
    if x0 is not None:
        finite &= jnp.isfinite(tree.max_abs(start))
        start = tree.select(finite & (largest > 0), start, zeros)
    unit = jnp.where(largest > 0, largest, 1.0)
    b, start = tree.divide(b, unit), tree.divide(start, unit)
    b_norm = jnp.sqrt(tree.vdot(b, b))

    # Below ε‖b‖ the recurrence goes on shrinking, the solution no longer improves.
    tolerance = jnp.maximum(max(rtol, eps) * b_norm, atol / unit).astype(dtype)
    verifies = rtol > 0 or atol > 0

    def body(state: _State) -> _State:
        z = precondition(state.r)
        rz = state.residual**2 if preconditioner is None else tree.vdot(state.r, z)
        p = tree.axpy(rz / state.previous_rz, state.p, z)
        vector = tree.select(state.replace, state.x, p)
        image = product(vector)
        curvature = tree.vdot(vector, image)
        length_squared = tree.vdot(vector, vector)
        length = jnp.sqrt(length_squared)

        # Either a step along p, or r = b - s A x with s = 1 but for the first guess.
        alpha = jnp.where(state.replace, 0.0, rz / curvature)
        factor = jnp.ones((), dtype)
        if x0 is not None:
            multiple = jnp.where(curvature > 0, tree.vdot(vector, b) / curvature, 0.0)
            is_guess = state.replace & (state.num_steps == 0)
            factor = jnp.where(is_guess, multiple, 1.0)
        x = tree.axpy(alpha, p, tree.scale(factor, state.x))
        r = tree.axpy(
            jnp.where(state.replace, -factor, -alpha),
            image,
            tree.select(state.replace, b, state.r),
        )
        residual = jnp.sqrt(tree.vdot(r, r))

        # curvature / length² is a Rayleigh quotient, so at most ‖A‖.
        is_sound = (curvature > eps * state.spread * length_squared) & (rz > 0)
        finite = jnp.isfinite(curvature) & jnp.isfinite(residual)
        failed = ~finite | ~(is_sound | state.replace)
        quotient = curvature / jnp.where(length_squared > 0, length_squared, 1.0)
        spread = jnp.maximum(state.spread, quotient)

        # The estimate of van der Vorst and Ye: each update of r rounds at this size.
        x_norm = jnp.where(
            state.replace, jnp.abs(factor), jnp.abs(alpha)
        ) * length + jnp.where(state.replace, 0.0, state.x_norm)
        rounding = eps * (spread * x_norm + residual)
        drift = jnp.where(state.replace, 0.0, state.drift) + rounding
        has_drifted = (drift > eps**0.5 * residual) & (
            state.drift <= eps**0.5 * state.residual
        )
        reached = residual <= tolerance
        is_doubtful = verifies & ~state.replace & (drift > 0.1 * tolerance)
        # The recurrence was there, the truth is not; rounding alone accounts for it.
        is_stuck = (
            state.replace & (state.residual <= tolerance) & (rounding > tolerance)
        )
        status = jnp.select(
            [~finite, failed, reached & ~is_doubtful, is_stuck],
            [
                SolverStatus.NON_FINITE,
                SolverStatus.BREAKDOWN,
                SolverStatus.CONVERGED,
                SolverStatus.STAGNATED,
            ],
            _RUNNING,
        )
        return _State(
            x=tree.select(failed, state.x, x),
            r=r,
            p=tree.select(state.replace, state.p, p),
            previous_rz=jnp.where(state.replace, state.previous_rz, rz),
            residual=jnp.where(failed, state.residual, residual),
            x_norm=jnp.where(failed, state.x_norm, x_norm),
            spread=spread,
            drift=drift,
            num_steps=state.num_steps
            + jnp.where(state.replace | failed, 0, 1).astype(jnp.int32),
            replace=~state.replace & (has_drifted | (reached & is_doubtful)),
            status=status.astype(jnp.int32),
        )

    def running(state: _State) -> Array:
        return (state.status == _RUNNING) & (
            (state.num_steps < max_steps) | state.replace
        )

    is_solved = largest == 0
    if x0 is None:
        is_solved |= b_norm <= tolerance
    status = jnp.select(
        [~finite, is_solved],
        [SolverStatus.NON_FINITE, SolverStatus.CONVERGED],
        _RUNNING,
    )
    zero = jnp.zeros((), dtype)
    state = _State(
        x=start,
        r=b,
        p=zeros,
        previous_rz=jnp.asarray(jnp.inf, dtype),
        residual=b_norm,
        x_norm=zero,
        spread=zero,
        drift=zero,
        num_steps=jnp.zeros((), jnp.int32),
        replace=jnp.asarray(x0 is not None),
        status=status.astype(jnp.int32),
    )
    state = jax.lax.while_loop(running, body, state)

    # Entries are at most x_norm, so this also says that none has overflowed.
    is_sound = finite & jnp.isfinite(state.x_norm * unit)
    if x0 is not None:
        # A first guess whose own product is not finite is no solution.
        has_moved = (state.status != SolverStatus.NON_FINITE) | (state.num_steps > 0)
        is_sound &= has_moved
    solution = unpack(tree.select(is_sound, tree.scale(unit, state.x), zeros))
    relative = state.residual / jnp.where(b_norm > 0, b_norm, 1.0)
    status = jnp.where(state.status == _RUNNING, SolverStatus.MAX_STEPS, state.status)
    info = SolverInfo(
        num_steps=state.num_steps,
        relative_residual=jnp.where(is_sound, relative, 1.0).astype(dtype),
        status=jnp.where(is_sound, status, SolverStatus.NON_FINITE).astype(jnp.int32),
    )
    solution = forward_only(
        optax.tree.cast_like(solution, rhs),
        what="conjugate_gradient",
        instead="Stop the gradient at its result with jax.lax.stop_gradient, or wrap "
        "the solve in jax.lax.custom_linear_solve.",
    )
    return solution, info


def _check_budget(max_steps: Any, rtol: float, atol: float) -> None:
    if isinstance(max_steps, bool) or not isinstance(max_steps, int):
        raise TypeError(
            f"`max_steps` must be a Python int (static under jit), got "
            f"{type(max_steps).__name__}."
        )
    if max_steps < 1:
        raise ValueError(f"`max_steps` must be at least 1, got {max_steps}.")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not value >= 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")


@dataclasses.dataclass(frozen=True)
class CG:
    """Conjugate gradients on F + λI: the reference, for every size of problem.

    Attributes:
      max_steps: products spent at most. 20 is twice TRPO's; deep autoencoders take
        more (Martens 2010 allows 250).
      rtol: relative residual at which to stop; 0 spends the budget.
      preconditioner: None, or (fisher, damping) -> (v -> M⁻¹ v), called once for each
        solve; M symmetric positive definite.

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
    preconditioner: Callable[[Any, ArrayLike], MatVec] | None = None

    def __post_init__(self) -> None:
        _check_budget(self.max_steps, self.rtol, 0.0)

    def __call__(
        self,
        fisher: Any,
        rhs: PyTree,
        *,
        damping: ArrayLike,
        x0: PyTree | None = None,
    ) -> tuple[PyTree, SolverInfo]:
        """Solves (F + λI) d = g; see `Solver`."""
        check_system(rhs, damping, x0)
        precondition = self.preconditioner and self.preconditioner(fisher, damping)
        return conjugate_gradient(
            lambda v: tree.axpy(damping, v, fisher.matvec(v)),
            rhs,
            x0=x0,
            max_steps=self.max_steps,
            rtol=self.rtol,
            preconditioner=precondition,
        )
