"""The iteration of LSMR: least squares by the bidiagonalisation of Golub and Kahan.

    min ‖[A; √λ I] x - [w; r/√λ]‖²,    normal equations (Aᵀ A + λ I) x = g = Aᵀ w + r
    β u = A v - α u,    α v = Aᵀ u - β v,    with A standing for [A; √λ I]

Then two sequences of plane rotations, of which the second makes ‖Aᵀ residual‖ the size
of a number, ζ̄, that is there for nothing and never grows (Fong and Saunders 2011,
section 2.7, with their names). What differs from the paper, and why:

* of the right-hand side b = [w; r/√λ] only Aᵀ b and b/‖b‖² enter. Written with those,
  nothing is divided by λ, and r with λ = 0 is the limit ‖b‖ → ∞ of the same iteration;
* everything is in units of the right-hand side. An α or β that round-off cannot tell
  from zero is zero, and the iteration ends where ζ̄ is no more than Aᵀ(w - A x) rounds
  (the second stopping rule of the paper): noise divided by a small λ would follow;
* the residual is computed at the end, not only estimated. Where it misses a tolerance
  that the estimate meets, the iteration begins again from it, while that helps.

Knows vectors, not models.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.solvers import basis
from ngd_jax.solvers.interface import SolverInfo, SolverStatus
from ngd_jax.types import Array, ArrayLike, MatVec, PyTree

__all__ = ["LeastSquares", "Limits", "solve"]

_RUNNING = -1
# Times ε (‖g‖ + ‖A‖‖w‖): what two ways to compute one gradient may differ by.
_TWO_WAYS = 16.0
# Times ε ‖A‖: what a product with a vector of length one rounds.
_ROUND_OFF = 8.0


class LeastSquares(NamedTuple):
    """The problem, on trees float32 or wider. One of w and g may be None.

    Attributes:
      matvec, rmatvec: A and Aᵀ.
      w: the right-hand side as far as it is known in the range of A.
      g: the right-hand side of the normal equations; None for Aᵀ w.
      damping: λ.
      precision: ε of the narrowest dtype in which A is computed.
    """

    matvec: MatVec
    rmatvec: MatVec
    w: PyTree | None
    g: PyTree | None
    damping: ArrayLike
    precision: float


class Limits(NamedTuple):
    """When to stop, and what to spend; Python numbers. See `lsmr`."""

    max_steps: int
    rtol: float
    reorthogonalize: bool


class _Problem(NamedTuple):
    """`LeastSquares` packed, in units in which the largest entry of (w, g) is 1.

    `dropped` is what is left out of r as round-off, but not out of the report: `g_norm`
    is ‖Aᵀ w + r + dropped‖. The estimate ends at `target`, which may be below what
    round-off lets the computed residual reach; that is held against `tolerance`.
    """

    matvec: MatVec
    rmatvec: MatVec
    w: PyTree
    r: PyTree
    dropped: PyTree
    damping: Array
    g_norm: Array
    target: Array
    tolerance: Array
    eps: float
    precision: float
    limits: Limits


class _State(NamedTuple):
    """The loop's carry.

    `x`, `h` and `h_bar` are pairs (x, A x), and h is still without its v. `u` is a pair
    (in the rows of A, in those of √λ I), `coupling` the α of the next u, `basis` every
    v so far or (), `spread` the largest ρ seen, a lower bound of ‖A‖, `noise` what the
    gradient at x rounds, `residual` the true ‖g - (AᵀA + λI) x‖ when the iteration last
    began.
    """

    x: tuple[PyTree, PyTree]
    u: tuple[PyTree, PyTree]
    v: PyTree
    h: tuple[PyTree, PyTree]
    h_bar: tuple[PyTree, PyTree]
    basis: PyTree
    coupling: Array
    alpha_bar: Array
    zeta_bar: Array
    rho: Array
    rho_bar: Array
    c_bar: Array
    s_bar: Array
    spread: Array
    noise: Array
    residual: Array
    num_steps: Array
    status: Array


def solve(
    system: LeastSquares, limits: Limits, x0: PyTree | None = None
) -> tuple[PyTree, SolverInfo]:
    """Solves the problem.

    Args:
      system: the problem.
      limits: when to stop.
      x0: a first guess. Its best multiple ⟨x0, g⟩ / ⟨x0, (AᵀA + λI) x0⟩ is what is
        started from, so that a poor one is never worse than zero.

    Returns:
      x like g, float32 or wider, always finite; and the report.
    """
    problem, gradient, unpack, largest = _prepare(system, limits)
    zeros = optax.tree.zeros_like(gradient)
    g_norm = problem.g_norm
    is_solved = g_norm == 0
    finite = jnp.isfinite(largest) & jnp.isfinite(g_norm + problem.damping)
    if x0 is None:
        start = (zeros, optax.tree.zeros_like(problem.w))
        state = _begin(problem, start, problem.w, problem.r, gradient, None)
    else:
        # The guess has units of its own, since its best multiple is what counts.
        guess = tree.pack(tree.widen(x0))[0]
        largest_guess = tree.max_abs(guess)
        finite &= jnp.isfinite(largest_guess)
        guess = tree.divide(guess, tree.usable_unit(largest_guess))
        guess = tree.select(finite & ~is_solved, guess, zeros)
        state = _restart(problem, guess, None)
        is_solved |= state.residual <= problem.tolerance
    status = jnp.select(
        [~finite, is_solved],
        [SolverStatus.NON_FINITE, SolverStatus.CONVERGED],
        _RUNNING,
    )
    state = jax.lax.while_loop(
        lambda state: state.status == _RUNNING,
        functools.partial(_attempt, problem),
        state._replace(status=status.astype(jnp.int32)),
    )

    unit = tree.usable_unit(largest)
    is_sound = finite & jnp.isfinite(tree.max_abs(state.x[0]) * unit)
    solution = tree.select(is_sound, tree.scale(unit, state.x[0]), zeros)
    relative = jnp.where(is_sound, state.residual * _inverse(g_norm), 1.0)
    status = jnp.where(is_sound, state.status, SolverStatus.NON_FINITE)
    return unpack(solution), SolverInfo(
        num_steps=state.num_steps,
        relative_residual=relative.astype(g_norm.dtype),
        status=status.astype(jnp.int32),
    )


def _prepare(
    system: LeastSquares, limits: Limits
) -> tuple[_Problem, PyTree, Callable[[PyTree], PyTree], Array]:
    """Packs and scales; also Aᵀ w + r, the way back, and the largest entry of (w, g).

    The squares of the entries themselves could over- or underflow.
    """
    matvec, rmatvec, w, g, damping, precision = system
    like = jax.eval_shape(rmatvec, w) if g is None else g
    zeros, unpack = tree.pack(optax.tree.zeros_like(like))
    no_w, unpack_w = tree.pack(optax.tree.zeros_like(jax.eval_shape(matvec, like)))
    dtype = tree.accumulator_dtype((zeros, no_w))

    def push(v: PyTree) -> PyTree:
        return tree.pack(tree.widen(matvec(unpack(v))))[0]

    def pull(u: PyTree) -> PyTree:
        return tree.pack(tree.widen(rmatvec(unpack_w(u))))[0]

    largest = tree.max_abs((w, g)).astype(dtype)
    unit = tree.usable_unit(largest)
    w = None if w is None else tree.divide(tree.pack(w)[0], unit)
    g = None if g is None else tree.divide(tree.pack(g)[0], unit)
    eps = float(jnp.finfo(dtype).eps)
    precision = max(eps, precision)
    dropped = zeros
    if w is None:
        w, r, gradient = no_w, g, g
    elif g is None:
        r, gradient = zeros, pull(w)
    else:
        gradient = pull(w)
        rest = tree.axpy(-1.0, gradient, g)
        is_round_off = _is_round_off(rest, g, w, push, precision)
        r = tree.select(is_round_off, zeros, rest)
        dropped = tree.select(is_round_off, rest, zeros)
        gradient = tree.select(is_round_off, gradient, g)
    g_norm = tree.norm(tree.axpy(1.0, dropped, gradient)).astype(dtype)
    problem = _Problem(
        matvec=push,
        rmatvec=pull,
        w=w,
        r=r,
        dropped=dropped,
        damping=jnp.asarray(damping).astype(dtype),
        g_norm=g_norm,
        target=limits.rtol * g_norm,
        tolerance=max(limits.rtol, eps) * g_norm,
        eps=eps,
        precision=precision,
        limits=limits,
    )
    return problem, gradient, unpack, largest


def _is_round_off(
    rest: PyTree, g: PyTree, w: PyTree, push: MatVec, precision: float
) -> Array:
    """Whether ‖g - Aᵀ w‖ ≤ 16 ε (‖g‖ + ‖A‖‖w‖), with ‖A‖ ≈ ‖A g‖/‖g‖.

    What two computations of one gradient may differ by. Kept, it would be solved for,
    with the condition number of F.
    """
    g_norm = tree.norm(g)
    size = g_norm + tree.norm(push(g)) * tree.norm(w) * _inverse(g_norm)
    return tree.norm(rest) <= _TWO_WAYS * precision * size


def _begin(
    problem: _Problem,
    x: tuple[PyTree, PyTree],
    w: PyTree,
    r: PyTree,
    gradient: PyTree,
    last: _State | None,
) -> _State:
    """The start at x, where w, r and `gradient` = Aᵀ w + r are what x leaves of them.

    With b = [w; r/√λ]: u = b/‖b‖², to be coupled by ‖Aᵀ b‖, and ᾱ = ‖Aᵀ b‖/‖b‖.
    """
    damping = problem.damping
    size = tree.norm(gradient)
    w_square, r_square = tree.vdot(w, w), tree.vdot(r, r)
    has_rest = r_square > 0
    # Of λ‖b‖² where there is a rest, else of ‖b‖².
    inverse = _inverse(jnp.where(has_rest, damping * w_square + r_square, w_square))
    weight = jnp.where(has_rest, damping, 1) * inverse
    v = tree.scale(_inverse(size), gradient)
    zero, one = jnp.zeros((), damping.dtype), jnp.ones((), damping.dtype)
    limits = problem.limits
    kept = basis.empty(v, limits.max_steps if limits.reorthogonalize else 0)
    return _State(
        x=x,
        u=(tree.scale(weight, w), tree.scale(_root(damping) * inverse, r)),
        v=v,
        h=optax.tree.zeros_like(x),
        h_bar=optax.tree.zeros_like(x),
        basis=basis.remember(kept, v, 0),
        coupling=size,
        alpha_bar=size * _root(weight),
        zeta_bar=size,
        rho=one,
        rho_bar=one,
        c_bar=one,
        s_bar=zero,
        spread=zero if last is None else last.spread,
        noise=zero,
        residual=tree.norm(tree.axpy(1.0, problem.dropped, gradient)),
        num_steps=jnp.zeros((), jnp.int32) if last is None else last.num_steps,
        status=jnp.asarray(_RUNNING, jnp.int32),
    )


def _restart(problem: _Problem, x: PyTree, last: _State | None) -> _State:
    """Computes what x leaves of the right-hand side, and begins there.

    The first time at the best multiple of x.
    """
    image = problem.matvec(x)
    if last is None:
        square = tree.vdot(image, image) + problem.damping * tree.vdot(x, x)
        product = tree.vdot(image, problem.w) + tree.vdot(x, problem.r)
        multiple = product * _inverse(square)
        x, image = tree.scale(multiple, x), tree.scale(multiple, image)
    w = tree.axpy(-1.0, image, problem.w)
    r = tree.axpy(-problem.damping, x, problem.r)
    gradient = tree.axpy(1.0, problem.rmatvec(w), r)
    return _begin(problem, (x, image), w, r, gradient, last)


def _attempt(problem: _Problem, state: _State) -> _State:
    """Iterates until the estimate is small enough, then looks at the residual."""
    max_steps = problem.limits.max_steps

    def is_going_on(state: _State) -> Array:
        is_wanted = jnp.abs(state.zeta_bar) > jnp.maximum(problem.target, state.noise)
        return (state.status == _RUNNING) & is_wanted & (state.num_steps < max_steps)

    last = jax.lax.while_loop(is_going_on, functools.partial(_step, problem), state)
    new = _restart(problem, last.x[0], last)
    finite = jnp.isfinite(new.residual)
    # No more than what computing it rounds, or no better for having tried.
    size = tree.norm(problem.w) + new.spread * tree.norm(new.x[0])
    is_stuck = new.residual <= 4 * problem.precision * new.spread * size
    is_stuck |= new.residual > 0.5 * state.residual
    status = jnp.select(
        [
            (last.status == SolverStatus.NON_FINITE) | ~finite,
            new.residual <= problem.tolerance,
            last.status == SolverStatus.BREAKDOWN,
            last.num_steps >= max_steps,
            is_stuck,
        ],
        [
            SolverStatus.NON_FINITE,
            SolverStatus.CONVERGED,
            SolverStatus.BREAKDOWN,
            SolverStatus.MAX_STEPS,
            SolverStatus.STAGNATED,
        ],
        _RUNNING,
    )
    return new._replace(
        residual=jnp.where(finite, new.residual, jnp.abs(last.zeta_bar)),
        status=status.astype(jnp.int32),
    )


def _step(problem: _Problem, state: _State) -> _State:
    root = _root(problem.damping)

    def relevant(size: Array) -> Array:
        return jnp.where(size <= _ROUND_OFF * problem.eps * state.spread, 0, size)

    # 1. The bidiagonalisation.
    image = problem.matvec(state.v)
    u = (
        tree.axpy(-state.coupling, state.u[0], image),
        tree.axpy(-state.coupling, state.u[1], tree.scale(root, state.v)),
    )
    beta = relevant(tree.norm(u))
    u = tree.scale(_inverse(beta), u)
    v = tree.axpy(root, u[1], problem.rmatvec(u[0]))
    v = basis.project_out(state.basis, tree.axpy(-beta, state.v, v))
    alpha = relevant(tree.norm(v))
    v = tree.scale(_inverse(alpha), v)

    # 2. The rotations.
    c, s, rho = _rotation(state.alpha_bar, beta)
    theta = s * alpha
    theta_bar = state.s_bar * rho
    c_bar, s_bar, rho_bar = _rotation(state.c_bar * rho, theta)

    # 3. The update, unless round-off cannot tell A from singular in its direction.
    spread = jnp.maximum(state.spread, rho)
    finite = jnp.isfinite(rho) & jnp.isfinite(rho_bar)
    failed = ~(jnp.minimum(rho, rho_bar) > problem.eps * spread)
    h = tree.axpy(1.0, state.h, (state.v, image))
    factor = theta_bar * rho / (state.rho * state.rho_bar)
    h_bar = tree.axpy(-jnp.where(failed, 0, factor), state.h_bar, h)
    length = c_bar * state.zeta_bar * _inverse(rho) * _inverse(rho_bar)
    x = tree.axpy(jnp.where(failed, 0, length), h_bar, state.x)
    outside = tree.norm(tree.axpy(-1.0, x[1], problem.w))
    rest = tree.norm(tree.axpy(-problem.damping, x[0], problem.r))
    noise = problem.eps * (spread * outside + rest)
    num_steps = state.num_steps + jnp.where(failed, 0, 1).astype(jnp.int32)
    status = jnp.select(
        [~finite, failed],
        [SolverStatus.NON_FINITE, SolverStatus.BREAKDOWN],
        _RUNNING,
    )
    return _State(
        x=x,
        u=u,
        v=v,
        h=tree.scale(-theta * _inverse(rho), h),
        h_bar=h_bar,
        basis=basis.remember(state.basis, v, num_steps),
        coupling=alpha,
        alpha_bar=c * alpha,
        zeta_bar=jnp.where(failed, state.zeta_bar, -s_bar * state.zeta_bar),
        rho=rho,
        rho_bar=rho_bar,
        c_bar=c_bar,
        s_bar=s_bar,
        spread=jnp.where(failed, state.spread, spread),
        noise=noise,
        residual=state.residual,
        num_steps=num_steps,
        status=status.astype(jnp.int32),
    )


# --- Numbers whose derivatives stay finite where they are zero.


def _root(square: Array) -> Array:
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def _inverse(number: Array) -> Array:
    """1 / number, and 0 for 0."""
    is_zero = number == 0
    return jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, number))


def _rotation(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """(c, s, r) with c a + s b = r ≥ 0 and s a - c b = 0."""
    r = _root(a**2 + b**2)
    return a * _inverse(r), b * _inverse(r), r
