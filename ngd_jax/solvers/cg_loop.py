"""Conjugate gradients for A x = b, A symmetric positive semi-definite, in tree space.

    α = ⟨r, z⟩ / ⟨p, A p⟩,  x ← x + α p,  r ← r - α A p,  z = M⁻¹ r,  p ← z + β p

What differs from the textbook loop, and why:

* the right-hand side is scaled to norm one first, so that nothing depends on its size
  and no test needs an absolute floor (lineax's absolute breakdown test returns NaN on
  well-conditioned systems of network size in float32);
* the residual of the recurrence drifts away from the true one by accumulated rounding.
  In solves of more than 50 steps the drift is estimated as it grows, and the residual
  is replaced by b - A x when it matters and before convergence is declared, keeping the
  search direction: no restart (van der Vorst and Ye 2000);
* curvature ⟨p, A p⟩ that round-off cannot tell from zero is a breakdown, relative to
  the largest curvature seen;
* the loop ends at convergence, and an iterate that has converged is never touched by a
  further division of round-off by round-off: where A is singular, directions without
  curvature come up then, and a step along one would be long.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.solvers import iterates
from ngd_jax.solvers.interface import (
    SolverInfo,
    SolverStatus,
    forward_only,
)
from ngd_jax.types import Array, ArrayLike, MatVec, PyTree, Scalar

__all__ = ["conjugate_gradient_with_image"]

_RUNNING = -1
# Shorter solves have no time to drift, and a second copy of A to compile has a price.
_LONGEST_WITHOUT_REPLACEMENT = 50
# Relative residuals up to so many ε are working precision; from there it may only fall,
# but for so many times.
_WORKING_PRECISION = 64.0
_RISE = 8.0


class _Best(NamedTuple):
    """The best of the iterates whose true residual was computed, by φ there."""

    x: PyTree
    pushed: PyTree
    residual: Array
    model: Array


class _State(NamedTuple):
    """The loop's carry, in units in which the largest entry of b is 1.

    `pushed` is J x, where J is known of A = Jᵀ H J, else (). `x_norm` bounds ‖x‖,
    `spread` is the largest Rayleigh quotient seen and so a lower bound of ‖A‖, `drift`
    estimates how far the recurrence's residual is from the true one, which `is_suspect`
    asks to compute, and `last_miss` is the true residual when the tolerance was last
    missed though the recurrence had reached it; `smallest` is the smallest residual
    since then. `progress` and `kept` are None where nobody asked
    for them.
    """

    x: PyTree
    pushed: PyTree
    r: PyTree
    p: PyTree
    previous_rz: Array
    residual: Array
    x_norm: Array
    spread: Array
    drift: Array
    last_miss: Array
    smallest: Array
    num_steps: Array
    is_suspect: Array
    status: Array
    best: _Best | None
    progress: iterates.Progress | None
    kept: iterates.Kept | None


def conjugate_gradient_with_image(
    matvec_with_image: Callable[[PyTree], tuple[PyTree, PyTree]],
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
) -> tuple[PyTree, PyTree | None, SolverInfo]:
    """x, and J x, of which products with A = Jᵀ H J come by all along.

    Args:
      matvec_with_image: v -> A v and J v, or () where there is no J.
      rhs, x0, max_steps, rtol, atol, damping, preconditioner, progress_tol, objective:
        as for `conjugate_gradient`, which checks them.

    Returns:
      x; J x, float32 or wider, None with an `objective`, whose choice it may not be;
      and the report.
    """
    tree.check_parameters(rhs, name="rhs")
    dtype = tree.accumulator_dtype(rhs)
    eps = float(jnp.finfo(dtype).eps)

    b, unpack = tree.pack(tree.widen(rhs))
    zeros = optax.tree.zeros_like(b)
    start = zeros if x0 is None else tree.pack(tree.widen(x0))[0]
    damping = jnp.asarray(damping).astype(dtype)

    def product(vector: PyTree) -> tuple[PyTree, PyTree]:
        image, pushed = matvec_with_image(unpack(vector))
        return tree.pack(tree.widen(image))[0], tree.widen(pushed)

    def precondition(residual: PyTree) -> PyTree:
        if preconditioner is None:
            return residual
        image = preconditioner(unpack(residual))
        return tree.pack(tree.widen(image))[0]

    # In units of its largest entry: the square of b itself could over- or underflow.
    # The first guess has units of its own, since its best multiple is what counts.
    largest = tree.max_abs(b)
    finite = jnp.isfinite(largest)
    unit = tree.usable_unit(largest)
    b = tree.divide(b, unit)
    if x0 is not None:
        start, is_finite = _usable_guess(start)
        finite &= is_finite
        start = tree.select(finite & (largest > 0), start, zeros)
    b_norm = jnp.sqrt(tree.vdot(b, b))

    # Below ε‖b‖ the recurrence goes on shrinking, the solution no longer improves.
    tolerance = jnp.maximum(max(rtol, eps) * b_norm, atol / unit).astype(dtype)
    replaces = max_steps > _LONGEST_WITHOUT_REPLACEMENT

    def step(state: _State) -> _State:
        z = precondition(state.r)
        rz = state.residual**2 if preconditioner is None else tree.vdot(state.r, z)
        p = tree.axpy(rz / state.previous_rz, state.p, z)
        image, pushed = product(p)
        length_squared = tree.vdot(p, p)
        curvature = tree.vdot(p, image) + damping * length_squared

        finite = jnp.isfinite(curvature)
        failed = ~((curvature > eps * state.spread * length_squared) & (rz > 0))
        failed |= ~finite
        alpha = jnp.where(failed, 0.0, rz / curvature)
        r = tree.axpy(-alpha, image, tree.axpy(-alpha * damping, p, state.r))
        residual = jnp.sqrt(tree.vdot(r, r))
        is_past = state.smallest <= _WORKING_PRECISION * eps * b_norm
        is_past &= residual > _RISE * state.smallest
        stays = failed | is_past
        alpha = jnp.where(stays, 0.0, alpha)
        x = tree.axpy(alpha, p, state.x)
        pushed = tree.axpy(alpha, pushed, state.pushed)
        residual = jnp.where(stays, state.residual, residual)

        # The estimate of van der Vorst and Ye: each update of r rounds at this size.
        # curvature / length² is a Rayleigh quotient, so at most ‖A + λI‖.
        spread = jnp.maximum(state.spread, curvature / length_squared)
        x_norm = state.x_norm + alpha * jnp.sqrt(length_squared)
        drift = state.drift + eps * (spread * x_norm + residual)
        has_drifted = (drift > eps**0.5 * residual) & (
            state.drift <= eps**0.5 * state.residual
        )
        reached = residual <= tolerance
        is_doubtful = reached & replaces & (drift > 0.1 * tolerance)
        num_steps = state.num_steps + jnp.where(stays, 0, 1).astype(jnp.int32)
        progress, settled = iterates.record(
            state.progress, num_steps, alpha * rz / 2, progress_tol
        )
        status = _status_after(finite, failed, is_past, reached, is_doubtful, settled)
        return _State(
            x=x,
            pushed=pushed,
            r=r,
            p=p,
            previous_rz=rz,
            residual=residual,
            x_norm=x_norm,
            spread=spread,
            drift=drift,
            last_miss=state.last_miss,
            smallest=jnp.minimum(state.smallest, residual),
            num_steps=num_steps,
            is_suspect=replaces
            & ~stays
            & (has_drifted | is_doubtful | _is_due(state.num_steps + 1, max_steps)),
            status=status,
            best=state.best,
            progress=progress,
            kept=iterates.keep(state.kept, num_steps, max_steps, x, residual),
        )

    def replace_residual(state: _State) -> _State:
        """Sets r = b - A x; before the first step, with the best multiple of x."""
        image, pushed = product(state.x)
        image = tree.axpy(damping, state.x, image)
        curvature = tree.vdot(state.x, image)
        multiple = jnp.where(curvature > 0, tree.vdot(state.x, b) / curvature, 0.0)
        factor = jnp.where(state.num_steps == 0, multiple, 1.0)
        factor = jnp.where(jnp.isfinite(factor), factor, 0.0)
        x, pushed = tree.scale(factor, state.x), tree.scale(factor, pushed)
        r = tree.axpy(-factor, image, b)
        residual = jnp.sqrt(tree.vdot(r, r))
        # By way of its bound: the square of a long x overflows.
        x_norm = jnp.abs(factor) * state.x_norm
        finite = jnp.isfinite(residual)
        # Where the recurrence was there and the truth is not, go on from the truth with
        # a new direction, as in iterative refinement, while that halves the residual.
        # The same after a jump that no drift explains: A itself is rounded, as that of
        # a bfloat16 model is, and ⟨r, z⟩ no longer fits the old direction.
        jumped = (residual > 2 * state.residual) & (state.num_steps > 0)
        missed = (residual > tolerance) & ((state.residual <= tolerance) | jumped)
        is_stuck = missed & (residual > 0.5 * state.last_miss)
        model = -(tree.vdot(x, b) + tree.vdot(x, r)) / 2
        here = _Best(x, pushed, residual, model)
        best, is_worse = _better_of(state.best, here)
        here = tree.select(is_worse, best, here)
        status = jnp.select(
            [~finite, here.residual <= tolerance, is_stuck | is_worse],
            [SolverStatus.NON_FINITE, SolverStatus.CONVERGED, SolverStatus.STAGNATED],
            _RUNNING,
        )
        return state._replace(
            x=here.x,
            pushed=here.pushed,
            r=r,
            best=best if replaces else None,
            previous_rz=jnp.where(missed, jnp.inf, state.previous_rz),
            residual=jnp.where(finite, here.residual, b_norm),
            x_norm=x_norm,
            drift=eps * (state.spread * x_norm + residual),
            last_miss=jnp.where(missed, residual, state.last_miss),
            smallest=residual,
            is_suspect=jnp.asarray(False),
            status=status.astype(jnp.int32),
            progress=iterates.restart(state.progress, x, b, r),
        )

    def is_running(state: _State) -> Array:
        in_budget = state.num_steps < max_steps
        return (state.status == _RUNNING) & in_budget & ~state.is_suspect

    iterate = functools.partial(jax.lax.while_loop, is_running, step)

    is_solved = largest == 0
    if x0 is None:
        is_solved |= b_norm <= tolerance
    status = jnp.select(
        [~finite, is_solved],
        [SolverStatus.NON_FINITE, SolverStatus.CONVERGED],
        _RUNNING,
    )
    zero, infinity = jnp.zeros((), dtype), jnp.asarray(jnp.inf, dtype)
    nothing = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(product, b)[1]
    )
    state = _State(
        x=start,
        pushed=nothing,
        r=b,
        p=zeros,
        previous_rz=infinity,
        residual=b_norm,
        x_norm=jnp.sqrt(tree.vdot(start, start)),
        spread=zero,
        drift=zero,
        last_miss=infinity,
        smallest=infinity,
        num_steps=jnp.zeros((), jnp.int32),
        is_suspect=jnp.asarray(replaces),
        status=status.astype(jnp.int32),
        best=_Best(zeros, nothing, b_norm, zero) if replaces else None,
        progress=iterates.start_progress(progress_tol, max_steps, dtype),
        kept=iterates.start_keeping(objective is not None, b, max_steps, dtype),
    )
    if replaces:
        state = jax.lax.while_loop(
            lambda state: (state.status == _RUNNING) & state.is_suspect,
            lambda state: iterate(replace_residual(state)),
            state,
        )
    else:
        state = iterate(state if x0 is None else _if_running(replace_residual, state))

    def restore(x: PyTree, is_sound: Array = finite) -> PyTree:
        x = unpack(tree.select(is_sound, tree.scale(unit, x), zeros))
        return optax.tree.cast_like(x, rhs)

    state = _backtrack(state, max_steps, objective, restore)
    # Entries are at most x_norm, so this also says that none has overflowed.
    is_sound = finite & jnp.isfinite(state.x_norm * unit)
    solution = restore(state.x, is_sound)
    pushed = None
    if objective is None:
        pushed = tree.scale(jnp.where(is_sound, unit, 0.0), state.pushed)
    relative = state.residual / jnp.where(b_norm > 0, b_norm, 1.0)
    status = jnp.where(state.status == _RUNNING, SolverStatus.MAX_STEPS, state.status)
    info = SolverInfo(
        num_steps=state.num_steps,
        relative_residual=jnp.where(is_sound, relative, 1.0).astype(dtype),
        status=jnp.where(is_sound, status, SolverStatus.NON_FINITE).astype(jnp.int32),
    )
    return forward_only(solution, what="conjugate_gradient"), pushed, info


def _usable_guess(guess: PyTree) -> tuple[PyTree, Array]:
    """A first guess in units of its largest entry, and whether it is finite."""
    largest = tree.max_abs(guess)
    return tree.divide(guess, tree.usable_unit(largest)), jnp.isfinite(largest)


def _if_running(fn: Callable[[_State], _State], state: _State) -> _State:
    is_running = state.status == _RUNNING
    return jax.lax.cond(is_running, fn, lambda state: state, state)


def _better_of(best: _Best | None, new: _Best) -> tuple[_Best, Array]:
    """The better one by φ, and whether the new one is worse beyond doubt.

    Each step lowers φ, but for rounding; where that has raised it, as the products of a
    bfloat16 model do in long solves, there is no way on. By more than √ε, since φ is a
    sum over all parameters, and its last digits are not what is lost.
    """
    if best is None:
        return new, jnp.asarray(False)
    slack = float(jnp.finfo(new.model.dtype).eps) ** 0.5 * jnp.abs(best.model)
    is_worse = ~(new.model <= best.model + slack)
    return tree.select(new.model <= best.model, new, best), is_worse


def _is_due(num_steps: Array, max_steps: int) -> Array:
    """Whether the true residual is computed after so many steps, drift or not."""
    at_interval = num_steps % _LONGEST_WITHOUT_REPLACEMENT == 0
    return at_interval | (num_steps >= max_steps)


def _status_after(
    finite: Array,
    failed: Array,
    is_past: Array,
    reached: Array,
    is_doubtful: Array,
    settled: Array | None,
) -> Array:
    """The first that applies is the cause; what is doubtful is looked at again."""
    causes = [
        (~finite, SolverStatus.NON_FINITE),
        (failed & ~is_past, SolverStatus.BREAKDOWN),
        (is_past, SolverStatus.STAGNATED),
        (reached & ~is_doubtful, SolverStatus.CONVERGED),
    ]
    if settled is not None:
        causes.append((settled & ~is_doubtful, SolverStatus.SETTLED))
    conditions, statuses = map(list, zip(*causes, strict=True))
    return jnp.select(conditions, statuses, _RUNNING).astype(jnp.int32)


def _backtrack(
    state: _State,
    max_steps: int,
    objective: Callable[[PyTree], Scalar] | None,
    restore: Callable[[PyTree], PyTree],
) -> _State:
    """The kept iterate that is reached from the last while the objective falls."""
    if objective is None or state.kept is None:
        return state
    # The last one again: it may not come from a step, or have a better residual.
    last = iterates.slot_of(state.num_steps, max_steps)
    kept = iterates.write(state.kept, last, state.x, state.residual)
    best = iterates.walk_back(last, lambda slot: objective(restore(kept.iterate(slot))))
    status = jnp.where(best < last, SolverStatus.BACKTRACKED, state.status)
    return state._replace(
        x=kept.iterate(best),
        residual=kept.residuals[best],
        status=status.astype(jnp.int32),
    )
