"""The direction of a step: what is solved for, in which coordinates, from which start.

    (F + λI) e = g - μ F p,    d = e + μ p      ⇔      (F + λI) d = g + λ μ p

The proximal momentum is written as a correction e to the previous direction p, so that
it keeps its digits at any λ, and its limit for λ → 0: of all d that fit the batch, the
one nearest to μ p. The same in the space of coefficients: w - μ A p.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from ngd_jax import tree
from ngd_jax.fisher import Fisher
from ngd_jax.quadratic_model import QuadraticModelRate, minimize_quadratic_model
from ngd_jax.solvers import Solver, SolverInfo, StatefulSolver
from ngd_jax.types import ArrayLike, PyTree, Scalar

__all__ = ["Direction", "Hints", "find_direction", "rescale"]


class Hints(NamedTuple):
    """What a solver may be told beside the gradient.

    Attributes:
      coefficients: w with g = Aᵀ w, or None.
      objective: d -> loss after the step, or None.
    """

    coefficients: PyTree | None = None
    objective: Callable[[PyTree], Scalar] | None = None


class Direction(NamedTuple):
    """What came of a solve.

    Attributes:
      direction: d, float32 or wider, in the coordinates of the damping.
      info: how the solve went.
      solver_state: what the solver keeps.
      image: J d, float32 or wider, where someone has come by it, else None.
    """

    direction: PyTree
    info: SolverInfo
    solver_state: PyTree
    image: PyTree | None


def find_direction(
    solver: Solver,
    fisher: Fisher,
    gradient: PyTree,
    *,
    damping: Scalar,
    previous: PyTree,
    momentum: ArrayLike,
    warm_start: ArrayLike,
    hints: Hints,
    solver_state: PyTree,
) -> Direction:
    """Solves for the natural direction; all in the coordinates of `fisher`.

    Args:
      solver: any solver.
      fisher: F.
      gradient: g.
      damping: λ.
      previous: p, the direction of the last step.
      momentum: μ; a Python 0 for none.
      warm_start: the solver starts from this multiple of p; a Python 0 for zero.
      hints: for solvers that have a use for them.
      solver_state: what the solver returned last time.
    """
    start, pulled, pulled_image = None, None, None
    if not _is_static_zero(momentum):
        pulled = tree.scale(momentum, previous)
        product, pulled_image = fisher.matvec_with_image(pulled)
        gradient = tree.axpy(-1.0, product, gradient)
        hints = _shift(hints, fisher, pulled)
    elif not _is_static_zero(warm_start):
        start = tree.scale(warm_start, previous)

    image = None
    if isinstance(solver, StatefulSolver):
        direction, image, info, solver_state = solver.solve_with_image(
            fisher,
            gradient,
            damping=damping,
            x0=start,
            coefficients=hints.coefficients,
            objective=hints.objective,
            state=solver_state,
        )
    else:
        direction, info = solver(fisher, gradient, damping=damping, x0=start)
    if pulled is not None:
        direction = tree.axpy(1.0, direction, pulled)
        if image is not None:
            image = tree.axpy(1.0, tree.widen(pulled_image), image)
    return Direction(direction, info, solver_state, image)


def _shift(hints: Hints, fisher: Fisher, pulled: PyTree) -> Hints:
    coefficients, objective = hints
    if coefficients is not None:
        image = fisher.sqrt_matvec(pulled)
        coefficients = jax.tree.map(lambda w, a: w - a, coefficients, image)
    if objective is None:
        return Hints(coefficients)
    return Hints(coefficients, lambda e: objective(tree.axpy(1.0, e, pulled)))


def rescale(
    rate: QuadraticModelRate,
    fisher: Fisher,
    gradient: PyTree,
    found: Direction,
    *,
    previous: PyTree,
    damping: Scalar,
) -> Direction:
    """The direction at the rate and the momentum of the quadratic model."""
    combined, image = minimize_quadratic_model(
        fisher.pushforward,
        gradient,
        found.direction,
        previous if rate.momentum else None,
        damping,
        image=found.image,
        inner=fisher.inner,
    )
    return found._replace(direction=combined, image=image)


def _is_static_zero(value: ArrayLike) -> bool:
    return isinstance(value, int | float) and value == 0
