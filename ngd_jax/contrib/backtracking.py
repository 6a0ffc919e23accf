"""Conjugate gradients that stop and backtrack as in Martens' Hessian-free method.

    φ(x) = ½ xᵀ(F + λI)x - gᵀx

Two rules for large batches and many steps. φ, which the step is meant to lower, may
stop improving while the residual is still large: then stop. And late iterates may still
lower φ on this batch but no longer the loss: then go back to an earlier one. Knows how
to watch `CG`, not how it works.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.solvers.cg import CG
from ngd_jax.solvers.protocol import RightHandSide, Solution, SolverStatus
from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = ["BacktrackingCG", "checkpoints"]

# Martens 2010: progress over k = max(10, ⌈0.1 i⌉) steps; iterates of steps ⌈1.3ʲ⌉.
_SHORTEST_WINDOW = 10
_STEPS_FOR_EACH_OF_WINDOW = 10
_GROWTH = 1.3


@dataclasses.dataclass(frozen=True)
class BacktrackingCG(CG):
    """CG with the rule of progress and the backtracking of Martens 2010.

    Attributes:
      max_steps, rtol, preconditioner, warm_start: as in `CG`.
      progress_tol: ε; stops also at the first step i > k = max(10, ⌈0.1 i⌉) with
        φᵢ < 0 and (φᵢ - φᵢ₋ₖ) / φᵢ < k ε. None: never.
      backtracking: whether to keep the iterates of steps ⌈1.3ʲ⌉ and the last, and to
        return the one reached by going back from the last while the loss falls (NaN is
        the worst loss). Needs the loss; costs log(max_steps) / log(1.3) vectors of
        memory, 20 for 250 steps, and at most as many evaluations of the loss.

    Raises:
      ValueError: for a `progress_tol` that is not positive, and as in `CG`.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
      ... )
      >>> solver = BacktrackingCG(backtracking=False)
      >>> d, info = solver(fisher, jnp.array([[12.0], [17.0]]), damping=0.0)
      >>> d.ravel().round(2)
      Array([1., 1.], dtype=float32)

    References:
      Martens, Deep learning via Hessian-free optimization, 2010, sections 4.4
      (`progress_tol`, 5e-4 there, and no other rule, so `rtol` = 0) and 4.6
      (`backtracking`).
    """

    max_steps: int = 250
    rtol: float = 0.0
    progress_tol: float | None = 5e-4
    backtracking: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.progress_tol is not None and not self.progress_tol > 0:
            raise ValueError(
                f"`progress_tol` must be positive, or None for no such rule, got "
                f"{self.progress_tol}."
            )

    @property
    def uses_objective(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether `solve` needs the loss."""
        return self.backtracking

    def solve(
        self, fisher: Any, rhs: RightHandSide, *, damping: ArrayLike, state: PyTree = ()
    ) -> Solution:
        """Solves (F + λI) d = g; see `Solver`. Uses the guess and the objective.

        Raises:
          ValueError: for backtracking without an objective.
        """
        objective = rhs.objective if self.backtracking else None
        if self.backtracking and objective is None:
            raise ValueError(
                "BacktrackingCG(backtracking=True) needs the loss: give `loss_fn` to "
                "natural_gradient, or call tx.update(..., value_fn=value_fn) with "
                "value_fn(params, batch). Or set backtracking=False."
            )
        watch = _Watch(self.max_steps, self.progress_tol, self.backtracking)
        solution, seen = self._observed(fisher, rhs, damping, state, watch)
        return solution if objective is None else _step_back(solution, seen, rhs, watch)


class _Seen(NamedTuple):
    """The state carried from step to step.

    Attributes:
      models: `[window + 1]`, φ after step i, at index i modulo its length.
      iterates: packed, with a leading axis of checkpoints; () if none are kept.
      residuals: `[checkpoints]`, ‖g - (F + λI) x‖ of each.
    """

    models: Array
    iterates: PyTree
    residuals: Array


@dataclasses.dataclass(frozen=True)
class _Watch:
    """The `Observer` of CG; options as in `BacktrackingCG`."""

    max_steps: int
    progress_tol: float | None
    keeps: bool

    def init(self, x: PyTree) -> _Seen:
        """Before the first step."""
        dtype = tree.accumulator_dtype(x)
        slots = len(checkpoints(self.max_steps))
        window = max(-(-self.max_steps // _STEPS_FOR_EACH_OF_WINDOW), _SHORTEST_WINDOW)
        iterates = ()
        if self.keeps:
            iterates = jax.tree.map(
                lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype), x
            )
        return _Seen(
            jnp.zeros((window + 1,), dtype), iterates, jnp.zeros((slots,), dtype)
        )

    def update(
        self, carry: _Seen, num_steps: Array, x: PyTree, residual: Array, model: Array
    ) -> tuple[_Seen, Array]:
        """Records a step, and says whether the model has stopped improving."""
        seen, length = carry, len(carry.models)
        models = seen.models.at[num_steps % length].set(model)
        seen = seen._replace(models=models)
        if self.keeps:
            seen = self.write(seen, num_steps, x, residual)
        if self.progress_tol is None:
            return seen, jnp.asarray(False)
        # (φᵢ - φᵢ₋ₖ) / φᵢ < k ε without the division.
        tenth = -(-num_steps // _STEPS_FOR_EACH_OF_WINDOW)
        window = jnp.maximum(tenth, _SHORTEST_WINDOW)
        gain = models[(num_steps - window) % length] - model
        is_small = gain < -window.astype(gain.dtype) * self.progress_tol * model
        return seen, (num_steps > window) & (model < 0) & is_small

    def write(self, seen: _Seen, num_steps: Array, x: PyTree, residual: Array) -> _Seen:
        """Writes the iterate of a step into the slot of the next checkpoint.

        Later steps overwrite it up to that checkpoint, so no test is needed, and the
        last iterate is kept whatever its number.
        """
        slot = self.slot_of(num_steps)
        iterates = jax.tree.map(
            lambda kept, leaf: kept.at[slot].set(leaf), seen.iterates, x
        )
        residuals = seen.residuals.at[slot].set(residual)
        return seen._replace(iterates=iterates, residuals=residuals)

    def slot_of(self, num_steps: Array) -> Array:
        """The number of checkpoints before a step."""
        steps = jnp.asarray(checkpoints(self.max_steps))
        return jnp.sum(num_steps > steps, dtype=jnp.int32)


def _step_back(
    solution: Solution, seen: _Seen, rhs: RightHandSide, watch: _Watch
) -> Solution:
    """The iterate reached by going back from the last while the objective falls."""
    gradient, unpack = tree.pack(rhs.gradient)
    objective: Any = rhs.objective
    norm = tree.norm(gradient)
    norm = jnp.where(norm > 0, norm, 1.0)
    # Write the last one again: it may have been replaced after its step.
    info = solution.info
    last = tree.pack(solution.direction)[0]
    seen = watch.write(seen, info.num_steps, last, info.relative_residual * norm)

    def iterate(slot: Array) -> PyTree:
        return unpack(jax.tree.map(lambda kept: kept[slot], seen.iterates))

    last_slot = watch.slot_of(info.num_steps)
    best = _walk_back(last_slot, lambda slot: objective(iterate(slot)))
    is_earlier = best < last_slot
    info = info._replace(
        relative_residual=seen.residuals[best] / norm,
        status=jnp.where(is_earlier, SolverStatus.BACKTRACKED, info.status),
    )
    return solution._replace(direction=iterate(best), pushed=None, info=info)


def checkpoints(max_steps: int) -> tuple[int, ...]:
    """The steps whose iterates are kept: ⌈1.3ʲ⌉ and the last; 8.8 log₁₀ of them."""
    steps, power = {max_steps}, 1.0
    while power <= max_steps:
        steps.add(math.ceil(power))
        power *= _GROWTH
    return tuple(sorted(step for step in steps if step <= max_steps))


def _walk_back(slot: Array, value_of: Callable[[Array], Scalar]) -> Array:
    """Goes from `slot` towards 0 while the value falls; NaN is the worst value."""

    def is_walking(carry: tuple[Array, Array, Array, Array]) -> Array:
        _, _, candidate, falls = carry
        return falls & (candidate >= 0)

    def look(
        carry: tuple[Array, Array, Array, Array],
    ) -> tuple[Array, Array, Array, Array]:
        best, best_value, candidate, _ = carry
        value = value_of(candidate).astype(best_value.dtype)
        value = jnp.where(jnp.isnan(value), jnp.inf, value)
        falls = (value < best_value) | (best_value == jnp.inf)
        best = jnp.where(falls, candidate, best)
        return best, jnp.where(falls, value, best_value), candidate - 1, falls

    dtype = jax.eval_shape(value_of, slot).dtype
    # Infinitely bad before the first look, so that the loss is compiled only once.
    start = (slot, jnp.asarray(jnp.inf, dtype), slot, jnp.asarray(True))
    return jax.lax.while_loop(is_walking, look, start)[0]
