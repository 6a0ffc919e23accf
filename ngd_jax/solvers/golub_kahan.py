"""The iteration of LSMR: least squares by the bidiagonalisation of Golub and Kahan.

    min ‖Â x - b‖²,  Â = [A; √λ I],  b = [w; r/√λ],    normal equations Âᵀ Â x = g
    βₖ₊₁ uₖ₊₁ = Â vₖ - αₖ uₖ,    αₖ₊₁ vₖ₊₁ = Âᵀ uₖ₊₁ - βₖ₊₁ vₖ,    g = Âᵀ b = Aᵀ w + r

The names and the numbered steps are those of Fong and Saunders 2011, section 2.7. With
Uₖ, Vₖ the vectors so far and Bₖ the lower bidiagonal matrix of α and β, the recurrences
say Â Vₖ = Uₖ₊₁ Bₖ. For x = Vₖ y, LSMR minimises the residual of the normal equations,

    ‖Âᵀ(b - Â x)‖ = ‖α₁β₁ e₁ - [Bₖᵀ Bₖ; αₖ₊₁βₖ₊₁ eₖᵀ] y‖,

by two sequences of plane rotations: the Pₖ take Bₖ to an upper bidiagonal Rₖ, with ρ on
and θ above its diagonal, and since Bₖᵀ Bₖ = Rₖᵀ Rₖ, a second sequence P̄ₖ takes Rₖᵀ with
the last row to an upper bidiagonal R̄ₖ, with ρ̄ and θ̄. What the P̄ₖ leave of α₁β₁ e₁
below is one number, ζ̄: the minimum. So ‖Âᵀ(b - Â x)‖ is known without computing it, and
never grows. x is updated along h̄, the columns of Vₖ Rₖ⁻¹ R̄ₖ⁻¹ up to factors.

Differences from the paper, and why:

* b enters only through g and b/‖b‖². Written with those, nothing is divided by λ, and r
  with λ = 0 is the limit ‖b‖ → ∞ of the same iteration.
* An α or β that round-off cannot tell from zero is zero, and the iteration ends when ζ̄
  is no more than the round-off of Aᵀ(w - A x) (the second stopping rule of the paper).
  Otherwise noise divided by a small λ would follow.
* The residual is computed at the end, not only estimated. If it misses a tolerance that
  the estimate meets, the iteration begins again from it, as long as that helps.

Knows vectors, not models.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.solvers.protocol import SolverInfo, SolverStatus, first_cause
from ngd_jax.types import Array, MatVec, PyTree

__all__ = ["LeastSquares", "inverse", "solve"]

_RUNNING = -1
# A product with a vector of length one rounds by this many ε ‖A‖.
_ROUND_OFF = 8.0


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """The problem, on trees that are float32 or wider, and its budget.

    Attributes:
      matvec, rmatvec: A and Aᵀ.
      w, r: see above.
      dropped: a part of g that is not solved for, but counts in the report; like r.
      damping: λ.
      precision: ε of the narrowest dtype in which A is computed.
      limits: `max_steps`, `rtol` and `reorthogonalize`; see `lsmr`.
    """

    matvec: MatVec
    rmatvec: MatVec
    w: PyTree
    r: PyTree
    dropped: PyTree
    damping: Array
    precision: float
    limits: Any

    def packed(self) -> "LeastSquares":
        """The same problem on packed trees."""
        w, unpack_w = tree.pack(self.w)
        r, unpack = tree.pack(self.r)
        dtype = tree.accumulator_dtype((w, r))
        return dataclasses.replace(
            self,
            matvec=lambda v: tree.pack(tree.widen(self.matvec(unpack(v))))[0],
            rmatvec=lambda u: tree.pack(tree.widen(self.rmatvec(unpack_w(u))))[0],
            w=w,
            r=r,
            dropped=tree.pack(self.dropped)[0],
            damping=self.damping.astype(dtype),
            precision=max(self.precision, float(jnp.finfo(dtype).eps)),
        )


class _State(NamedTuple):
    """The loop's carry, before step k.

    Attributes:
      x, h, h_bar: pairs of a vector and A times it: xₖ₋₁, h̄ₖ₋₁, and hₖ without its vₖ.
      u: αₖ uₖ, as a pair: in the rows of A, and in those of √λ I.
      v: vₖ.
      basis: all v so far, with a leading axis; of length 0 if they are not kept.
      alpha_bar, zeta_bar, rho, rho_bar, c_bar, s_bar: as in the paper.
      spread: the largest ρ so far, a lower bound of ‖A‖.
      noise: the round-off of computing the residual of the normal equations at x.
      residual: the true one, ‖g - (AᵀA + λI) x‖, when the iteration last began.
      num_steps: steps so far, in all attempts.
      status: a `SolverStatus`, or _RUNNING.
    """

    x: tuple[PyTree, PyTree]
    h: tuple[PyTree, PyTree]
    h_bar: tuple[PyTree, PyTree]
    u: tuple[PyTree, PyTree]
    v: PyTree
    basis: PyTree
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
    system: LeastSquares, gradient: PyTree, guess: PyTree | None = None
) -> tuple[PyTree, SolverInfo]:
    """Solves the problem; everything must be finite, and its squares too.

    Args:
      system: the problem.
      gradient: Aᵀ w + r.
      guess: the solve starts from its best multiple, ⟨x₀, g⟩ / ⟨x₀, (AᵀA + λI) x₀⟩, so
        that a poor one is never worse than zero.

    Returns:
      x like r, finite unless it overflows; and the report.
    """
    _, unpack = tree.pack(system.r)
    gradient = tree.pack(gradient)[0]
    system = system.packed()
    zeros = jax.tree.map(jnp.zeros_like, (gradient, system.w))
    g_norm = tree.norm(tree.axpy(1.0, system.dropped, gradient))
    # The estimate goes down to `target`, which may be below what round-off allows for
    # the computed residual; the latter is compared with `tolerance`.
    rtol = system.limits.rtol
    target = rtol * g_norm
    tolerance = max(rtol, float(jnp.finfo(g_norm.dtype).eps)) * g_norm
    if guess is None:
        state = _begin(system, zeros, system.w, system.r, gradient, None)
        is_solved = g_norm == 0
    else:
        state = _restart(system, tree.pack(tree.widen(guess))[0], None)
        is_solved = state.residual <= tolerance
    status = jnp.where(is_solved, SolverStatus.CONVERGED, _RUNNING)
    state = jax.lax.while_loop(
        lambda state: state.status == _RUNNING,
        functools.partial(_attempt, system, target, tolerance),
        state._replace(status=status.astype(jnp.int32)),
    )
    info = SolverInfo(state.num_steps, state.residual * inverse(g_norm), state.status)
    return unpack(state.x[0]), info


def _begin(
    system: LeastSquares,
    x: tuple[PyTree, PyTree],
    w: PyTree,
    r: PyTree,
    gradient: PyTree,
    last: _State | None,
) -> _State:
    """Step 1: the start at x, if x leaves w, r and `gradient` = Aᵀ w + r to solve for.

    β₁ u₁ = b and α₁ v₁ = Âᵀ u₁ = g/β₁. So v₁ = g/‖g‖, α₁β₁ = ‖g‖, α₁ = ‖g‖/‖b‖, and
    the next step subtracts α₁ u₁ = ‖g‖ b/‖b‖², where ‖b‖² = ‖w‖² + ‖r‖²/λ. Times λ,
    unless r is zero, so that λ = 0 is allowed:

        1/‖b‖² = λ/(λ‖w‖² + ‖r‖²),    b/‖b‖² = [λ w; √λ r]/(λ‖w‖² + ‖r‖²)
    """
    damping = system.damping
    size = tree.norm(gradient)
    w_square, r_square = tree.vdot(w, w), tree.vdot(r, r)
    factor = jnp.where(r_square > 0, damping, 1)
    scale = size * inverse(factor * w_square + r_square)
    v = tree.scale(inverse(size), gradient)
    zero, one = jnp.zeros_like(size), jnp.ones_like(size)
    zeros = jax.tree.map(jnp.zeros_like, x)
    rows = system.limits.max_steps if system.limits.reorthogonalize else 0
    basis = jax.tree.map(
        lambda leaf: jnp.broadcast_to(jnp.zeros_like(leaf)[None], (rows, *leaf.shape)),
        v,
    )
    return _State(
        x=x,
        h=zeros,
        h_bar=zeros,
        u=(tree.scale(factor * scale, w), tree.scale(_root(damping) * scale, r)),
        v=v,
        basis=_remember(basis, v, 0),
        alpha_bar=_root(size * factor * scale),
        zeta_bar=size,
        rho=one,
        rho_bar=one,
        c_bar=one,
        s_bar=zero,
        spread=zero if last is None else last.spread,
        noise=zero,
        residual=tree.norm(tree.axpy(1.0, system.dropped, gradient)),
        num_steps=jnp.zeros((), jnp.int32) if last is None else last.num_steps,
        status=jnp.asarray(_RUNNING, jnp.int32),
    )


def _restart(system: LeastSquares, x: PyTree, last: _State | None) -> _State:
    """Computes the right-hand side that x leaves, and begins there.

    The first time, it begins at the best multiple of x.
    """
    pushed = system.matvec(x)
    if last is None:
        square = tree.vdot(pushed, pushed) + system.damping * tree.vdot(x, x)
        product = tree.vdot(pushed, system.w) + tree.vdot(x, system.r)
        x, pushed = tree.scale(product * inverse(square), (x, pushed))
    w = tree.axpy(-1.0, pushed, system.w)
    r = tree.axpy(-system.damping, x, system.r)
    gradient = tree.axpy(1.0, system.rmatvec(w), r)
    return _begin(system, (x, pushed), w, r, gradient, last)


def _attempt(
    system: LeastSquares, target: Array, tolerance: Array, state: _State
) -> _State:
    """Iterates until the estimate is small enough, then looks at the residual."""
    max_steps = system.limits.max_steps

    def is_going_on(state: _State) -> Array:
        is_wanted = jnp.abs(state.zeta_bar) > jnp.maximum(target, state.noise)
        return (state.status == _RUNNING) & is_wanted & (state.num_steps < max_steps)

    last = jax.lax.while_loop(is_going_on, functools.partial(_step, system), state)
    new = _restart(system, last.x[0], last)
    is_finite = jnp.isfinite(new.residual)
    # No more than its own round-off, or no better after another attempt.
    size = tree.norm(system.w) + new.spread * tree.norm(new.x[0])
    is_stuck = new.residual <= 4 * system.precision * new.spread * size
    is_stuck |= new.residual > 0.5 * state.residual
    has_overflowed = (last.status == SolverStatus.NON_FINITE) | ~is_finite
    status = first_cause(
        (has_overflowed, SolverStatus.NON_FINITE),
        (new.residual <= tolerance, SolverStatus.CONVERGED),
        (last.status == SolverStatus.BREAKDOWN, SolverStatus.BREAKDOWN),
        (last.num_steps >= max_steps, SolverStatus.MAX_STEPS),
        (is_stuck, SolverStatus.STAGNATED),
        otherwise=_RUNNING,
    )
    return new._replace(
        residual=jnp.where(is_finite, new.residual, jnp.abs(last.zeta_bar)),
        status=status,
    )


def _step(system: LeastSquares, state: _State) -> _State:
    """Steps 2 to 6 of the paper, for one k. Names without an index are those of k."""
    eps = float(jnp.finfo(state.rho.dtype).eps)
    root = _root(system.damping)

    def relevant(size: Array) -> Array:
        return jnp.where(size <= _ROUND_OFF * eps * state.spread, 0, size)

    # 3. Continue the bidiagonalisation: βₖ₊₁ uₖ₊₁ = Â vₖ - αₖ uₖ, and
    #    αₖ₊₁ vₖ₊₁ = Âᵀ uₖ₊₁ - βₖ₊₁ vₖ.
    pushed = system.matvec(state.v)
    u = tree.axpy(-1.0, state.u, (pushed, tree.scale(root, state.v)))
    beta = relevant(tree.norm(u))
    u = tree.scale(inverse(beta), u)
    v = tree.axpy(root, u[1], system.rmatvec(u[0]))
    v = _project_out(state.basis, tree.axpy(-beta, state.v, v))
    alpha = relevant(tree.norm(v))
    v = tree.scale(inverse(alpha), v)

    # 4. The rotation Pₖ of rows k and k + 1 of Bₖ: (ᾱₖ, βₖ₊₁) -> (ρₖ, 0) makes the next
    #    element of the upper diagonal θₖ₊₁ = sₖ αₖ₊₁, and ᾱₖ₊₁ = cₖ αₖ₊₁.
    c, s, rho = _rotation(state.alpha_bar, beta)
    theta = s * alpha

    # 5. The rotation P̄ₖ of the same rows of Rₖᵀ: (c̄ₖ₋₁ρₖ, θₖ₊₁) -> (ρ̄ₖ, 0), with
    #    θ̄ₖ = s̄ₖ₋₁ρₖ above; of the right-hand side, ζₖ = c̄ₖζ̄ₖ, and ζ̄ₖ₊₁ = -s̄ₖζ̄ₖ is left.
    theta_bar = state.s_bar * rho
    c_bar, s_bar, rho_bar = _rotation(state.c_bar * rho, theta)
    zeta = c_bar * state.zeta_bar

    # 6. Update h̄ₖ = hₖ - (θ̄ₖρₖ/(ρₖ₋₁ρ̄ₖ₋₁)) h̄ₖ₋₁, xₖ = xₖ₋₁ + (ζₖ/(ρₖρ̄ₖ)) h̄ₖ and
    #    hₖ₊₁ = vₖ₊₁ - (θₖ₊₁/ρₖ) hₖ, unless round-off cannot tell Â from singular in
    #    this direction. A times each comes along, since A vₖ is known.
    spread = jnp.maximum(state.spread, rho)
    is_finite = jnp.isfinite(rho) & jnp.isfinite(rho_bar)
    failed = ~(jnp.minimum(rho, rho_bar) > eps * spread)
    factor = theta_bar * rho / (state.rho * state.rho_bar)
    length = zeta * inverse(rho) * inverse(rho_bar)
    h = tree.axpy(1.0, state.h, (state.v, pushed))
    h_bar = tree.axpy(-jnp.where(failed, 0, factor), state.h_bar, h)
    x = tree.axpy(jnp.where(failed, 0, length), h_bar, state.x)

    # The round-off in the residual of the normal equations at x.
    outside = tree.norm(tree.axpy(-1.0, x[1], system.w))
    rest = tree.norm(tree.axpy(-system.damping, x[0], system.r))
    num_steps = state.num_steps + (~failed).astype(jnp.int32)
    status = jnp.where(failed, SolverStatus.BREAKDOWN, _RUNNING)
    status = jnp.where(is_finite, status, SolverStatus.NON_FINITE)
    return _State(
        x=x,
        h=tree.scale(-theta * inverse(rho), h),
        h_bar=h_bar,
        u=tree.scale(alpha, u),
        v=v,
        basis=_remember(state.basis, v, num_steps),
        alpha_bar=c * alpha,
        zeta_bar=jnp.where(failed, state.zeta_bar, -s_bar * state.zeta_bar),
        rho=rho,
        rho_bar=rho_bar,
        c_bar=c_bar,
        s_bar=s_bar,
        spread=jnp.where(failed, state.spread, spread),
        noise=eps * (spread * outside + rest),
        residual=state.residual,
        num_steps=num_steps,
        status=status.astype(jnp.int32),
    )


# --- The v so far. The short recurrences lose the orthogonality that they have on paper
# as soon as a singular value is found, and then find it again and again.


def _remember(basis: PyTree, v: PyTree, index: int | Array) -> PyTree:
    """Writes a vector into place `index`, if there is such a place."""

    def write(rows: Array, leaf: Array) -> Array:
        return rows.at[index].set(leaf) if len(rows) else rows

    return jax.tree.map(write, basis, v)


def _project_out(basis: PyTree, v: PyTree) -> PyTree:
    """Subtracts Σ q Re⟨q, v⟩ over the vectors q of the basis, twice.

    A single pass leaves errors from cancellation, and the basis would lose its
    orthogonality faster than without it; two are enough (Kahan, in Parlett 1980,
    section 6-9).
    """
    for _ in range(2):
        products = jnp.zeros(())
        for rows, x in zip(*map(jax.tree.leaves, (basis, v)), strict=True):
            axes = range(x.ndim)
            product = tree.contract(jnp.conj(rows), x, [i + 1 for i in axes], axes)
            products = products + jnp.real(product)
        v = jax.tree.map(
            lambda rows, x, c=products: (
                x - tree.contract(c.astype(rows.dtype), rows, [0], [0])
            ),
            basis,
            v,
        )
    return v


# --- Numbers whose derivatives stay finite where they are zero.


def inverse(number: Array) -> Array:
    """1 / number, and 0 for 0."""
    is_zero = number == 0
    return jnp.where(is_zero, 0, 1 / jnp.where(is_zero, 1, number))


def _root(square: Array) -> Array:
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def _rotation(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """(c, s, r) with c a + s b = r ≥ 0 and s a - c b = 0."""
    r = _root(a**2 + b**2)
    return a * inverse(r), b * inverse(r), r
