"""Solves of (F + λI) d = g in the space of samples, for many parameters.

    F = Aᵀ A,  G = A Aᵀ:    d = Aᵀ (G + λI)⁻¹ w  for g = Aᵀ w

For g from elsewhere, with any w_r and the rest r = g - Aᵀ w_r that it leaves,

    d = Aᵀ (G + λI)⁻¹ (w_r - A r / λ) + r / λ

holds exactly. It is Woodbury's formula for w_r = 0, where two terms of size ‖g‖/λ
cancel, and with w_r = G⁺ A g the formula above, where nothing does: r is then the part
of g that the samples do not span.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from ngd_jax import tree
from ngd_jax.fisher.coefficients import ravel_real
from ngd_jax.fisher.gram import Gram
from ngd_jax.solvers.interface import SolverInfo, SolverStatus, check_system
from ngd_jax.solvers.positive_definite import (
    Factor,
    factorise,
    report,
    solve,
    solve_refined,
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
class SampleSpace:
    """Direct solve through the Gram matrix of the samples, for many parameters.

    With F = Aᵀ A and G = A Aᵀ, `[M, M]`, (F + λI)⁻¹ Aᵀ = Aᵀ (G + λI)⁻¹: a system of the
    size of the samples, M = N·K for N examples of K real outputs (2·N·K for complex
    ones, N for the sampled and the empirical kind), however many parameters there are.
    Exact for every likelihood, for every right-hand side, and in λ: G costs 2M²P
    operations and its factorisation M³/3; then each solve takes two to six passes
    through the linearised model, of 2/3 of a gradient each.

    Small damping: what g has outside of the span of the samples is divided by λ, and so
    is its round-off. A part of g outside that is not longer than 16 ε (‖g‖ + ‖A‖ ‖w‖),
    with the Frobenius norm of A and ε of the narrowest dtype among parameters and
    outputs, is taken for round-off and dropped. So is, at λ = 0, all of it: the
    solution is then the one of least norm, and `relative_residual` says what was left
    out. `coefficients` w, with g = Aᵀ w, spare the solver from finding them.

    The factorisation is in units of the diagonal of G + λI. Where it fails, since λ is
    below the round-off of G, it is repeated with M·ε times the diagonal added, and the
    solution refined. The report is of the system asked for, its residual computed from
    G; above the square root of the machine precision the status is STAGNATED.

    Attributes:
      block_size: examples whose rows of the Jacobian are in memory at once, twice over:
        memory is 2·block_size·K·P numbers and M². None holds 256 rows, or as many as
        fit into half a GiB. Smaller blocks cost a little time.

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
    """

    block_size: int | None = None

    uses_coefficients: ClassVar[bool] = True

    def init(self, params: PyTree) -> PyTree:
        """The state: none."""
        del params
        return ()

    def __call__(
        self,
        fisher: Any,
        rhs: PyTree,
        *,
        damping: ArrayLike,
        x0: PyTree | None = None,
    ) -> tuple[PyTree, SolverInfo]:
        """Solves (F + λI) d = g; see `Solver`. Nothing to start from, so no `x0`."""
        return self.solve(fisher, rhs, damping=damping, x0=x0)[:2]

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
        """Solves (F + λI) d = g; see `StatefulSolver`."""
        del objective
        check_system(rhs, damping, x0)
        gram = fisher.gram(self.block_size)
        solution, info = solve_in_sample_space(
            fisher, gram, rhs, damping=damping, coefficients=coefficients
        )
        _raise_where_known(info)
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
    eps = _model_eps(fisher)
    damping = jnp.asarray(damping).astype(dtype)

    # 1. Units in which the largest |gᵢ| and the largest diagonal entry of G + λI are 1.
    largest = tree.max_abs(g).astype(dtype)
    is_finite = jnp.isfinite(largest) & jnp.all(jnp.isfinite(gram.matrix))
    is_finite &= jnp.all(jnp.isfinite(w)) & jnp.isfinite(damping)
    is_solvable = is_finite & gram.is_separable & (largest > 0)
    size = jnp.max(jnp.diagonal(gram.matrix), initial=0.0) + damping
    size = jnp.where(is_solvable & (size > 0), size, 1.0)
    root = jnp.sqrt(size)
    unit = tree.usable_unit(jnp.where(is_solvable, largest, 1.0))
    zeros = optax.tree.zeros_like(g)
    g = tree.select(is_solvable, tree.divide(g, unit), zeros)
    w = jnp.where(is_solvable, w / unit * root, 0.0)
    identity = jnp.eye(len(gram.matrix), dtype=dtype)
    matrix = jnp.where(is_solvable, gram.matrix / size, identity)
    damping = damping / size

    def push(vector: PyTree) -> Array:
        return ravel_real(fisher.sqrt_matvec(vector))[0].astype(dtype) / root

    def pull(vector: Array) -> PyTree:
        return tree.divide(fisher.sqrt_rmatvec(unravel(vector)), root)

    # 2. What g is round-off of: anything shorter that is left of it is nothing.
    g_norm, a_norm = _norm(g), jnp.sqrt(jnp.trace(matrix))

    def is_nothing(rest: PyTree, w: Array) -> Array:
        return _norm(rest) <= eps * (g_norm + a_norm * jnp.linalg.norm(w))

    # 3. g = Aᵀ w + r, and A r. Far above the round-off of G any w will do.
    factor = factorise(matrix + damping * identity)
    rest = g if coefficients is None else tree.axpy(-1.0, pull(w), g)

    def push_if_any(w: Array, rest: PyTree) -> Array:
        if coefficients is None:
            return push(rest)
        return jax.lax.cond(
            is_nothing(rest, w), lambda _: jnp.zeros_like(w), push, rest
        )

    w, rest, image = jax.lax.cond(
        damping >= float(jnp.finfo(dtype).eps) ** (1 / 3) * jnp.linalg.norm(matrix),
        lambda w, rest: (w, rest, push_if_any(w, rest)),
        lambda w, rest: _split(
            matrix, factor, damping, push, pull, is_nothing, w, rest
        ),
        *(w, rest),
    )

    # 4. What the samples do not span is solved by r / λ, or dropped.
    is_kept = ~is_nothing(rest, w) & (damping > 0)
    inverse = jnp.where(is_kept, 1 / jnp.where(is_kept, damping, 1.0), 0.0)
    target = w - inverse * image
    y, residual = solve_refined(factor, target)
    solution = tree.axpy(1.0, pull(y), tree.scale(inverse, rest))

    # 5. The residual of the system asked for is Aᵀ (target - (G + λI) y) + dropped r.
    dropped = jnp.where(is_kept, 0.0, _norm(rest))
    inside = jnp.maximum(residual @ (matrix @ residual), 0.0)
    relative = jnp.sqrt(inside + dropped**2) / jnp.where(g_norm > 0, g_norm, 1.0)
    solution = tree.divide(tree.scale(unit, solution), size)
    solution, info = report(solution, rhs, relative, is_finite)
    is_mixed = is_finite & ~gram.is_separable
    return tree.select(is_solvable, solution, optax.tree.zeros_like(solution)), (
        info._replace(
            relative_residual=jnp.where(is_mixed, 1.0, info.relative_residual).astype(
                info.relative_residual.dtype
            ),
            status=jnp.where(is_mixed, SolverStatus.NOT_SEPARABLE, info.status).astype(
                jnp.int32
            ),
        )
    )


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


def _model_eps(fisher: Any) -> float:
    """The round-off of A: that of the narrowest dtype that it is computed in."""
    leaves = jax.tree.leaves((fisher.params, fisher.outputs))
    return _ROUND_OFF * float(max(jnp.finfo(leaf.dtype).eps for leaf in leaves))


def _norm(values: PyTree) -> Scalar:
    return jnp.sqrt(tree.vdot(values, values))


def _split(
    matrix: Array,
    factor: Factor,
    damping: Scalar,
    push: Callable[[PyTree], Array],
    pull: Callable[[Array], PyTree],
    is_nothing: Callable[[PyTree, Array], Array],
    w: Array,
    rest: PyTree,
) -> tuple[Array, PyTree, Array]:
    """Moves what the samples span from r to w, and takes null vectors of G out of w.

    Both need G⁺. Round-off of size ε in null vectors of G comes out of it as ε/λ; with
    √ε for λ, and refinement, it stays small and the rest of the spectrum right.
    """
    shift = float(jnp.finfo(w.dtype).eps) ** 0.5
    shifted = jax.lax.cond(
        damping >= shift,
        lambda: factor,
        lambda: factorise(matrix + shift * jnp.eye(len(matrix), dtype=w.dtype)),
    )
    shift = jnp.maximum(damping, shift)

    def is_left(carry: tuple[Array, Array, PyTree, Array]) -> Array:
        count, w, rest, _ = carry
        # Twice is enough: the second pass finds what the first one rounded.
        return (count < 2) & ~is_nothing(rest, w)

    def move(carry: tuple[Array, Array, PyTree, Array]) -> tuple[Any, ...]:
        count, w, rest, _ = carry
        image = push(rest)
        part = solve(shifted, image)
        for _ in range(_REFINEMENTS):
            part += solve(shifted, image - matrix @ part)
        rest = tree.axpy(-1.0, pull(part), rest)
        return count + 1, w + part, rest, image - matrix @ part

    start = (jnp.zeros((), jnp.int32), w, rest, jnp.zeros_like(w))
    _, w, rest, image = jax.lax.while_loop(is_left, move, start)

    # Aᵀ takes a null vector to zero, but not its product with 1/λ, whose round-off is
    # large. Without a gap in the spectrum there is no telling, and w stays as it is.
    eps = float(jnp.finfo(w.dtype).eps)
    null = w
    for _ in range(_FILTERS):
        null = shift * solve(shifted, null)
    size = _ROUND_OFF * eps * jnp.trace(matrix) * jnp.linalg.norm(null)
    is_null = jnp.linalg.norm(matrix @ null) <= size
    return jnp.where(is_null, w - null, w), rest, image


def _raise_where_known(info: SolverInfo) -> None:
    """Outside of jit, a status that only another solver can cure is an error.

    Raises:
      ValueError: where the model mixes its examples.
    """
    if isinstance(info.status, Tracer):
        return
    if int(info.status) == SolverStatus.NOT_SEPARABLE:
        raise ValueError(SolverStatus.NOT_SEPARABLE.message)
