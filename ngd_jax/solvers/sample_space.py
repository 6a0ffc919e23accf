"""Solves of (F + λI) d = g in the space of samples, for many parameters.

    F = Aᵀ A,  G = A Aᵀ:    d = Aᵀ (G + λI)⁻¹ w  for g = Aᵀ w

For g from elsewhere, with any w_r and the rest r = g - Aᵀ w_r that it leaves,

    d = Aᵀ (G + λI)⁻¹ (w_r - A r / λ) + r / λ

holds exactly. It is Woodbury's formula for w_r = 0, where two terms of size ‖g‖/λ
cancel, and with w_r = G⁺ A g the formula above, where nothing does: r is then the part
of g that the samples do not span.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from ngd_jax import tree
from ngd_jax.fisher.coefficients import ravel_real
from ngd_jax.fisher.gram import Gram
from ngd_jax.solvers.interface import (
    SolverInfo,
    SolverStatus,
    StatefulSolver,
    check_system,
)
from ngd_jax.solvers.positive_definite import (
    Factor,
    PositiveDefinite,
    factorise,
    frobenius_norm,
    make_positive_definite,
    report,
    solve,
    solve_refined,
    with_least_jitter,
)
from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = ["SampleSpace", "solve_in_sample_space"]

# In units of the round-off of the model: how long a rest may be and still be nothing.
_ROUND_OFF = 16.0
# Passes of refinement for G⁺: an eigenvalue σ² is found to (λ / (σ² + λ))⁴.
_REFINEMENTS = 3
# Powers of λ (G + λI)⁻¹ that make a projection onto the null space of G.
_FILTERS = 4


@dataclasses.dataclass(frozen=True)
class SampleSpace(StatefulSolver):
    """Direct solve through the Gram matrix of the samples, for many parameters.

    With F = Aᵀ A and G = A Aᵀ, `[M, M]`, (F + λI)⁻¹ Aᵀ = Aᵀ (G + λI)⁻¹: a system of the
    size of the samples, M = N·K for N examples of K real outputs (2·N·K for complex
    ones, N for the sampled and the empirical kind), however many parameters there are.
    Exact for every likelihood, for every right-hand side, and in λ: G costs 2M²P
    operations and its factorisation M³/3; then each solve takes two to six passes
    through the linearised model, of 2/3 of a gradient each. Dense layers, whose weights
    are used once for an example, cost 2M²(m + n) in place of 2M²mn for m inputs and n
    outputs, as long as parameters and outputs are real.

    Small damping: what g has outside of the span of the samples is divided by λ, and so
    is its round-off. A part of g outside that is not longer than 16 ε (‖g‖ + ‖A‖ ‖w‖),
    with the Frobenius norm of A and ε of the arithmetic (or 2 ε of the narrowest dtype
    among parameters and outputs, where that is more), is taken for round-off and
    dropped. So is, at λ = 0, all of it: the
    solution is then the one of least norm, and `relative_residual` says what was left
    out. `coefficients` w, with g = Aᵀ w, spare the solver from finding them.

    The factorisation is in units of the diagonal of G + λI. Where it fails, since λ is
    below the round-off of G, it is repeated with M·ε times the diagonal added, and the
    solution refined. The report is of the system asked for; where its residual is above
    the square root of the machine precision, the status is STAGNATED.

    Attributes:
      block_size: examples whose rows of the Jacobian are in memory at once, twice over:
        memory is 2·block_size·K·P numbers and M². None holds 256 rows, or as many as
        fit into half a GiB; of dense layers inputs and cotangents of all examples,
        where these fit. Smaller blocks cost a little time, and dense layers what others
        do.

    Raises:
      ValueError: at trace time where the model cannot be run on single examples, since
        no leaf of the batch has the leading axis of the outputs. Where it can and mixes
        them, as batch normalisation in training does: at run time outside of jit; under
        jit the solution is zero and the status NOT_SEPARABLE.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]])  # 2 examples, 3 parameters
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x @ w, jnp.ones((3, 1)), x, ngd.Gaussian()
      ... )
      >>> g = jnp.array([[12.0], [17.0], [0.0]])
      >>> d, info = SampleSpace()(fisher, g, damping=0.0)
      >>> d.ravel().round(2)
      Array([1., 1., 0.], dtype=float32)

    References:
      Ren and Goldfarb, Efficient subsampled Gauss-Newton and natural gradient methods
      for training neural networks, 2019, equation 13; Chen and Heyl, Empowering deep
      neural quantum states through efficient optimization, 2024 (minSR); Rende et al.,
      A simple linear algebra identity to optimize large-scale neural network quantum
      states, 2024.

    Note:
      With several blocks in a `Product` the rows of one example come from the batch
      with every leaf cut whose leading axis is as long as that block's outputs.
      Forward-mode differentiable, not reverse-mode.
    """

    block_size: int | None = None

    uses_coefficients: ClassVar[bool] = True

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
        """Solves (F + λI) d = g; see `StatefulSolver`. No use for `x0`, `objective`."""
        del objective
        check_system(rhs, damping, x0)
        gram = fisher.gram(self.block_size)
        _raise_where_known(gram)
        solution, info = solve_in_sample_space(
            fisher, gram, rhs, damping=damping, coefficients=coefficients
        )
        return solution, info, state


def solve_in_sample_space(
    fisher: Any,
    gram: Gram,
    rhs: PyTree,
    *,
    damping: ArrayLike,
    coefficients: PyTree | None = None,
) -> tuple[PyTree, SolverInfo]:
    """`SampleSpace.solve`, given the Gram matrix."""
    dtype = gram.matrix.dtype
    g, (w, unravel) = tree.widen(rhs), _coefficients(fisher, coefficients)
    damping = jnp.asarray(damping).astype(dtype)

    # 1. Units in which the largest |gᵢ| and the largest diagonal entry of G + λI are 1.
    largest = tree.max_abs(g).astype(dtype)
    # An entry that is not finite has none on the diagonal of its row or column.
    is_finite = jnp.isfinite(largest) & jnp.isfinite(damping) & jnp.all(jnp.isfinite(w))
    is_finite &= jnp.all(jnp.isfinite(jnp.diagonal(gram.matrix)))
    is_solvable = is_finite & gram.is_separable & (largest > 0)
    scaled = make_positive_definite(gram.matrix, damping, is_solvable)
    size, root = scaled.unit, jnp.sqrt(scaled.unit)
    unit = tree.usable_unit(jnp.where(is_solvable, largest, 1.0))
    g = tree.select(is_solvable, tree.divide(g, unit), optax.tree.zeros_like(g))
    w = jnp.where(is_solvable, w / unit * root, 0.0)

    def push(vector: PyTree) -> Array:
        return ravel_real(fisher.sqrt_matvec(vector))[0].astype(dtype) / root

    def pull(vector: Array) -> PyTree:
        return tree.divide(fisher.sqrt_rmatvec(unravel(vector)), root)

    g_norm, round_off = tree.norm(g), _round_off(fisher)
    rest = g if coefficients is None else tree.axpy(-1.0, pull(w), g)

    def solve_with(jitter: Scalar, factor: Factor) -> tuple[PyTree, Scalar]:
        system = _System(scaled, jitter, factor, push, pull, g_norm, round_off)
        is_known = coefficients is not None
        return _solve_factorised(system, g, w, rest, is_known=is_known)

    solution, relative = with_least_jitter(scaled, solve_with)
    solution = tree.divide(tree.scale(unit, solution), size)
    solution, info = report(solution, rhs, relative, is_finite)
    is_mixed = is_finite & ~gram.is_separable
    one = jnp.ones_like(info.relative_residual)
    mixed = jnp.asarray(SolverStatus.NOT_SEPARABLE, jnp.int32)
    info = info._replace(
        relative_residual=jnp.where(is_mixed, one, info.relative_residual),
        status=jnp.where(is_mixed, mixed, info.status),
    )
    return tree.select(is_solvable, solution, optax.tree.zeros_like(solution)), info


class _System(NamedTuple):
    """G + λI in units of its largest diagonal entry, and A.

    Attributes:
      scaled: G + λI.
      jitter: with which it was factorised.
      factor: what came of it.
      push: v -> A v.
      pull: u -> Aᵀ u.
      g_norm: ‖g‖.
      round_off: relative, of a product with A.
    """

    scaled: PositiveDefinite
    jitter: Scalar
    factor: Factor
    push: Callable[[PyTree], Array]
    pull: Callable[[Array], PyTree]
    g_norm: Scalar
    round_off: float

    @property
    def damping(self) -> Scalar:
        """λ."""
        return self.scaled.shift

    @property
    def trace(self) -> Scalar:
        """Of G, which is the square of the Frobenius norm of A."""
        return jnp.sum(jnp.diagonal(self.scaled.matrix)) / self.scaled.unit

    def gram(self, x: Array) -> Array:
        """G x."""
        return self.scaled.matrix @ x / self.scaled.unit

    def is_nothing(self, rest: PyTree, w: Array) -> Array:
        """Whether g - Aᵀ w is not longer than the round-off of what it is made of."""
        longest = self.g_norm + jnp.sqrt(self.trace) * jnp.linalg.norm(w)
        return tree.norm(rest) <= self.round_off * longest


def _solve_factorised(
    system: _System, g: PyTree, w: Array, rest: PyTree, *, is_known: bool
) -> tuple[PyTree, Scalar]:
    """The solution, and its relative residual.

    Args:
      system: A and the factor of G + λI.
      g: the right-hand side.
      w: the coefficients that are known of it, else zero.
      rest: g - Aᵀ w.
      is_known: whether there are any.
    """
    dtype = w.dtype
    eps = float(jnp.finfo(dtype).eps)

    # 2. g = Aᵀ w + r, and A r. Far above the round-off of G any w will do.
    def push_if_any(w: Array, rest: PyTree) -> Array:
        if not is_known:
            return system.push(rest)
        is_nothing = system.is_nothing(rest, w)
        return jax.lax.cond(is_nothing, lambda _: jnp.zeros_like(w), system.push, rest)

    norm = frobenius_norm(system.scaled.matrix / system.scaled.unit)
    w, rest, image = jax.lax.cond(
        system.damping >= eps ** (1 / 3) * norm,
        lambda w, rest: (w, rest, push_if_any(w, rest)),
        functools.partial(_split, system),
        *(w, rest),
    )

    # 3. What the samples do not span is solved by r / λ, or dropped.
    damping = system.damping
    is_kept = ~system.is_nothing(rest, w) & (damping > 0)
    inverse = jnp.where(is_kept, 1 / jnp.where(is_kept, damping, 1.0), 0.0)
    y, residual = solve_refined(system.scaled, system.factor, w - inverse * image)
    solution = tree.axpy(1.0, system.pull(y), tree.scale(inverse, rest))

    # 4. The residual: by G; where it is not small, with two passes through the model.
    def true_residual() -> Scalar:
        image = system.pull(system.push(solution))
        product = tree.axpy(damping, solution, image)
        return tree.norm(tree.axpy(-1.0, product, g)).astype(dtype)

    inside = jnp.maximum(residual @ system.gram(residual), 0.0)
    dropped = jnp.where(is_kept, 0.0, tree.norm(rest))
    by_gram = jnp.sqrt(inside + dropped**2)
    size = jnp.where(system.g_norm > 0, system.g_norm, 1.0)
    is_small = by_gram <= eps**0.5 * size
    return solution, jax.lax.cond(is_small, lambda: by_gram, true_residual) / size


def _split(system: _System, w: Array, rest: PyTree) -> tuple[Array, PyTree, Array]:
    """Moves what the samples span from r to w, and takes null vectors of G out of w.

    Both need G⁺. Round-off of size ε in null vectors of G comes out of it as ε/λ; with
    √ε for λ, and refinement, it stays small and the rest of the spectrum right.
    """
    eps = float(jnp.finfo(w.dtype).eps)
    shift = jnp.maximum(system.damping, eps**0.5)
    shifted = jax.lax.cond(
        system.damping >= eps**0.5,
        lambda: system.factor,
        lambda: factorise(system.scaled, system.jitter, shift)[0],
    )

    def is_left(carry: tuple[Array, Array, PyTree, Array]) -> Array:
        count, w, rest, _ = carry
        # Twice is enough: the second pass finds what the first one rounded.
        return (count < 2) & ~system.is_nothing(rest, w)

    def move(carry: tuple[Array, Array, PyTree, Array]) -> tuple[Any, ...]:
        count, w, rest, _ = carry
        image = system.push(rest)
        part = solve(shifted, image)
        for _ in range(_REFINEMENTS):
            part += solve(shifted, image - system.gram(part))
        rest = tree.axpy(-1.0, system.pull(part), rest)
        return count + 1, w + part, rest, image - system.gram(part)

    start = (jnp.zeros((), jnp.int32), w, rest, jnp.zeros_like(w))
    _, w, rest, image = jax.lax.while_loop(is_left, move, start)

    # Aᵀ takes a null vector to zero, but not its product with 1/λ, whose round-off is
    # large. Without a gap in the spectrum there is no telling, and w stays as it is.
    def without_null(w: Array) -> Array:
        null = w
        for _ in range(_FILTERS):
            null = shift * solve(shifted, null)
        size = _ROUND_OFF * eps * system.trace * jnp.linalg.norm(null)
        is_null = jnp.linalg.norm(system.gram(null)) <= size
        return jnp.where(is_null, w - null, w)

    w, image = jax.vmap(without_null)(jnp.stack([w, image]))
    return w, rest, image


def _coefficients(
    fisher: Any, coefficients: PyTree | None
) -> tuple[Array, Callable[[Array], PyTree]]:
    """The vector of w, zero where it is not known; and the way back."""
    like = jax.eval_shape(lambda: fisher.sqrt_matvec(fisher.params))
    if coefficients is None:
        coefficients = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    tree.check_like(
        coefficients, like, name="coefficients", like_name="fisher.sqrt_matvec(params)"
    )
    return ravel_real(coefficients)


def _round_off(fisher: Any) -> float:
    """Relative, of a product with A, which is wide but for casts to narrow dtypes."""
    leaves = jax.tree.leaves((fisher.params, fisher.outputs))
    narrow = float(max(jnp.finfo(leaf.dtype).eps for leaf in leaves))
    wide = float(jnp.finfo(tree.accumulator_dtype(leaves)).eps)
    return max(_ROUND_OFF * wide, 2 * narrow)


def _raise_where_known(gram: Gram) -> None:
    """Outside of jit, a status that only another solver can cure is an error.

    Raises:
      ValueError: where the model mixes its examples.
    """
    if isinstance(gram.is_separable, Tracer) or bool(gram.is_separable):
        return
    if bool(jnp.all(jnp.isfinite(gram.matrix))):
        raise ValueError(SolverStatus.NOT_SEPARABLE.message)
