"""Damping found by the loss itself, along paths bent by the model's second derivative.

    A = U σ Vᵀ,    v = (F + λI)⁻¹ g,    q = (F + λI)⁻¹ Jᵀ H ∂²outputs[v, v]
    d = s v + ½ s² q    of the λ and s with the least  f(θ - d) λ^power

One factorisation of the square root A of F, F = Aᵀ A, serves all λ, and a trial costs
one pass through the model: to weigh a dozen of them is cheaper than one more step.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.fisher import average, root
from ngd_jax.fisher.coefficients import ravel_real
from ngd_jax.solvers.interface import (
    SolverInfo,
    SolverStatus,
    StatefulSolver,
    check_system,
    forward_only,
)
from ngd_jax.solvers.singular_values import SingularRoot, decompose, negligible
from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = ["DampingSearch", "DampingSearchState"]

# Rounds of trials, each at larger λ than the last, before a step is given up.
_MAX_ROUNDS = 6


class DampingSearchState(NamedTuple):
    """What the next search starts from.

    Attributes:
      damping: λ of the last step, in units of F; 0 before the first.
      lowest: the lowest loss so far.
    """

    damping: Array
    lowest: Array


@dataclasses.dataclass(frozen=True)
class DampingSearch(StatefulSolver):
    """Levenberg-Marquardt with many λ at once: for residuals that shall vanish.

    For each λ in `factors` times that of the last step, and each length s in `lengths`,
    the loss after the step θ - d is measured, with

        d = s v + ½ s² q,    (F + λI) v = g,    (F + λI) q = Jᵀ H ∂²outputs[v, v],

    v the damped natural gradient and q what keeps the outputs on the straight line that
    v sends them along, up to third order. Of the trials that lower the loss f, or keep
    it below `slack` times the lowest so far, the one with the least f λ^`power` is
    taken; where there is none, λ is multiplied and it is tried again.

    With `power` = 0 the greatest reduction wins, and the search settles into the first
    narrow valley, at a λ where it no longer moves. The power pays for small λ, of which
    come the directions that only a nearly singular F can tell apart, down to residuals
    at round-off. A slack above 1 lets the loss rise on the way: it may end lower from
    parameters of which little can be told apart at first, and else costs steps.

    Dense, by singular values as in `SVD`: O(M P²) operations and M·P memory for M real
    outputs of all examples and P parameters. The loss must be positive and tend to
    zero: ½ mean r² with `Gaussian`, or the like.

    Attributes:
      power: what a factor of λ is worth in factors of the loss, at least 0.
      slack: at least 1, and 1 in float32, whose round-off small λ would amplify, and
        where the loss can vanish between the points that it is taken at.
      factors: λ to try, in units of the last one, in rising order.
      lengths: s to try, positive.
      max_curvature: q is left out where |s q| is above this times |v|: there the path
        bends more than its second derivative can tell; 0 leaves it out always.
      initial: λ of the first search, in units of the largest eigenvalue of F.

    `damping` of `solve` is the least λ; below (ε max σ)², which nothing can tell from
    zero, none is tried either way.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> model_fn = lambda w, x: jnp.tanh(x @ w)
      >>> tx = ngd.natural_gradient(
      ...     1.0,
      ...     model_fn,
      ...     ngd.Gaussian(),
      ...     damping=0.0,
      ...     solver=ngd.DampingSearch(),
      ...     output_loss_fn=lambda outputs, batch: (outputs**2).mean() / 2,
      ... )

    References:
      Marquardt, An algorithm for least-squares estimation of nonlinear parameters,
      1963 (several λ in each step); Transtrum and Sethna, Improvements to the
      Levenberg-Marquardt algorithm for nonlinear least-squares minimization, 2012,
      section 3 (q, the geodesic acceleration, and the bound on it).

    Note:
      In `SolverInfo`, `num_steps` counts rounds of trials, and `relative_residual` is
      ‖g - F d‖ / ‖g‖: what damping, length and bending together leave of an undamped
      step. Forward-mode differentiable, not reverse-mode.
    """

    power: float = 0.4
    slack: float = 1.0
    factors: tuple[float, ...] = (1 / 27, 1 / 3, 1.0, 9.0)
    lengths: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    max_curvature: float = 0.75
    initial: float = 1e-2

    uses_coefficients: ClassVar[bool] = True
    uses_objective: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("power", "max_curvature"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be at least 0, got {value}.")
        if not 1 <= self.slack < math.inf:
            raise ValueError(f"`slack` must be at least 1, got {self.slack}.")
        for name in ("factors", "lengths"):
            values = getattr(self, name)
            if not values or not all(x > 0 and math.isfinite(x) for x in values):
                raise ValueError(f"`{name}` must be positive numbers, got {values}.")
        if list(self.factors) != sorted(self.factors) or self.factors[-1] <= 1:
            raise ValueError(
                f"`factors` must rise, to more than 1, so that λ can grow where no "
                f"trial lowers the loss; got {self.factors}."
            )
        if not (self.initial > 0 and math.isfinite(self.initial)):
            raise ValueError(f"`initial` must be positive, got {self.initial}.")

    def init(self, params: PyTree) -> DampingSearchState:
        """No λ yet."""
        dtype = tree.accumulator_dtype(params)
        return DampingSearchState(jnp.zeros((), dtype), jnp.asarray(jnp.inf, dtype))

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
        """Searches for d; see `StatefulSolver`. No use for `x0`.

        Raises:
          ValueError: without an `objective`; on `coefficients` unlike what
            `fisher.sqrt_matvec` returns.
        """
        check_system(rhs, damping, x0)
        if objective is None:
            raise ValueError(
                "DampingSearch needs the loss: give `output_loss_fn` to "
                "natural_gradient, or call tx.update(..., value_fn=value_fn) with "
                "value_fn(params, batch); outside of it, call solver.solve(..., "
                "objective=objective) with objective(d) the loss after a step of -d."
            )
        g, unravel = ravel_real(tree.widen(rhs))
        system = _make_system(fisher, rhs, g, coefficients)
        # Below the square of round-off no λ can be told from zero.
        largest = jnp.max(system.root.values, initial=0.0)
        eps = float(jnp.finfo(g.dtype).eps)
        least = jnp.maximum(jnp.asarray(damping, g.dtype), (eps * largest) ** 2)
        known = state or self.init(rhs)
        first = self.initial * largest**2
        last = jnp.where(known.damping > 0, known.damping.astype(g.dtype), first)

        def loss_of(d: Array) -> Scalar:
            return objective(optax.tree.cast_like(unravel(d), tree.widen(rhs)))

        before = loss_of(jnp.zeros_like(g))
        lowest = jnp.minimum(before, known.lowest.astype(before.dtype))
        # On another batch even the loss as it is may be above the slack.
        highest = jnp.maximum(before, self.slack * lowest)
        search = self._search(system, loss_of, highest, last, least)
        left = g - system.matrix.T @ (system.matrix @ search.d)
        norm = jnp.linalg.norm(g)
        is_zero = system.is_finite & (norm == 0)
        status = jnp.select(
            [~system.is_finite, search.found | is_zero],
            [SolverStatus.NON_FINITE, SolverStatus.CONVERGED],
            SolverStatus.STAGNATED,
        )
        relative = jnp.linalg.norm(left) / jnp.where(norm > 0, norm, 1.0)
        info = SolverInfo(
            num_steps=search.num_rounds,
            relative_residual=jnp.where(search.found, relative, jnp.sign(norm)),
            status=status.astype(jnp.int32),
        )
        if state:
            state = DampingSearchState(
                damping=jnp.where(search.found, search.damping, state.damping),
                lowest=jnp.where(jnp.isfinite(lowest), lowest, state.lowest),
            )
            state = optax.tree.cast_like(state, known)
        solution = optax.tree.cast_like(unravel(search.d), rhs)
        return forward_only(solution, what="DampingSearch"), info, state

    def _search(
        self,
        system: "_System",
        loss_of: Callable[[Array], Scalar],
        highest: Scalar,
        last: Scalar,
        least: Scalar,
    ) -> "_Search":
        factors = jnp.asarray(self.factors, last.dtype)

        def trial(damping: Scalar) -> tuple[Array, Array]:
            steps = system.path(damping, self.lengths, self.max_curvature)
            return steps, jax.vmap(loss_of)(steps)

        def round_of_trials(search: _Search) -> _Search:
            dampings = jnp.maximum(search.damping * factors, least)
            steps, losses = jax.lax.map(trial, dampings)
            # Written so that NaN fails; a loss below zero has no logarithm.
            is_low = (losses < highest) & (losses >= 0)
            worth = jnp.log(jnp.where(is_low, losses / highest, 1.0))
            worth += (self.power * jnp.log(dampings))[:, None]
            worth = jnp.where(is_low, worth, jnp.inf)
            best = jnp.unravel_index(jnp.argmin(worth), worth.shape)
            found = is_low[best]
            more = search.damping * self.factors[-1] / self.factors[0]
            return _Search(
                d=jnp.where(found, steps[best], 0.0),
                damping=jnp.where(found, dampings[best[0]], more),
                found=found,
                num_rounds=search.num_rounds + 1,
            )

        def running(search: _Search) -> Array:
            return ~search.found & (search.num_rounds < _MAX_ROUNDS)

        start = _Search(
            d=jnp.zeros_like(system.rest),
            damping=last,
            found=~system.is_finite,
            num_rounds=jnp.zeros((), jnp.int32),
        )
        search = jax.lax.while_loop(running, round_of_trials, start)
        return search._replace(found=search.found & system.is_finite)


class _Search(NamedTuple):
    """The step found so far, its λ or the next one to try, and how it goes."""

    d: Array
    damping: Array
    found: Array
    num_rounds: Array


class _System(NamedTuple):
    """The systems (F + λI) v = g and (F + λI) q = Aᵀ b(v) for any λ.

    Attributes:
      matrix: A, `[M, P]`.
      root: its singular values.
      rest: g - Aᵀ w, or g where w is not known; zero where that is round-off.
      bend: v -> b, the coefficients of ∂²outputs[v, v].
      is_finite: of all that went in; zeros where it was not.
    """

    matrix: Array
    root: SingularRoot
    rest: Array
    bend: Callable[[Array], Array]
    is_finite: Array

    def path(
        self, damping: Scalar, lengths: tuple[float, ...], max_curvature: float
    ) -> Array:
        """D = s v + ½ s² q for all lengths s, `[len(lengths), P]`."""
        values, rights, image, _ = self.root
        inverse = 1 / (values**2 + damping)
        along = rights @ self.rest
        outside = self.rest - rights.T @ along
        is_nothing = negligible(outside, jnp.linalg.norm(self.rest))
        v = jnp.where(is_nothing, 0.0, outside / damping)
        along = along if image is None else along + values * image
        v += rights.T @ (inverse * along)
        scales = jnp.asarray(lengths, v.dtype)
        if max_curvature == 0:
            return jnp.outer(scales, v)
        q = rights.T @ (inverse * (rights @ (self.matrix.T @ self.bend(v))))
        is_small = scales * jnp.linalg.norm(q) <= max_curvature * jnp.linalg.norm(v)
        return jnp.outer(scales, v) + jnp.outer(is_small * scales**2 / 2, q)


def _make_system(
    fisher: Any, rhs: PyTree, g: Array, coefficients: PyTree | None
) -> _System:
    wide = tree.widen(rhs)
    matrix = fisher.dense_root().astype(g.dtype)
    is_finite = jnp.all(jnp.isfinite(matrix)) & jnp.all(jnp.isfinite(g))
    w = None
    if coefficients is not None:
        like = jax.eval_shape(fisher.sqrt_matvec, wide)
        tree.check_like(coefficients, like, name="coefficients", like_name="A d")
        w = ravel_real(coefficients)[0].astype(g.dtype)
        is_finite &= jnp.all(jnp.isfinite(w))
        w = jnp.where(is_finite, w, 0.0)
    matrix = jnp.where(is_finite, matrix, 0.0)
    decomposed = decompose(matrix, w)
    rest = jnp.where(is_finite, g, 0.0)
    if w is not None:
        largest = jnp.max(decomposed.values, initial=0.0)
        size = jnp.linalg.norm(rest) + largest * jnp.linalg.norm(w)
        rest = rest - matrix.T @ w
        rest = jnp.where(negligible(rest, size), 0.0, rest)
    return _System(matrix, decomposed, rest, _bend(fisher, wide), is_finite)


def _bend(fisher: Any, like: PyTree) -> Callable[[Array], Array]:
    """The coefficients of the outputs' second derivative, as a function of v."""
    unravel = ravel_real(like)[1]
    scores = None
    if fisher.kind != "exact":
        scores = average.score_terms(fisher.likelihood, fisher.outputs, fisher.targets)

    def bend(v: Array) -> Array:
        direction = unravel(v)

        def outputs_at(t: Scalar) -> PyTree:
            moved = tree.axpy(t, direction, tree.widen(fisher.params))
            return fisher.outputs_at(optax.tree.cast_like(moved, fisher.params))

        def slope(t: Scalar) -> PyTree:
            return jax.jvp(outputs_at, (t,), (jnp.ones_like(t),))[1]

        zero = jnp.zeros((), v.dtype)
        second = jax.jvp(slope, (zero,), (jnp.ones_like(zero),))[1]
        bent = root.coefficients_from_tangents(
            fisher.likelihood, fisher.outputs, second, fisher.measure, scores
        )
        return ravel_real(bent)[0].astype(v.dtype)

    return bend
