"""What every solver takes and what every solver reports."""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = [
    "Solver",
    "SolverInfo",
    "SolverStatus",
    "SolverWithImages",
    "StatefulSolver",
    "check_system",
    "forward_only",
]


class SolverStatus(enum.IntEnum):
    """How a solve ended; `message` says it in words.

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
        """One sentence for a person."""
        return _MESSAGES[self]


_MESSAGES = {
    SolverStatus.CONVERGED: "The residual is within the tolerance.",
    SolverStatus.MAX_STEPS: (
        "The step budget was used; the solution is the last iterate."
    ),
    SolverStatus.BREAKDOWN: (
        "The matrix is not positive definite to working precision; the solution is the "
        "last iterate before that, zero if there was none. More damping helps."
    ),
    SolverStatus.NON_FINITE: (
        "The right-hand side or a product with the matrix is not finite; the solution "
        "is the last finite iterate, zero if there was none."
    ),
    SolverStatus.STAGNATED: (
        "Round-off keeps the true residual above the tolerance; more steps do not help."
    ),
    SolverStatus.NOT_SEPARABLE: (
        "The model mixes its examples (as batch normalisation in training does), so "
        "that there are no rows of single examples; solvers on products, such as CG, "
        "have no need of them."
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
      relative_residual: ‖g - (F + λI) d‖ / ‖g‖, 0 for g = 0, 1 where d = 0 is returned
        for want of anything better; infinity where it was not computed.
      status: int32, a `SolverStatus`.
    """

    num_steps: Array
    relative_residual: Array
    status: Array


@runtime_checkable
class Solver(Protocol):
    """A solver of (F + λI) d = g."""

    def __call__(
        self,
        fisher: Any,
        rhs: PyTree,
        *,
        damping: ArrayLike,
        x0: PyTree | None = None,
    ) -> tuple[PyTree, SolverInfo]:
        """Solves for d.

        Args:
          fisher: the operator, an `ngd_jax.Fisher`.
          rhs: g, a tree of the structure of the parameters.
          damping: λ ≥ 0, a scalar in units of F (a mean over examples).
          x0: where to start from, for solvers that iterate; direct solvers have no use
            for it.

        Returns:
          d in the structure and the dtypes of `rhs`, always finite; and the report.
        """
        ...


@runtime_checkable
class StatefulSolver(Solver, Protocol):
    """A solver that keeps something between steps, or uses more than g.

    The transformation calls `init` and `solve` of a solver that has them, and keeps the
    state in `NaturalGradientState.solver_state`; calling the solver itself starts anew
    each time. A solver of this kind inherits from this class and defines `solve`, and
    `init` where it keeps something.

    Example:
      >>> import jax, jax.numpy as jnp, ngd_jax as ngd
      >>> class Diagonal(StatefulSolver):
      ...     def solve(self, fisher, rhs, *, damping, state=(), **hints):
      ...         d = jax.tree.map(
      ...             lambda g, f: g / (f + damping), rhs, fisher.diagonal()
      ...         )
      ...         left = rhs - fisher.matvec(d) - damping * d
      ...         residual = jnp.linalg.norm(left) / jnp.linalg.norm(rhs)
      ...         info = SolverInfo(jnp.int32(0), residual, jnp.int32(0))
      ...         return d, info, state
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x * w, jnp.ones(2), jnp.array([[1.0, 3.0]]), ngd.Gaussian()
      ... )
      >>> Diagonal()(fisher, jnp.array([2.0, 20.0]), damping=1.0)[0]
      Array([1., 2.], dtype=float32)
    """

    def __call__(
        self,
        fisher: Any,
        rhs: PyTree,
        *,
        damping: ArrayLike,
        x0: PyTree | None = None,
    ) -> tuple[PyTree, SolverInfo]:
        """Solves (F + λI) d = g, keeping nothing; see `Solver`."""
        return self.solve(fisher, rhs, damping=damping, x0=x0)[:2]

    def init(self, params: PyTree) -> PyTree:
        """The state before the first solve, a tree of arrays; () for none."""
        del params
        return ()

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
        """Solves for d.

        Args:
          fisher, rhs, damping, x0: as in `Solver`.
          coefficients: w with g = Aᵀ w but for round-off or a small rest, where that
            is known (see `Fisher.sqrt_solve`): g in the space of outputs, in which
            small damping does not lose it. `rhs` remains what is solved for.
          objective: d -> the loss that a step along -d leads to, where it is known.
          state: what the last solve or `init` returned.

        Returns:
          d, the report, and the next state, of the structure and dtypes of `state`.
        """
        ...

    def solve_with_image(
        self,
        fisher: Any,
        rhs: PyTree,
        *,
        damping: ArrayLike,
        x0: PyTree | None = None,
        coefficients: PyTree | None = None,
        objective: Callable[[PyTree], Scalar] | None = None,
        state: PyTree = (),
    ) -> tuple[PyTree, PyTree | None, SolverInfo, PyTree]:
        """The same with J d, if the solve has come by it.

        The transformation needs dᵀFd, which costs a `jvp` of the model where nobody
        knows J d. A solver that does defines this method too.

        Returns:
          d; J d as of `fisher.pushforward`, float32 or wider, or None; the report; the
          state.
        """
        solution, info, state = self.solve(
            fisher,
            rhs,
            damping=damping,
            x0=x0,
            coefficients=coefficients,
            objective=objective,
            state=state,
        )
        return solution, None, info, state


class SolverWithImages(StatefulSolver, Protocol):
    """A solver that comes by J d, and defines `solve_with_image` alone."""

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
        solution, _, info, state = self.solve_with_image(
            fisher,
            rhs,
            damping=damping,
            x0=x0,
            coefficients=coefficients,
            objective=objective,
            state=state,
        )
        return solution, info, state


def check_system(rhs: PyTree, damping: ArrayLike, x0: PyTree | None) -> None:
    """Raises at trace time on arguments that no solver can take.

    Raises:
      ValueError: on a negative or non-scalar damping, or an `x0` unlike `rhs`.
    """
    if jnp.shape(damping) != ():
        raise ValueError(
            f"`damping` must be a scalar, got an array of shape {jnp.shape(damping)}."
        )
    if isinstance(damping, int | float) and not damping >= 0:
        raise ValueError(f"`damping` must not be negative, got {damping}.")
    if x0 is not None:
        tree.check_like(x0, rhs, name="x0", like_name="rhs")


def forward_only(
    values: PyTree,
    *,
    what: str,
    instead: str = "Stop the gradient at its result with jax.lax.stop_gradient, or "
    "wrap the solve in jax.lax.custom_linear_solve.",
) -> PyTree:
    """The identity, but for reverse-mode differentiation, which it refuses in words.

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
