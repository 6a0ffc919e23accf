"""What every solver of (F + λI) d = g takes and returns, and how it is checked.

    relative residual  ‖g - (F + λI) d‖ / ‖g‖,    F v = `fisher.matvec(v)`

Scale and finiteness are handled here, once, around the `solve` of any solver; and here
a direct solver's solution is checked against the operator itself, whatever matrix it
came from. Knows nothing of how a solver works, nor of steps.
"""

import abc
import enum
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.metric import check_count
from ngd_jax.types import Array, ArrayLike, Params, PyTree, Scalar

__all__ = [
    "RightHandSide",
    "Solution",
    "Solver",
    "SolverInfo",
    "SolverStatus",
    "check_budget",
    "check_solution",
    "first_cause",
    "forward_only",
    "solve_scaled",
]

# The round-off of computing a residual, in units of ε (‖g‖ + ‖F + λI‖ ‖d‖).
_ROUND_OFF = 100.0


class SolverStatus(enum.IntEnum):
    """How a solve ended; `message` puts it into words.

    Example:
      >>> print(SolverStatus(1).message)
      The step budget was used; the solution is the last iterate.
    """

    CONVERGED = 0
    MAX_STEPS = 1
    BREAKDOWN = 2
    NON_FINITE = 3
    STAGNATED = 4
    NOT_SEPARABLE = 5
    SETTLED = 6
    BACKTRACKED = 7
    UNCHECKED = 8

    @property
    def message(self) -> str:
        """The status as a sentence."""
        return _MESSAGES[self]


_MESSAGES = {
    SolverStatus.CONVERGED: "The residual is within the tolerance.",
    SolverStatus.MAX_STEPS: (
        "The step budget was used; the solution is the last iterate."
    ),
    SolverStatus.BREAKDOWN: (
        "The matrix is not positive definite to working precision; the solution is the "
        "last iterate before that, or zero. More damping helps."
    ),
    SolverStatus.NON_FINITE: (
        "The right-hand side, a product with the matrix or the solution is not finite; "
        "the solution is the last finite iterate, or zero."
    ),
    SolverStatus.STAGNATED: (
        "Round-off keeps the true residual above the tolerance; more steps do not help."
    ),
    SolverStatus.NOT_SEPARABLE: (
        "Refused: the solution does not solve the system of the model itself. The "
        "model mixes its examples (as batch normalisation does in training), so that "
        "the rows of single examples are not those of the batch. Use Cholesky for few "
        "parameters, or CG or LSMR, which only need products. From Cholesky itself, "
        "which needs no rows, it means round-off: use more damping, or float64."
    ),
    SolverStatus.SETTLED: (
        "The quadratic model has stopped improving; further steps gain less than "
        "`progress_tol` asks for."
    ),
    SolverStatus.BACKTRACKED: (
        "An earlier iterate than the last has the lower loss, and is the solution."
    ),
    SolverStatus.UNCHECKED: (
        "The solution is that of an approximation of the matrix; its residual was not "
        "computed."
    ),
}


class SolverInfo(NamedTuple):
    """How a solve went.

    Attributes:
      num_steps: int32, iterations taken; 0 for direct solvers.
      relative_residual: ‖g - (F + λI) d‖ / ‖g‖ by a product with F itself; 0 for g = 0,
        1 where d = 0 is returned for lack of anything better, infinity where it was not
        computed.
      status: int32, a `SolverStatus`.
    """

    num_steps: Array
    relative_residual: Array
    status: Array


class RightHandSide(NamedTuple):
    """The gradient g, and what else is known about it.

    Attributes:
      gradient: g, a tree like the parameters, float32 or wider.
      coefficients: w with g = Aᵀ w, up to round-off or a small rest, or None: g in the
        space of outputs, where small damping does not lose it to round-off (see
        `Fisher.sqrt_solve`). Solvers still solve for `gradient`.
      guess: a first guess, whose best multiple is used, or None.
      objective: d -> the loss after a step along -d, or None.
      unit: what g was divided by; d times `unit` solves the original system.
    """

    gradient: PyTree
    coefficients: PyTree | None = None
    guess: PyTree | None = None
    objective: Callable[[PyTree], Scalar] | None = None
    unit: ArrayLike = 1.0


class Solution(NamedTuple):
    """The result of a solver.

    Attributes:
      direction: d, like the gradient.
      pushed: J d, as from `Fisher.pushforward`, if the solver computed it, else None.
      info: how the solve went.
      state: what the solver keeps for the next solve.
      damping: λ, from a solver that chooses it; else None.
      length: the length s of the step, from a solver that chooses it; else None.
      largest: max |dᵢ|, up to its last digits, NaN or infinite if an entry is; from a
        solver that knows it, else set by `solve_scaled`.
    """

    direction: PyTree
    pushed: PyTree | None
    info: SolverInfo
    state: PyTree
    damping: Array | None = None
    length: Array | None = None
    largest: Array | None = None


class Solver(abc.ABC):
    """A solver of (F + λI) d = g; define `solve`, and `init` if it keeps something.

    Attributes:
      uses_coefficients: whether `solve` uses `rhs.coefficients`.
      uses_objective: whether `solve` needs `rhs.objective`.
      warm_start: the guess that the transformation passes is this multiple of the last
        direction; 0 for none.

    Example:
      >>> import jax, jax.numpy as jnp, ngd_jax as ngd
      >>> class Richardson(ngd.Solver):
      ...     def solve(self, fisher, rhs, *, damping, state=()):
      ...         g = rhs.gradient
      ...         d = jnp.zeros_like(g)
      ...         for _ in range(20):
      ...             d += 0.2 * (g - fisher.matvec(d) - damping * d)
      ...         pushed, info, _ = ngd.check_solution(fisher, rhs, d, damping)
      ...         return ngd.Solution(d, pushed, info, state)
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x * w, jnp.ones(2), jnp.array([[1.0, 2.0]]), ngd.Gaussian()
      ... )
      >>> d, info = Richardson()(fisher, jnp.array([2.0, 10.0]), damping=1.0)
      >>> d.round(2)
      Array([1., 2.], dtype=float32)
    """

    uses_coefficients: ClassVar[bool] = False
    uses_objective: ClassVar[bool] = False
    warm_start = 0.0

    def init(self, params: Params) -> PyTree:
        """The state before the first solve, a tree of arrays; () for none."""
        del params
        return ()

    @abc.abstractmethod
    def solve(
        self, fisher: Any, rhs: RightHandSide, *, damping: ArrayLike, state: PyTree = ()
    ) -> Solution:
        """Solves for d; call the solver itself, or `solve_scaled`, not this.

        Args:
          fisher: the operator, an `ngd_jax.Fisher`.
          rhs: finite, with a largest |gᵢ| of 1 (or g = 0); the guess likewise.
          damping: λ ≥ 0, a scalar in units of F (a mean over examples).
          state: what the last solve or `init` returned; () starts afresh.

        Returns:
          The solution. If its direction is not finite, it becomes zero.
        """

    def __call__(
        self,
        fisher: Any,
        gradient: PyTree,
        *,
        damping: ArrayLike,
        guess: PyTree | None = None,
    ) -> tuple[PyTree, SolverInfo]:
        """Solves (F + λI) d = g from scratch.

        Args:
          fisher: the operator, an `ngd_jax.Fisher`.
          gradient: g, a tree of the structure of the parameters.
          damping: λ ≥ 0, a scalar in units of F (a mean over examples).
          guess: where to start from, for solvers that iterate.

        Returns:
          d in the structure and the dtypes of `gradient`, always finite; the report.

        Raises:
          ValueError: for a damping that is negative or not a scalar, or a guess unlike
            `gradient`.
        """
        rhs = RightHandSide(tree.widen(gradient), guess=guess)
        solution = solve_scaled(self, fisher, rhs, damping=damping)
        direction = optax.tree.cast_like(solution.direction, gradient)
        return forward_only(direction, what=type(self).__name__), solution.info


def solve_scaled(
    solver: Solver,
    fisher: Any,
    rhs: RightHandSide,
    *,
    damping: ArrayLike,
    state: PyTree = (),
) -> Solution:
    """Calls `solver.solve` with g in units of its largest entry.

    The square of g itself could over- or underflow. A right-hand side or a direction
    that is not finite gives d = 0 with status NON_FINITE, and g = 0 gives d = 0.

    Args:
      solver: any solver.
      fisher: the operator.
      rhs: the right-hand side, float32 or wider.
      damping: λ ≥ 0.
      state: of the solver.

    Raises:
      ValueError: for a damping that is negative or not a scalar, or a guess unlike g.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x * w, jnp.ones(2), jnp.array([[1.0, 2.0]]), ngd.Gaussian()
      ... )
      >>> rhs = ngd.RightHandSide(jnp.array([2e30, 10e30]))
      >>> solution = solve_scaled(ngd.CG(), fisher, rhs, damping=1.0)
      >>> (solution.direction / 1e30).round(2)
      Array([1., 2.], dtype=float32)
    """
    _check_system(rhs, damping)
    tree.check_parameters(rhs.gradient, name="gradient")
    dtype = tree.accumulator_dtype(rhs.gradient)
    damping = jnp.asarray(damping).astype(dtype)
    largest = tree.max_abs(rhs.gradient)
    unit = tree.usable_unit(largest)
    is_finite = jnp.isfinite(largest) & jnp.isfinite(damping)
    coefficients, guess, objective = rhs.coefficients, rhs.guess, rhs.objective
    if coefficients is not None:
        is_finite &= jnp.isfinite(tree.max_abs(coefficients))
    if guess is not None:
        guess, _, largest_guess = tree.in_units(tree.widen(guess))
        is_finite &= jnp.isfinite(largest_guess)

    def sound(values: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.where(is_finite, x, 0), values)

    scaled = RightHandSide(
        gradient=sound(tree.divide(rhs.gradient, unit)),
        coefficients=(
            None if coefficients is None else sound(tree.divide(coefficients, unit))
        ),
        guess=None if guess is None else sound(guess),
        objective=(
            None if objective is None else lambda d: objective(tree.scale(unit, d))
        ),
        unit=unit,
    )
    solution = solver.solve(fisher, scaled, damping=damping, state=state)

    direction = tree.scale(unit, solution.direction)
    if solution.largest is None:
        largest_direction = tree.max_abs(direction)
    else:
        largest_direction = unit * solution.largest
    is_sound = is_finite & jnp.isfinite(largest_direction)
    is_solved = largest == 0
    is_taken = is_sound & ~is_solved

    def taken(values: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.where(is_taken, x, 0), values)

    num_steps, residual, status = solution.info
    residual = jnp.where(is_solved, 0.0, jnp.where(is_sound, residual, 1.0))
    refused = jnp.where(is_solved, SolverStatus.CONVERGED, SolverStatus.NON_FINITE)
    status = jnp.where(is_taken, status, refused)
    pushed = solution.pushed
    return solution._replace(
        direction=taken(direction),
        pushed=None if pushed is None else taken(tree.scale(unit, pushed)),
        info=SolverInfo(
            jnp.asarray(num_steps, jnp.int32),
            residual.astype(dtype),
            status.astype(jnp.int32),
        ),
        largest=jnp.where(is_taken, largest_direction, 0),
    )


def _check_system(rhs: RightHandSide, damping: ArrayLike) -> None:
    if jnp.shape(damping) != ():
        raise ValueError(
            f"`damping` must be a scalar, got an array of shape {jnp.shape(damping)}."
        )
    if isinstance(damping, int | float) and not damping >= 0:
        raise ValueError(f"`damping` must not be negative, got {damping}.")
    if rhs.guess is not None:
        tree.check_like(rhs.guess, rhs.gradient, name="guess", like_name="gradient")


def check_solution(
    fisher: Any,
    rhs: RightHandSide,
    direction: PyTree,
    damping: ArrayLike,
    *,
    own_residual: ArrayLike = 0.0,
    size: ArrayLike = 0.0,
) -> tuple[PyTree, SolverInfo, Array]:
    """Checks a solution against the operator itself, at the cost of one product.

    A residual is allowed up to √ε, and above that up to what the precision explains:

        ‖g - (F + λI) d‖  ≤  2 ‖g - (M + λI) d‖ + 100 ε (‖g‖ + ‖M + λI‖ ‖d‖)

    with M the matrix that the solver worked with. If M is not F, because M was made for
    another kind of model, the left side is larger, and the solution is not taken.

    Args:
      fisher: the operator.
      rhs: g; the units of `solve_scaled`.
      direction: d.
      damping: λ.
      own_residual: ‖g - (M + λI) d‖ / ‖g‖, by the solver's own matrix.
      size: ‖M‖, or something of that size.

    Returns:
      J d; the report, with status CONVERGED, STAGNATED or NOT_SEPARABLE; and whether
      the solution may be taken.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x * w, jnp.ones(2), jnp.array([[1.0, 2.0]]), ngd.Gaussian()
      ... )
      >>> rhs = ngd.RightHandSide(jnp.array([0.2, 1.0]))
      >>> for d in ([0.1, 0.2], [0.2, 1.0]):
      ...     _, info, is_taken = check_solution(fisher, rhs, jnp.array(d), 1.0)
      ...     print(ngd.SolverStatus(int(info.status)).name, bool(is_taken))
      CONVERGED True
      NOT_SEPARABLE False
    """
    gradient = rhs.gradient
    dtype = tree.accumulator_dtype(gradient)
    eps = float(jnp.finfo(dtype).eps)
    # The narrowest dtype in which the model computes limits what F v can be.
    leaves = jax.tree.leaves((fisher.params, fisher.outputs))
    narrow = max((float(jnp.finfo(leaf.dtype).eps) for leaf in leaves), default=eps)
    product, pushed = fisher.matvec_and_push(direction)
    product = tree.axpy(damping, direction, product)
    norm = tree.norm(gradient)
    norm = jnp.where(norm > 0, norm, 1).astype(dtype)
    residual = tree.norm(tree.axpy(-1.0, product, gradient)) / norm
    # Scaled first: the squares of a short direction underflow.
    scaled = tree.scale(jnp.asarray(size) + damping, direction)
    length = tree.norm(scaled) / norm
    explained = 2 * jnp.asarray(own_residual) + _ROUND_OFF * narrow * (1 + length)
    is_converged = residual <= eps**0.5
    is_taken = is_converged | (residual <= explained)
    status = first_cause(
        (is_converged, SolverStatus.CONVERGED),
        (is_taken, SolverStatus.STAGNATED),
        otherwise=SolverStatus.NOT_SEPARABLE,
    )
    info = SolverInfo(jnp.zeros((), jnp.int32), residual.astype(dtype), status)
    return pushed, info, is_taken


def first_cause(*causes: tuple[Array, int], otherwise: int) -> Array:
    """The status of the first condition that holds; later ones are consequences."""
    status = jnp.int32(otherwise)
    # `jnp.select` would be an argmax, which takes two more kernels.
    for condition, cause in reversed(causes):
        status = jnp.where(condition, jnp.int32(cause), status)
    return status


def check_budget(max_steps: Any, rtol: float, atol: float = 0.0) -> None:
    """Raises for a budget or tolerances with which nothing can be solved.

    Raises:
      TypeError: for a step budget that is not a Python int.
      ValueError: for numbers out of range.
    """
    check_count("max_steps", max_steps)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not value >= 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")


def forward_only(
    values: PyTree,
    *,
    what: str,
    instead: str = "Stop the gradient at its result with jax.lax.stop_gradient, or "
    "wrap the solve in jax.lax.custom_linear_solve.",
) -> PyTree:
    """The identity, which rejects reverse-mode differentiation with our own error.

    Without it the error would come from the loops inside, and name none of our terms.
    Forward mode passes.
    """

    def refuse(_residual: PyTree, _cotangent: PyTree) -> PyTree:
        raise TypeError(
            f"Reverse-mode differentiation through {what} is not supported, since it "
            f"iterates an unknown number of times (lax.while_loop). {instead}"
        )

    @jax.custom_jvp
    def guard(values: PyTree) -> PyTree:
        return values

    @guard.defjvp
    def _(primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[PyTree, PyTree]:
        (tangent,) = tangents
        linear = jax.custom_derivatives.linear_call(lambda _, t: t, refuse, (), tangent)
        return primals[0], linear

    return guard(values)
