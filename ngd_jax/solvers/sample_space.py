"""Solves of (F + λI) d = g in the space of samples, for many parameters.

    F = Aᵀ A,  G = A Aᵀ:    d = Aᵀ (G + λI)⁻¹ w  for g = Aᵀ w

For any other g, with any w and the rest r = g - Aᵀ w that it leaves,

    d = Aᵀ (G + λI)⁻¹ (w - A r / λ) + r / λ

holds exactly. With w = 0 it is Woodbury's formula, where two terms of size ‖g‖/λ
cancel; with w = G⁺ A g it is the formula above, where nothing cancels: r is then the
part of g that the samples do not span. G comes from `ngd_jax.dense`, products with A
from the Fisher.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ngd_jax import per_example, placement, tree
from ngd_jax.coordinates import ravel_real
from ngd_jax.gram import divided_gram, gram
from ngd_jax.metric import check_count
from ngd_jax.per_example import precision, working_dtype
from ngd_jax.solvers.divided_gram import DividedGram
from ngd_jax.solvers.positive_definite import (
    Factor,
    PositiveDefinite,
    direct_solution,
    factorise,
    make_positive_definite,
    solve,
    solve_refined,
    with_least_jitter,
)
from ngd_jax.solvers.protocol import (
    RightHandSide,
    Solution,
    Solver,
    SolverInfo,
    SolverStatus,
)
from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = ["SampleSpace"]

# In units of the round-off of the model: how long a rest may be to count as zero.
_ROUND_OFF = 16.0
# Passes of refinement for G⁺: an eigenvalue σ² is found to (λ / (σ² + λ))⁴.
_REFINEMENTS = 3
# Powers of λ (G + λI)⁻¹ that make a projection onto the null space of G.
_FILTERS = 4
# Of CG on a Gram matrix that is divided over devices.
_MAX_STEPS = 1000


_OnVectors = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class SampleSpace(Solver):
    """Direct solve through the Gram matrix of the samples, for many parameters.

        d = Aᵀ (A Aᵀ + λI)⁻¹ w    for g = Aᵀ w

    A system of the size of the samples, M = N·K for N examples of K real outputs (2·N·K
    for complex ones, N for the sampled and the empirical kind), however many parameters
    there are. Exact for every likelihood, for every right-hand side, and in λ: G costs
    2M²P operations and its factorisation M³/3; then each solve takes two to eight
    passes through the linearised model, of 2/3 of a gradient each. Dense layers that
    are used once in an example cost 2M²(m + n) in place of 2M²mn for m inputs and n
    outputs, as long as parameters and outputs are real.

    Small damping: the part of g outside the span of the samples is divided by λ, and so
    is its round-off. If that part is no longer than 16 ε (‖g‖ + ‖A‖ ‖w‖), with the
    Frobenius norm of A and ε of the arithmetic (or 2 ε of the narrowest dtype among
    parameters and outputs, where that is more), it is taken for round-off and dropped.
    At λ = 0 all of it is dropped: the solution is then the one of least norm, and
    `relative_residual` shows what was left out. `rhs.coefficients` w with g = Aᵀ w
    save the solver from having to find them.

    The factorisation is in units of the diagonal of G + λI. If it fails because λ is
    below the round-off of G, it is repeated with M·ε times the diagonal added, and the
    solution refined. Above the square root of the machine precision, the residual gives
    the status STAGNATED.

    Rows of single examples are those of the batch only if the model does not mix its
    examples. If it does, as with batch normalisation in training, the solution fails
    its verification: it is refused, with d = 0 and the status NOT_SEPARABLE.

    Args:
      block_size: examples whose rows of the Jacobian are in memory at once, twice over:
        memory is 2·block_size·K·P numbers and M². None holds 256 rows, or as many as
        fit into half a GiB; for dense layers, the inputs and cotangents of all
        examples, if these fit. Smaller blocks cost a little time, and if a number is
        given, dense layers cost as much as others.
      verify: whether to check the solution against the operator, at the cost of one
        product with F. False is for benchmarks: it trusts the rows, and reports the
        residual of G.
      sharding: a mesh, and its axes that divide the rows of G, as in
        `NamedSharding(mesh, P("data"))`: no device ever has the whole matrix. It is not
        factorised: CG solves with it to working precision, preconditioned by each
        device's own block unless λ is below √ε of the largest diagonal entry, at 2M²/D
        operations a step on D devices and two gathers of M numbers. Damping near the
        round-off of G takes a few solves in place of one.
        The number of examples must be a multiple of D. None if every device has all
        of G and factorises it.
      max_steps: the most steps of such a solve, with `sharding`; None for 1,000. If
        they are too few, the status is MAX_STEPS, and `relative_residual` says how far
        it has come.

    Raises:
      ValueError: for a `sharding` without mesh axes, or `max_steps` without
        `sharding`; at trace time where the model
        cannot be run on single examples, since no leaf of the batch has the leading
        axis of the outputs, and for examples that `sharding` cannot divide.

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
      by cutting every leaf whose leading axis is as long as that block's outputs.
    """

    block_size: int | None = None
    verify: bool = True
    sharding: NamedSharding | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        placement.check_sharding(self.sharding, "the Gram matrix")
        if self.max_steps is not None:
            check_count("max_steps", self.max_steps)
            if self.sharding is None:
                raise ValueError(
                    f"`max_steps` is for `sharding`, with which the solve iterates: "
                    f"leave it None without, got {self.max_steps}."
                )

    uses_coefficients: ClassVar[bool] = True

    def solve(
        self, fisher: Any, rhs: RightHandSide, *, damping: ArrayLike, state: PyTree = ()
    ) -> Solution:
        """Solves (F + λI) d = g; see `Solver.solve`.

        Raises:
          ValueError: for coefficients unlike what `fisher.sqrt_matvec` returns.
        """
        if self.sharding is None:
            matrix, order = gram(fisher, self.block_size), None
            scaled = make_positive_definite(matrix, damping)
        else:
            matrix, order = divided_gram(fisher, self.sharding, self.block_size)
            max_steps = _MAX_STEPS if self.max_steps is None else self.max_steps
            scaled = DividedGram(matrix, damping, self.sharding, max_steps)
        system, w, rest = _in_units(fisher, rhs, scaled, order)
        is_known = rhs.coefficients is not None

        def solve_with(inverse: _Inverse) -> tuple[PyTree, Scalar, SolverInfo | None]:
            return _solve(system, inverse, w, rest, is_known=is_known)

        if isinstance(scaled, DividedGram):
            solution, residual, info = solve_with(_by_cg(scaled))
        else:
            solution, residual, info = with_least_jitter(
                scaled, lambda *factor: solve_with(_by_factor(scaled, *factor))
            )
        found = direct_solution(
            fisher,
            rhs,
            tree.divide(solution, scaled.unit),
            damping,
            state,
            residual=residual,
            size=scaled.size(),
            verify=self.verify,
        )
        return found if info is None else _with_steps(found, info)


class _System(NamedTuple):
    """G + λI in units of its largest diagonal entry, and A.

    Attributes:
      scaled: G + λI.
      push: v -> A v.
      pull: u -> Aᵀ u.
      g_norm: ‖g‖.
      round_off: the relative round-off of a product with A.
    """

    scaled: PositiveDefinite | DividedGram
    push: Callable[[PyTree], Array]
    pull: Callable[[Array], PyTree]
    g_norm: Scalar
    round_off: float

    @property
    def trace(self) -> Scalar:
        """The trace of G, which is the square of the Frobenius norm of A."""
        return jnp.sum(self.scaled.diagonal) / self.scaled.unit

    def is_nothing(self, rest: PyTree, w: Array) -> Array:
        """Whether g - Aᵀ w is no longer than the round-off of its terms."""
        longest = self.g_norm + jnp.sqrt(self.trace) * jnp.linalg.norm(w)
        return tree.norm(rest) <= self.round_off * longest


class _Inverse(NamedTuple):
    """The ways to solve with G.

    Attributes:
      solve: b -> y with (G + λI) y = b, its residual, and the report of an iteration.
      pseudo_inverse: () -> (b -> G⁺ b, x -> the part of x in the null space of G); made
        once where it is needed.
      map: applies a function along the first axis.
    """

    solve: Callable[[Array], tuple[Array, Array, SolverInfo | None]]
    pseudo_inverse: Callable[[], tuple[_OnVectors, _OnVectors]]
    map: Callable[[_OnVectors, Array], Array]


def _in_units(
    fisher: Any,
    rhs: RightHandSide,
    scaled: PositiveDefinite | DividedGram,
    order: np.ndarray | None,
) -> tuple[_System, Array, PyTree]:
    """A in units in which the largest diagonal entry of G + λI is 1; w and g - Aᵀ w.

    Args:
      fisher, rhs: as in `Solver.solve`.
      scaled: G + λI.
      order: where each coefficient is among the rows of G; None for the same place.
    """
    # 1. A / √u and √u w.
    root, dtype = jnp.sqrt(scaled.unit), scaled.matrix.dtype
    vector, unravel = _coefficients(fisher, rhs.coefficients)
    back = None if order is None else np.argsort(order)

    def permuted(vector: Array, order: np.ndarray | None) -> Array:
        return vector if order is None else per_example.permuted(vector, order)

    def push(vector: PyTree) -> Array:
        pushed = ravel_real(fisher.sqrt_matvec(vector))[0].astype(dtype)
        return permuted(pushed, back) / root

    def pull(vector: Array) -> PyTree:
        pulled = fisher.sqrt_rmatvec(unravel(permuted(vector, order)))
        return tree.divide(tree.replicate(pulled), root)

    w = permuted(vector.astype(dtype), back) * root
    g = tree.replicate(rhs.gradient)
    rest = g if rhs.coefficients is None else tree.axpy(-1.0, pull(w), g)
    return _System(scaled, push, pull, tree.norm(g), _round_off(fisher)), w, rest


def _by_factor(scaled: PositiveDefinite, jitter: Scalar, factor: Factor) -> _Inverse:
    """Solves by a factorisation of G + λI.

    G⁺ is that of G + √ε I, if that is more than λ: round-off of size ε in null vectors
    of G comes out as ε/λ; with √ε for λ, and refinement, it stays small and the rest of
    the spectrum right.
    """

    def pseudo_inverse() -> tuple[_OnVectors, _OnVectors]:
        eps = float(jnp.finfo(scaled.matrix.dtype).eps)
        shift = jnp.maximum(scaled.shift, eps**0.5)
        shifted = jax.lax.cond(
            scaled.shift >= eps**0.5,
            lambda: factor,
            lambda: factorise(scaled._replace(shift=shift), jitter)[0],
        )

        def inverse(b: Array) -> Array:
            x = solve(shifted, b)
            for _ in range(_REFINEMENTS):
                x += solve(shifted, b - scaled.without_shift(x))
            return x

        def null_part(x: Array) -> Array:
            for _ in range(_FILTERS):
                x = shift * solve(shifted, x)
            return x

        return inverse, null_part

    return _Inverse(
        lambda b: (*solve_refined(scaled, factor, b), None),
        pseudo_inverse,
        lambda fn, vectors: jax.vmap(fn)(vectors),
    )


def _by_cg(scaled: DividedGram) -> _Inverse:
    """Solves by CG, which finds G⁺ b for any b in the range of G."""

    def solve(b: Array) -> tuple[Array, Array, SolverInfo]:
        y, info = scaled.solve(b)
        return y, b - scaled.product(y), info

    def null_part(x: Array) -> Array:
        return x - scaled.pseudo_solve(scaled.without_shift(x))

    return _Inverse(solve, lambda: (scaled.pseudo_solve, null_part), jax.lax.map)


def _solve(
    system: _System, inverse: _Inverse, w: Array, rest: PyTree, *, is_known: bool
) -> tuple[PyTree, Scalar, SolverInfo | None]:
    """The solution, the norm of its residual by G, and the report of an iteration.

    Args:
      system: A and G + λI.
      inverse: how to solve.
      w: the known coefficients of g, else zero.
      rest: g - Aᵀ w.
      is_known: whether there are any.
    """
    eps, damping = float(jnp.finfo(w.dtype).eps), system.scaled.shift

    # 2. g = Aᵀ w + r, and A r. Far above the round-off of G any w will do.
    def push_if_any(w: Array, rest: PyTree) -> Array:
        if not is_known:
            return system.push(rest)
        is_nothing = system.is_nothing(rest, w)
        return jax.lax.cond(is_nothing, lambda _: jnp.zeros_like(w), system.push, rest)

    w, rest, pushed = jax.lax.cond(
        damping * system.scaled.unit >= eps ** (1 / 3) * system.scaled.size(),
        lambda w, rest: (w, rest, push_if_any(w, rest)),
        functools.partial(_split, system, inverse),
        *(w, rest),
    )

    # 3. What the samples do not span is solved by r / λ, or dropped.
    is_kept = ~system.is_nothing(rest, w) & (damping > 0)
    share = jnp.where(is_kept, 1 / jnp.where(is_kept, damping, 1.0), 0.0)
    y, residual, info = inverse.solve(w - share * pushed)
    solution = tree.axpy(1.0, system.pull(y), tree.scale(share, rest))

    # 4. The residual is Aᵀ (w - A r / λ - (G + λI) y), and what was dropped.
    inside = jnp.maximum(residual @ system.scaled.without_shift(residual), 0.0)
    dropped = jnp.where(is_kept, 0.0, tree.norm(rest))
    # Without damping y is long, and F sees the round-off of Aᵀ y.
    norm = jnp.sqrt(system.trace)
    rounded = eps * norm * (norm**2 + damping) * jnp.linalg.norm(y)
    return solution, jnp.sqrt(inside + dropped**2) + rounded, info


def _split(
    system: _System, inverse: _Inverse, w: Array, rest: PyTree
) -> tuple[Array, PyTree, Array]:
    """Moves what the samples span from r to w, and takes null vectors of G out of w.

    Returns:
      w, r and A r.
    """
    pseudo_inverse, null_part = inverse.pseudo_inverse()

    def is_left(carry: tuple[Array, Array, PyTree, Array]) -> Array:
        count, w, rest, _ = carry
        # Twice is enough: the second pass finds what the first one rounded.
        return (count < 2) & ~system.is_nothing(rest, w)

    def move(carry: tuple[Array, Array, PyTree, Array]) -> tuple[Any, ...]:
        count, w, rest, _ = carry
        pushed = system.push(rest)
        part = pseudo_inverse(pushed)
        rest = tree.axpy(-1.0, system.pull(part), rest)
        pushed -= system.scaled.without_shift(part)
        return count + 1, w + part, rest, pushed

    start = (jnp.zeros((), jnp.int32), w, rest, jnp.zeros_like(w))
    _, w, rest, pushed = jax.lax.while_loop(is_left, move, start)

    # Aᵀ takes a null vector to zero, but not its product with 1/λ, whose round-off is
    # large. Without a gap in the spectrum none can be told apart, and w is left alone.
    # A tells: G, with the squares, takes what is small for null.
    def without_null(w: Array) -> Array:
        null = null_part(w)
        longest = jnp.sqrt(system.trace) * jnp.linalg.norm(null)
        is_null = tree.norm(system.pull(null)) <= system.round_off * longest
        return jnp.where(is_null, w - null, w)

    w, pushed = inverse.map(without_null, jnp.stack([w, pushed]))
    return w, rest, pushed


def _with_steps(solution: Solution, info: SolverInfo) -> Solution:
    """The solution with the steps of CG, and whether they were too few."""
    is_short = (info.status == SolverStatus.MAX_STEPS) & (
        solution.info.status == SolverStatus.STAGNATED
    )
    status = jnp.where(is_short, SolverStatus.MAX_STEPS, solution.info.status)
    changed = solution.info._replace(num_steps=info.num_steps, status=status)
    return solution._replace(info=changed)


def _coefficients(
    fisher: Any, coefficients: PyTree | None
) -> tuple[Array, Callable[[Array], PyTree]]:
    """The vector of w, zero where it is not known; and the way back."""
    like = jax.eval_shape(fisher.sqrt_matvec, fisher.params)
    if coefficients is None:
        coefficients = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    tree.check_like(
        coefficients, like, name="coefficients", like_name="fisher.sqrt_matvec(params)"
    )
    return ravel_real(coefficients)


def _round_off(fisher: Any) -> float:
    """The relative round-off of a product with A: wide except for narrow casts."""
    wide = float(jnp.finfo(working_dtype(fisher)).eps)
    return max(_ROUND_OFF * wide, 2 * precision(fisher))
