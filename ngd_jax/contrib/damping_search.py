"""Damping found by the loss itself, along paths bent by the model's second derivative.

    A = U σ Vᵀ,    v = (F + λI)⁻¹ g,    q = (F + λI)⁻¹ Jᵀ H ∂²outputs[v, v]
    d = s v + ½ s² q    of the λ and s with the least  f(θ - d) λ^power / s^length_power

One factorisation of the square root A of F, F = Aᵀ A, serves all λ, or each has a
cheaper one of F + λI. A trial costs one pass through the model: comparing a dozen is
cheaper than one more step.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.contrib.svd import decompose, known_coefficients, negligible
from ngd_jax.coordinates import ravel_real, real_size
from ngd_jax.dense import dense, dense_root, sketched_root
from ngd_jax.metric import check_count
from ngd_jax.per_example import coefficient_shapes
from ngd_jax.solvers.positive_definite import (
    factorise,
    make_positive_definite,
    solve,
    solve_refined,
)
from ngd_jax.solvers.preconditioner import check_key
from ngd_jax.solvers.protocol import (
    RightHandSide,
    Solution,
    Solver,
    SolverInfo,
    SolverStatus,
)
from ngd_jax.types import Array, ArrayLike, KeyArray, PyTree, Scalar

__all__ = ["DampingSearch", "DampingSearchState"]

# Rounds of trials, each at larger λ than the last, before a step is given up.
_MAX_ROUNDS = 6


class DampingSearchState(NamedTuple):
    """Where the next search starts.

    Attributes:
      damping: λ of the last step, in units of F; 0 before the first.
      lowest: the lowest loss so far.
      num_sketches: int32, sketches drawn so far; None without a sketch.
    """

    damping: Array
    lowest: Array
    num_sketches: Array | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class DampingSearch(Solver):
    """Levenberg-Marquardt with many λ at once: for zero-residual problems.

    For each λ in `factors` times that of the last step, and each length s in `lengths`,
    the loss after the step θ - d is measured, with

        d = s v + ½ s² q,    (F + λI) v = g,    (F + λI) q = Jᵀ H ∂²outputs[v, v],

    where v is the damped natural gradient and q keeps the outputs on the straight line
    that v sends them along, up to third order. Of the trials that lower the loss f, or
    keep it below `slack` times the lowest so far, the one with the least
    f λ^power / s^length_power is taken; if there is none, λ is multiplied and the
    search goes into another round.

    With `power` = 0 the greatest reduction wins, and the search settles into the first
    narrow valley, at a λ where it no longer moves. The power rewards small λ, which
    give directions that only a nearly singular F can tell apart, down to residuals at
    round-off. The length in the score keeps λ from falling further, to where only short
    steps lower the loss. A slack above 1 lets the loss rise on the way: it may end
    lower if few of the parameters can be told apart at first, and otherwise costs
    steps.

    By singular values as in `SVD`: O(M P min(M, P)) operations and M·P memory for M
    real outputs of all examples and P parameters. The loss must be positive and tend to
    zero: ½ mean r² with `Gaussian`, or the like.

    With a sketch, A and w are replaced by S A and S w, of `sketch_size` rows R: each
    is a sum of rows of A with random signs, new in every step. That costs O(R P min(R,
    P)) operations and R·P memory. The damped direction is nearly that of all outputs
    where R is a few times the effective dimension tr(F (F + λI)⁻¹), which the search
    sees to: losses of trials are those of all outputs, and a λ for which R is too small
    does not lower them.

    Args:
      power: the exponent of λ in the score of a trial, at least 0.
      slack: at least 1. Use 1 in float32, whose round-off small λ would amplify, and
        where the loss can vanish between the points at which it is evaluated.
      factors: λ to try, in units of the last one, in rising order.
      lengths: s to try, positive.
      max_curvature: q is left out where |s q| is above this times |v|: there the path
        bends more than its second derivative can describe; 0 always leaves it out.
      initial: λ of the first search, in units of the largest eigenvalue of F, or of ‖F‖
        if `squared`.
      length_power: the exponent of 1/s in the score, at least 0. With 0, a tenth of a
        step at λ/27 beats a whole step at λ: λ falls to 1e-25, where the search creeps
        for a hundred steps or more until it breaks through, at a step that depends on
        the last digits. If it does, it may end some decades lower.
      sketch_size: R, or None for no sketch. With R ≥ M there is none either.
      key: for the sketch, a typed key, as from `jax.random.key`.
      squared: whether to factor F + λI for every λ in place of A once: a few times as
        fast for many parameters, and without a sketch A is never in memory, however
        many outputs there are. Only λ above ε ‖F‖ can then be told from zero.

    The `damping` of `solve` is the least λ. In any case, no λ below (ε max σ)², or ε
    ‖F‖ if `squared`, which cannot be told from zero, is tried.

    Raises:
      ValueError: for values outside these ranges, or a key without a sketch.
      TypeError: for a sketch without a typed key, or a size that is no int.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> model_fn = lambda w, x: jnp.tanh(x @ w)
      >>> tx = ngd.natural_gradient(
      ...     1.0,
      ...     model_fn,
      ...     ngd.Gaussian(),
      ...     damping=0.0,
      ...     solver=ngd.contrib.DampingSearch(),
      ...     loss_fn=lambda outputs, batch: (outputs**2).mean() / 2,
      ... )

    References:
      Marquardt, An algorithm for least-squares estimation of nonlinear parameters,
      1963 (several λ in each step); Transtrum and Sethna, Improvements to the
      Levenberg-Marquardt algorithm for nonlinear least-squares minimization, 2012,
      section 3 (q, the geodesic acceleration, and the bound on it); Clarkson and
      Woodruff, Low-rank approximation and regression in input sparsity time, 2013 (the
      sketch).

    Note:
      The solution carries λ and s as `damping` and `length`; s is 0 for no step.
      `num_steps` counts rounds, and `relative_residual` is ‖g - F d‖ / ‖g‖: what
      damping, length, bending and sketch together leave of an undamped step.
    """

    power: float = 0.4
    slack: float = 1.0
    factors: Sequence[float] = (1 / 27, 1 / 3, 1.0, 9.0)
    lengths: Sequence[float] = (1.0, 0.5, 0.25, 0.1)
    max_curvature: float = 0.75
    initial: float = 1e-2
    length_power: float = 0.5
    sketch_size: int | None = None
    key: KeyArray | None = None
    squared: bool = False

    uses_coefficients: ClassVar[bool] = True
    uses_objective: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("power", "max_curvature", "length_power"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be at least 0, got {value}.")
        if not 1 <= self.slack < math.inf:
            raise ValueError(f"`slack` must be at least 1, got {self.slack}.")
        for name in ("factors", "lengths"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if not values or not all(x > 0 and math.isfinite(x) for x in values):
                raise ValueError(f"`{name}` must be positive numbers, got {values}.")
        if self.factors != tuple(sorted(self.factors)) or self.factors[-1] <= 1:
            raise ValueError(
                f"`factors` must rise, to more than 1, so that λ can grow where no "
                f"trial lowers the loss; got {self.factors}."
            )
        if not (self.initial > 0 and math.isfinite(self.initial)):
            raise ValueError(f"`initial` must be positive, got {self.initial}.")
        if self.sketch_size is not None:
            check_count("sketch_size", self.sketch_size)
            check_key(self.key, "A sketch")
        elif self.key is not None:
            raise ValueError("`key` must be None without `sketch_size`.")

    def init(self, params: PyTree) -> DampingSearchState:
        """No λ yet."""
        dtype = tree.accumulator_dtype(params)
        count = None if self.sketch_size is None else jnp.zeros((), jnp.int32)
        none = jnp.zeros((), dtype)
        return DampingSearchState(none, jnp.asarray(jnp.inf, dtype), count)

    def solve(
        self, fisher: Any, rhs: RightHandSide, *, damping: ArrayLike, state: PyTree = ()
    ) -> Solution:
        """Searches for d; see `Solver.solve`.

        Raises:
          ValueError: without `rhs.objective`; for a sketch without `rhs.coefficients`;
            for coefficients unlike what `fisher.sqrt_matvec` returns.
        """
        objective = rhs.objective
        if objective is None:
            raise ValueError(
                "DampingSearch needs the loss: give `loss_fn` to natural_gradient, or "
                "call tx.update(..., value_fn=value_fn); outside of it, call "
                "solver.solve with RightHandSide(gradient, objective=objective) and "
                "objective(d) the loss after a step of -d."
            )
        gradient, unravel = ravel_real(rhs.gradient)
        known = state or self.init(rhs.gradient)
        sketch = self._draw_sketch(fisher, rhs, known.num_sketches)
        make_system = _by_cholesky if self.squared else _by_singular_values
        system = make_system(fisher, rhs, sketch)
        dtype = system.largest.dtype
        least = jnp.maximum(jnp.asarray(damping).astype(dtype), system.round_off)
        first = self.initial * system.largest
        last = jnp.where(known.damping > 0, known.damping.astype(dtype), first)

        def loss_of(d: Array) -> Scalar:
            return objective(unravel(d.astype(gradient.dtype)))

        before = loss_of(jnp.zeros_like(gradient))
        lowest = jnp.minimum(before, known.lowest.astype(before.dtype))
        # On another batch, even the present loss may be above the slack.
        highest = jnp.maximum(before, self.slack * lowest)
        search = self._search(system, loss_of, highest, last, least, gradient.size)

        direction = unravel(search.d.astype(gradient.dtype))
        product, pushed = fisher.matvec_and_push(direction)
        norm = tree.norm(rhs.gradient)
        left = tree.norm(tree.axpy(-1.0, product, rhs.gradient))
        status = jnp.where(
            search.found | (norm == 0), SolverStatus.CONVERGED, SolverStatus.STAGNATED
        )
        info = SolverInfo(
            num_steps=search.num_rounds,
            relative_residual=left / jnp.where(norm > 0, norm, 1.0),
            status=status.astype(jnp.int32),
        )
        if state:
            new = DampingSearchState(
                damping=jnp.where(search.found, search.damping, state.damping),
                lowest=jnp.where(jnp.isfinite(lowest), lowest, state.lowest),
                num_sketches=(
                    state.num_sketches if sketch is None else state.num_sketches + 1
                ),
            )
            state = optax.tree.cast_like(new, state)
        used = jnp.where(search.found, search.damping, last)
        # Values that are not finite are reported by `solve_scaled`.
        nothing = jnp.where(system.is_finite, 0.0, jnp.nan)
        direction = jax.tree.map(lambda x: x + nothing.astype(x.dtype), direction)
        return Solution(direction, pushed, info, state, used, search.length)

    def _draw_sketch(
        self, fisher: Any, rhs: RightHandSide, count: Array | None
    ) -> "_Sketch | None":
        num_outputs = real_size(coefficient_shapes(fisher))
        if self.sketch_size is None or self.sketch_size >= num_outputs:
            return None
        if rhs.coefficients is None:
            raise ValueError(
                "DampingSearch needs the gradient in the space of outputs for a "
                "sketch: give `loss_fn` to natural_gradient, or set sketch_size=None."
            )
        assert self.key is not None
        assert count is not None
        keys = jax.random.split(jax.random.fold_in(self.key, count))
        buckets = jax.random.randint(keys[0], (num_outputs,), 0, self.sketch_size)
        signs = jax.random.rademacher(keys[1], (num_outputs,), jnp.float32)
        return _Sketch(buckets, signs, self.sketch_size)

    def _search(
        self,
        system: "_System",
        loss_of: Callable[[Array], Scalar],
        highest: Scalar,
        last: Scalar,
        least: Scalar,
        num_params: int,
    ) -> "_Search":
        factors = jnp.asarray(self.factors, last.dtype)
        lengths = jnp.asarray(self.lengths, last.dtype)

        def trial(damping: Scalar) -> tuple[Array, Array]:
            steps = system.path(damping, lengths, self.max_curvature)
            return steps, jax.vmap(loss_of)(steps)

        def round_of_trials(search: _Search) -> _Search:
            dampings = jnp.maximum(search.damping * factors, least)
            steps, losses = jax.lax.map(trial, dampings)
            # Written so that NaN fails; a loss below zero has no logarithm.
            is_low = (losses < highest) & (losses >= 0)
            score = jnp.log(jnp.where(is_low, losses / highest, 1.0))
            score += self.power * jnp.log(dampings)[:, None]
            score -= self.length_power * jnp.log(lengths)[None, :]
            score = jnp.where(is_low, score, jnp.inf)
            best = jnp.unravel_index(jnp.argmin(score), score.shape)
            found = is_low[best]
            more = search.damping * self.factors[-1] / self.factors[0]
            return _Search(
                d=jnp.where(found, steps[best], 0.0),
                damping=jnp.where(found, dampings[best[0]], more),
                length=jnp.where(found, lengths[best[1]], 0.0),
                found=found,
                num_rounds=search.num_rounds + 1,
            )

        def is_running(search: _Search) -> Array:
            return ~search.found & (search.num_rounds < _MAX_ROUNDS)

        start = _Search(
            d=jnp.zeros(num_params, last.dtype),
            damping=last,
            length=jnp.zeros_like(last),
            found=~system.is_finite,
            num_rounds=jnp.zeros((), jnp.int32),
        )
        search = jax.lax.while_loop(is_running, round_of_trials, start)
        return search._replace(found=search.found & system.is_finite)


class _Search(NamedTuple):
    """The step found so far, its λ (or the next one to try) and length."""

    d: Array
    damping: Array
    length: Array
    found: Array
    num_rounds: Array


class _Sketch(NamedTuple):
    """S: (S c)ᵢ = Σ signsⱼ cⱼ over all j with bucketsⱼ = i, for i below `size`."""

    buckets: Array
    signs: Array
    size: int

    def __call__(self, coefficients: Array) -> Array:
        signed = self.signs.astype(coefficients.dtype) * coefficients
        return jnp.zeros(self.size, signed.dtype).at[self.buckets].add(signed)


class _System(NamedTuple):
    """The systems (F + λI) v = g and (F + λI) q = Aᵀ b(v) for any λ.

    With a sketch, A, w and b are S A, S w and S b.

    Attributes:
      solve_at: λ -> v, and the function Aᵀ b -> q.
      bend: v -> Aᵀ b, where b are the coefficients of ∂²outputs[v, v].
      largest: the largest eigenvalue of F, or ‖F‖.
      round_off: the least λ that can be told from zero.
      is_finite: of A; zeros where it was not.
    """

    solve_at: Callable[[Scalar], tuple[Array, Callable[[Array], Array]]]
    bend: Callable[[Array], Array]
    largest: Scalar
    round_off: Scalar
    is_finite: Array

    def path(self, damping: Scalar, lengths: Array, max_curvature: float) -> Array:
        """The steps s v + ½ s² q for all lengths s, `[len(lengths), P]`."""
        v, inverse = self.solve_at(damping)
        if max_curvature == 0:
            return jnp.outer(lengths, v)
        q = inverse(self.bend(v))
        is_small = lengths * jnp.linalg.norm(q) <= max_curvature * jnp.linalg.norm(v)
        return jnp.outer(lengths, v) + jnp.outer(is_small * lengths**2 / 2, q)


def _by_singular_values(
    fisher: Any, rhs: RightHandSide, sketch: _Sketch | None
) -> _System:
    w = known_coefficients(fisher, rhs)
    matrix, is_finite = _finite(_root(fisher, sketch))
    rest = ravel_real(rhs.gradient)[0].astype(matrix.dtype)
    w = None if w is None else w.astype(matrix.dtype)
    values, rights, along, _ = decompose(
        matrix, w if sketch is None or w is None else sketch(w)
    )
    largest = jnp.max(values, initial=0.0)
    if w is not None:
        size = jnp.linalg.norm(rest) + largest * jnp.linalg.norm(w)
        pulled = matrix.T @ w if sketch is None else _pulled(fisher, rhs)
        rest = rest - pulled.astype(rest.dtype)
        rest = jnp.where(negligible(rest, size), 0.0, rest)

    def solve_at(damping: Scalar) -> tuple[Array, Callable[[Array], Array]]:
        inverse = 1 / (values**2 + damping)
        inside = rights @ rest
        outside = rest - rights.T @ inside
        is_nothing = negligible(outside, jnp.linalg.norm(rest))
        v = jnp.where(is_nothing, 0.0, outside / damping)
        inside = inside if along is None else inside + values * along
        v += rights.T @ (inverse * inside)
        return v, lambda b: rights.T @ (inverse * (rights @ b))

    bent = _bending(fisher, rhs, lambda b: matrix.T @ _flat(b, matrix, sketch))
    eps = float(jnp.finfo(matrix.dtype).eps)
    return _System(solve_at, bent, largest**2, (eps * largest) ** 2, is_finite)


def _by_cholesky(fisher: Any, rhs: RightHandSide, sketch: _Sketch | None) -> _System:
    g = ravel_real(rhs.gradient)[0]
    if sketch is None:
        matrix, is_finite = _finite(dense(fisher))
        g = g.astype(matrix.dtype)

        def pull(b: PyTree) -> Array:
            return ravel_real(fisher.sqrt_rmatvec(b))[0].astype(g.dtype)

    else:
        w = known_coefficients(fisher, rhs)
        assert w is not None  # or there would be no sketch
        rows, is_finite = _finite(_root(fisher, sketch))
        matrix = tree.contract(rows, rows, (0,), (0,))
        g = g.astype(matrix.dtype) - _pulled(fisher, rhs).astype(matrix.dtype)
        g = g + rows.T @ sketch(w.astype(matrix.dtype))

        def pull(b: PyTree) -> Array:
            return rows.T @ _flat(b, rows, sketch)

    def solve_at(damping: Scalar) -> tuple[Array, Callable[[Array], Array]]:
        system = make_positive_definite(matrix, damping)
        # Without a factor everything is NaN, and so are losses, which no trial passes.
        factor, _ = factorise(system)
        v, _ = solve_refined(system, factor, g)
        return v / system.unit, lambda b: solve(factor, b) / system.unit

    # No eigenvalue is larger than this, and with few large ones it is close to them.
    largest = make_positive_definite(matrix, 0.0).size()
    eps = float(jnp.finfo(matrix.dtype).eps)
    return _System(
        solve_at, _bending(fisher, rhs, pull), largest, eps * largest, is_finite
    )


def _root(fisher: Any, sketch: _Sketch | None) -> Array:
    return dense_root(fisher) if sketch is None else sketched_root(fisher, *sketch)


def _finite(matrix: Array) -> tuple[Array, Array]:
    is_finite = jnp.isfinite(tree.max_abs(matrix))
    return jnp.where(is_finite, matrix, 0.0), is_finite


def _flat(coefficients: PyTree, matrix: Array, sketch: _Sketch | None) -> Array:
    flat = ravel_real(coefficients)[0].astype(matrix.dtype)
    return flat if sketch is None else sketch(flat)


def _pulled(fisher: Any, rhs: RightHandSide) -> Array:
    """Aᵀ w, with all rows."""
    return ravel_real(fisher.sqrt_rmatvec(rhs.coefficients))[0]


def _bending(
    fisher: Any, rhs: RightHandSide, pull: Callable[[PyTree], Array]
) -> Callable[[Array], Array]:
    """The function v -> Aᵀ b; `pull` takes b, a tree like the outputs, to Aᵀ b."""
    _, unravel = ravel_real(rhs.gradient)

    def bend(v: Array) -> Array:
        # v is in units of the right-hand side, but its square is not.
        unit = jnp.asarray(rhs.unit).astype(v.dtype)
        direction = unravel(unit * v)

        def outputs_at(t: Scalar) -> PyTree:
            moved = tree.axpy(t, direction, tree.widen(fisher.params))
            return fisher.outputs_at(optax.tree.cast_like(moved, fisher.params))

        def slope(t: Scalar) -> PyTree:
            return jax.jvp(outputs_at, (t,), (jnp.ones_like(t),))[1]

        zero = jnp.zeros((), v.dtype)
        second = jax.jvp(slope, (zero,), (jnp.ones_like(zero),))[1]
        return pull(fisher.metric.sqrt_matvec(second)).astype(v.dtype) / unit

    return bend
