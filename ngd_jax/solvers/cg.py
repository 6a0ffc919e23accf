"""Conjugate gradients for A x = b, A symmetric positive semi-definite, in tree space.

    α = ⟨r, z⟩ / ⟨p, A p⟩,  x ← x + α p,  r ← r - α A p,  z = M⁻¹ r,  p ← z + β p

Owns the iteration and its safety; knows F only as a product. How it differs from the
textbook loop, and why:

* The right-hand side is in units of its largest entry, so no test needs an absolute
  floor. (lineax's absolute breakdown test returns NaN on well-conditioned systems of
  network size in float32.)
* A first guess is the first search direction. The step along it, ⟨x₀, b⟩/⟨x₀, A x₀⟩,
  gives the best multiple of the guess, so that a poor one is never worse than zero.
* The residual of the recurrence drifts away from the true one by accumulated rounding.
  Solves of more than 50 steps estimate the drift as it grows, and replace the residual
  by b - A x when it matters and before they declare convergence. They keep the search
  direction: this is not a restart (van der Vorst and Ye 2000).
* Curvature ⟨p, A p⟩ that round-off cannot tell from zero is a breakdown, relative to
  the largest curvature seen.
* An iterate that has converged is final. If A is singular, further steps would divide
  round-off by round-off, and move far along directions without curvature.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.solvers.preconditioner import Preconditioner, prepare
from ngd_jax.solvers.protocol import (
    RightHandSide,
    Solution,
    Solver,
    SolverInfo,
    SolverStatus,
    check_budget,
    first_cause,
    forward_only,
    solve_scaled,
)
from ngd_jax.types import Array, ArrayLike, MatVec, Params, PyTree

__all__ = ["CG", "Observer", "conjugate_gradient", "minimize"]

_RUNNING, _SUSPECT = -1, -2
# Shorter solves have no time to drift, and a second copy of A costs compile time.
_LONGEST_WITHOUT_REPLACEMENT = 50
# Relative residuals up to this many ε are working precision; from there on the residual
# must not rise by more than this factor.
_WORKING_PRECISION = 64.0
_RISE = 8.0


@runtime_checkable
class Observer(Protocol):
    """Watches the iteration, keeps what it needs, and may stop it."""

    def init(self, x: PyTree) -> PyTree:
        """Returns the carry before the first step, a tree of arrays."""
        ...

    def update(
        self, carry: PyTree, num_steps: Array, x: PyTree, residual: Array, model: Array
    ) -> tuple[PyTree, Array]:
        """Returns the carry after a step, and whether to stop.

        Args:
          carry: the result of the last `update`, or of `init`.
          num_steps: the number of steps so far; 0 after that along the first guess.
          x: the iterate, as `tree.pack` packs the right-hand side.
          residual: ‖b - A x‖.
          model: φ(x) = ½ xᵀA x - bᵀx.
        """
        ...


class _Best(NamedTuple):
    """The iterate with the lowest model among those whose true residual is known."""

    x: PyTree
    pushed: PyTree
    residual: Array
    model: Array


class _Drift(NamedTuple):
    """Extra state of long solves, to know when to compute the true residual.

    Attributes:
      size: the estimated distance of the recurrence's residual from the true one.
      last_miss: the true residual when the tolerance was last missed although the
        recurrence had reached it.
      best: see `_Best`.
    """

    size: Array
    last_miss: Array
    best: _Best


class _State(NamedTuple):
    """The loop's carry.

    Attributes:
      x, r, p: the iterate, its residual, and the last direction; first the guess.
      pushed: J x if the products with A = Jᵀ H J return J v too, else ().
      previous_rz: ⟨r, z⟩ of the last step; infinity makes the next direction z.
      residual: ‖r‖.
      smallest: the smallest residual since the last replacement.
      spread: the largest Rayleigh quotient so far, a lower bound of ‖A‖.
      model: φ(x) by the recurrence.
      num_steps: -1 before the step along a guess, which does not count.
      status: a `SolverStatus`, _RUNNING, or _SUSPECT: compute the true residual.
      observed: the carry of the observer.
      drift: None in short solves.
    """

    x: PyTree
    pushed: PyTree
    r: PyTree
    p: PyTree
    previous_rz: Array
    residual: Array
    smallest: Array
    spread: Array
    model: Array
    num_steps: Array
    status: Array
    observed: PyTree
    drift: _Drift | None


def minimize(
    matvec_and_push: Callable[[PyTree], tuple[PyTree, PyTree]],
    rhs: PyTree,
    *,
    guess: PyTree | None = None,
    max_steps: int,
    rtol: float = 0.0,
    atol: ArrayLike = 0.0,
    damping: ArrayLike = 0.0,
    preconditioner: MatVec | None = None,
    observer: Observer | None = None,
) -> tuple[PyTree, PyTree, SolverInfo, PyTree]:
    """Minimises φ(x) = ½ xᵀ(A + λI) x - bᵀx, in the units of `solve_scaled`.

    Args:
      matvec_and_push: v -> (A v, J v), or (A v, ()) if there is no J with A = Jᵀ H J.
      rhs: b, finite, float32 or wider, with a largest entry of 1 or 0.
      guess: the same.
      max_steps, rtol, atol, damping, preconditioner: as in `conjugate_gradient`.
      observer: see `Observer`.

    Returns:
      x like b, finite unless the solution overflows; J x, or (); the report; and the
      observer's last carry.
    """
    dtype = tree.accumulator_dtype(rhs)
    eps = float(jnp.finfo(dtype).eps)
    damping = jnp.asarray(damping).astype(dtype)
    b, unpack = tree.pack(rhs)
    b_norm = tree.norm(b)
    zeros = jax.tree.map(jnp.zeros_like, b)
    start = zeros if guess is None else tree.pack(tree.widen(guess))[0]
    start_slope = tree.vdot(start, b)
    # The recurrence keeps shrinking below ε‖b‖; the solution no longer improves.
    tolerance = jnp.maximum(max(rtol, eps) * b_norm, atol).astype(dtype)
    replaces = max_steps > _LONGEST_WITHOUT_REPLACEMENT

    def apply(vector: PyTree) -> tuple[PyTree, PyTree]:
        product, pushed = matvec_and_push(unpack(vector))
        return tree.pack(tree.widen(product))[0], tree.widen(pushed)

    def precondition(r: PyTree, residual: Array) -> tuple[PyTree, Array]:
        if preconditioner is None:
            return r, residual**2
        z = tree.pack(tree.widen(preconditioner(unpack(r))))[0]
        return z, tree.vdot(r, z)

    def step(state: _State) -> _State:
        # 1. The direction, and the slope -dφ/dα along it.
        z, rz = precondition(state.r, state.residual)
        p = tree.axpy(rz / state.previous_rz, state.p, z)
        slope, is_descent = rz, rz > 0
        is_guess = state.num_steps < 0
        if guess is not None:
            p = tree.select(is_guess, state.p, p)
            slope = jnp.where(is_guess, start_slope, rz)
            is_descent |= is_guess

        # 2. The step to the minimum.
        product, pushed = apply(p)
        square = tree.vdot(p, p)
        curvature = tree.vdot(p, product) + damping * square
        failed = ~((curvature > eps * state.spread * square) & is_descent)
        alpha = jnp.where(failed, 0.0, slope / jnp.where(failed, 1.0, curvature))
        r = tree.axpy(-alpha, product, tree.axpy(-alpha * damping, p, state.r))
        residual = tree.norm(r)

        # 3. It is taken, unless it failed or only adds round-off.
        is_finite = jnp.isfinite(curvature) & jnp.isfinite(residual)
        is_past = state.smallest <= _WORKING_PRECISION * eps * b_norm
        is_past &= residual > _RISE * state.smallest
        stays = failed | is_past | ~is_finite
        x, pushed = tree.select(
            stays,
            (state.x, state.pushed),
            tree.axpy(alpha, (p, pushed), (state.x, state.pushed)),
        )
        residual = jnp.where(stays, state.residual, residual)
        # This is a Rayleigh quotient, so at most ‖A + λI‖.
        spread = jnp.maximum(state.spread, jnp.where(stays, 0.0, curvature / square))
        model = state.model - jnp.where(stays, 0.0, alpha * slope / 2)
        num_steps = state.num_steps + (is_guess | ~stays).astype(jnp.int32)

        # 4. Whether to go on. If in doubt, the true residual decides.
        reached = residual <= tolerance
        is_doubtful = is_suspect = jnp.asarray(False)
        drift, observed, should_stop = state.drift, (), jnp.asarray(False)
        if drift is not None:
            # Equation 17 of van der Vorst and Ye: an update of r rounds by ε(‖A‖‖x‖ +
            # ‖r‖). The sum matters as soon as it exceeds √ε‖r‖.
            size = drift.size + eps * (spread * tree.norm(x) + residual)
            has_drifted = size > eps**0.5 * residual
            has_drifted &= drift.size <= eps**0.5 * state.residual
            is_doubtful = reached & (size > 0.1 * tolerance)
            is_due = num_steps % _LONGEST_WITHOUT_REPLACEMENT == 0
            is_due |= num_steps >= max_steps
            is_suspect = (has_drifted | is_doubtful | is_due) & (num_steps > 0)
            drift = drift._replace(size=size)
        if observer is not None:
            seen = state.observed, num_steps, x, residual, model
            observed, should_stop = observer.update(*seen)
        status = first_cause(
            (~is_finite, SolverStatus.NON_FINITE),
            (failed & ~is_guess, SolverStatus.BREAKDOWN),
            (is_past, SolverStatus.STAGNATED),
            (reached & ~is_doubtful, SolverStatus.CONVERGED),
            (should_stop & ~is_doubtful, SolverStatus.SETTLED),
            (is_suspect, _SUSPECT),
            otherwise=_RUNNING,
        )
        return _State(
            x=x,
            pushed=pushed,
            r=r,
            p=p,
            previous_rz=jnp.where(is_guess, jnp.inf, rz).astype(dtype),
            residual=residual,
            smallest=jnp.minimum(state.smallest, residual),
            spread=spread,
            model=model,
            num_steps=num_steps,
            status=status,
            observed=observed,
            drift=drift,
        )

    def replace_residual(state: _State) -> _State:
        """Sets r = b - A x, and says whether it is worth going on from it."""
        size, last_miss, best = cast("_Drift", state.drift)
        product, pushed = apply(state.x)
        r = tree.axpy(-1.0, product, tree.axpy(-damping, state.x, b))
        residual = tree.norm(r)
        is_finite = jnp.isfinite(residual)
        # If the recurrence has met the tolerance and the true residual has not, go on
        # from the true one with a new direction, as in iterative refinement, while that
        # halves the residual. Do the same after a jump that no drift explains: then A
        # itself is rounded, as for a bfloat16 model, and ⟨r, z⟩ no longer fits the old
        # direction.
        has_jumped = residual > 2 * state.residual
        missed = (residual > tolerance) & ((state.residual <= tolerance) | has_jumped)
        is_stuck = missed & (residual > 0.5 * last_miss)
        # Each step lowers φ, except for rounding. If rounding has raised it by more
        # than √ε, as the products of a bfloat16 model do in long solves, stop. A
        # smaller rise does not count: φ is a sum over all parameters, whose last digits
        # do not matter.
        model = -(tree.vdot(state.x, b) + tree.vdot(state.x, r)) / 2
        is_worse = ~(model <= best.model + eps**0.5 * jnp.abs(best.model))
        here = _Best(state.x, pushed, residual, model)
        best = tree.select(model <= best.model, here, best)
        here = tree.select(is_worse, best, here)
        size = eps * (state.spread * tree.norm(here.x) + residual)
        last_miss = jnp.where(missed, residual, last_miss)
        return state._replace(
            x=here.x,
            pushed=here.pushed,
            r=r,
            previous_rz=jnp.where(missed, jnp.inf, state.previous_rz),
            residual=jnp.where(is_finite, here.residual, b_norm),
            smallest=residual,
            model=here.model,
            status=first_cause(
                (~is_finite, SolverStatus.NON_FINITE),
                (here.residual <= tolerance, SolverStatus.CONVERGED),
                (is_stuck | is_worse, SolverStatus.STAGNATED),
                otherwise=_RUNNING,
            ),
            drift=_Drift(size, last_miss, best),
        )

    def is_running(state: _State) -> Array:
        return (state.status == _RUNNING) & (state.num_steps < max_steps)

    def run_and_replace(state: _State) -> _State:
        state = jax.lax.while_loop(is_running, step, state)
        is_suspect = state.status == _SUSPECT
        return jax.lax.cond(is_suspect, replace_residual, lambda state: state, state)

    zero, infinity = jnp.zeros((), dtype), jnp.asarray(jnp.inf, dtype)
    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(apply, b)[1])
    best = _Best(zeros, nothing, b_norm, zero)
    state = _State(
        x=zeros,
        pushed=nothing,
        r=b,
        p=start,
        previous_rz=infinity,
        residual=b_norm,
        smallest=infinity,
        spread=zero,
        model=zero,
        num_steps=jnp.asarray(0 if guess is None else -1, jnp.int32),
        status=jnp.where(b_norm <= tolerance, SolverStatus.CONVERGED, _RUNNING).astype(
            jnp.int32
        ),
        observed=() if observer is None else observer.init(b),
        drift=_Drift(zero, infinity, best) if replaces else None,
    )
    body = run_and_replace if replaces else step
    state = jax.lax.while_loop(is_running, body, state)
    num_steps = jnp.maximum(state.num_steps, 0)
    relative = state.residual / jnp.where(b_norm > 0, b_norm, 1.0)
    is_over = state.status == _RUNNING
    status = jnp.where(is_over, SolverStatus.MAX_STEPS, state.status)
    info = SolverInfo(num_steps, relative, status)
    return unpack(state.x), state.pushed, info, state.observed


@dataclasses.dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients on F + λI: the reference, for problems of every size.

    Attributes:
      max_steps: the most products to spend. 20 is twice TRPO's; deep autoencoders take
        more (Martens 2010 allows 250).
      rtol: relative residual at which to stop; 0 spends the budget.
      preconditioner: None; a `Preconditioner` such as `Kronecker`, whose state is kept
        between steps; or a function (fisher, damping) -> (v -> M⁻¹ v), called once for
        each solve. M must be symmetric positive definite.
      warm_start: the transformation's first guess is this multiple of the previous
        direction, and the solve starts from the best multiple of that: any value but 0
        does the same. A guess costs one product.

    Raises:
      ValueError, TypeError: for a step budget below 1 or not an int, a negative
        tolerance, a `warm_start` outside [0, 1], a solver as `preconditioner`.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
      ... )
      >>> d, info = CG(rtol=1e-6)(fisher, jnp.array([[12.0], [17.0]]), damping=0.0)
      >>> d.ravel().round(2)
      Array([1., 1.], dtype=float32)

    References:
      See `conjugate_gradient`.
    """

    max_steps: int = 20
    rtol: float = 1e-4
    preconditioner: Preconditioner | Callable[[Any, ArrayLike], MatVec] | None = None
    warm_start: float = 0.0

    def __post_init__(self) -> None:
        check_budget(self.max_steps, self.rtol)
        if isinstance(self.preconditioner, Solver):
            raise TypeError(
                f"`preconditioner` must be one, such as Kronecker(), or a function "
                f"(fisher, damping) -> (v -> M⁻¹ v), got a solver: "
                f"{self.preconditioner!r}."
            )
        if not 0 <= self.warm_start <= 1:
            raise ValueError(f"`warm_start` must be in [0, 1], got {self.warm_start}.")

    def init(self, params: Params) -> PyTree:
        """The state before the first solve: the preconditioner's; () without one."""
        if isinstance(self.preconditioner, Preconditioner):
            return self.preconditioner.init(params)
        return ()

    def solve(
        self, fisher: Any, rhs: RightHandSide, *, damping: ArrayLike, state: PyTree = ()
    ) -> Solution:
        """Solves (F + λI) d = g; see `Solver`. Uses the guess."""
        return self._observed(fisher, rhs, damping, state, None)[0]

    def _observed(
        self,
        fisher: Any,
        rhs: RightHandSide,
        damping: ArrayLike,
        state: PyTree,
        observer: Observer | None,
    ) -> tuple[Solution, PyTree]:
        precondition = None
        if self.preconditioner is not None:
            precondition, state = prepare(self.preconditioner, fisher, state, damping)
        # In microbatches, J v would be one more pass through the model.
        pushes = fisher.chunks is None
        direction, pushed, info, observed = minimize(
            fisher.matvec_and_push if pushes else _without_push(fisher.matvec),
            rhs.gradient,
            guess=rhs.guess,
            max_steps=self.max_steps,
            rtol=self.rtol,
            damping=damping,
            preconditioner=precondition,
            observer=observer,
        )
        pushed = pushed if pushes else None
        return Solution(direction, pushed, info, state), observed


class _Bare(Solver):
    """The solver in `conjugate_gradient`; its Fisher is a plain product."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def solve(
        self, fisher: Any, rhs: RightHandSide, *, damping: ArrayLike, state: PyTree = ()
    ) -> Solution:
        """Solves with `fisher` a function v -> A v."""
        product = _without_push(fisher)
        g, guess = rhs.gradient, rhs.guess
        x, _, info, _ = minimize(
            product, g, guess=guess, damping=damping, **self.options
        )
        return Solution(x, None, info, state)


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
) -> tuple[PyTree, SolverInfo]:
    """Solves (A + λI) x = b for a symmetric positive (semi-)definite A.

    Stops when the residual is at most max(rtol·‖b‖, atol), after `max_steps` steps, or
    when round-off leaves nothing to gain.

    Args:
      matvec: v -> A v on trees of the structure of `rhs`, float32 or wider. (Rounded to
        narrower dtypes, A would not be symmetric, and the iteration would diverge.)
      rhs: b, a tree of floating point arrays. Vectors are held in float32 or wider.
      x0: a first guess. The solve starts from its best multiple,
        ⟨x0, b⟩ / ⟨x0, (A + λI) x0⟩, so that a poor one is never worse than zero. Costs
        one product.
      max_steps: the step budget, a Python int of at least 1.
      rtol: relative tolerance; 0 spends the whole budget.
      atol: absolute tolerance in units of `rhs`; 0 means relative only.
      damping: λ; saves a pass over the vectors compared with adding it in `matvec`.
      preconditioner: v -> M⁻¹ v, symmetric positive definite.

    Returns:
      x in the structure and the dtypes of `rhs`, always finite; and a `SolverInfo`.

    Raises:
      ValueError: for a step budget below 1, a negative tolerance, an `x0` unlike `rhs`.
      TypeError: for a step budget that is not a Python int, or an integer `rhs`.

    Example:
      >>> import jax.numpy as jnp
      >>> a = jnp.array([[4.0, 1.0], [1.0, 3.0]])
      >>> x, info = conjugate_gradient(
      ...     lambda v: a @ v, jnp.array([1.0, 2.0]), max_steps=10, rtol=1e-6
      ... )
      >>> x, info.num_steps
      (Array([0.0909..., 0.636...], dtype=float32), Array(2, dtype=int32))

    References:
      Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems,
      1952. Van der Vorst and Ye, Residual replacement strategies for Krylov subspace
      iterative methods, 2000, equations 17 and 18.

    Note:
      Bounded by `lax.while_loop`: forward-mode differentiable, not reverse-mode.
    """
    check_budget(max_steps, rtol, atol)
    tree.check_parameters(rhs, name="rhs")
    if x0 is not None:
        tree.check_like(x0, rhs, name="x0", like_name="rhs")
    b = tree.widen(rhs)
    solver = _Bare(
        max_steps=max_steps,
        rtol=rtol,
        atol=atol / tree.usable_unit(tree.max_abs(b)),
        preconditioner=preconditioner,
    )
    system = RightHandSide(b, guess=x0)
    solution = solve_scaled(solver, matvec, system, damping=damping)
    x = optax.tree.cast_like(solution.direction, rhs)
    return forward_only(x, what="conjugate_gradient"), solution.info


def _without_push(matvec: MatVec) -> Callable[[PyTree], tuple[PyTree, PyTree]]:
    return lambda vector: (matvec(vector), ())
