"""What conjugate gradients can keep on the way: model values, and iterates.

    φ(x) = ½ xᵀ(A + λI)x - bᵀx,    φᵢ = φᵢ₋₁ - ½ αᵢ ⟨rᵢ₋₁, zᵢ₋₁⟩

The first serve a stopping rule: the residual may still be large when the quadratic
model, which is what the step is taken for, has long stopped improving. The second serve
backtracking: late iterates fit the quadratic model on this batch ever better, and the
loss itself no more. Both are of Martens, Deep learning via Hessian-free optimization,
2010. Knows nothing of matrices.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.types import Array, PyTree, Scalar

__all__ = [
    "Kept",
    "Progress",
    "checkpoints",
    "keep",
    "record",
    "restart",
    "slot_of",
    "start_keeping",
    "start_progress",
    "walk_back",
    "write",
]

# Martens 2010, section 4.4: over k = max(10, ⌈0.1 i⌉) steps; section 4.6: γ = 1.3.
_SHORTEST_WINDOW = 10
_STEPS_FOR_EACH_OF_WINDOW = 10
_GROWTH = 1.3


class Progress(NamedTuple):
    """The quadratic model along the way.

    Attributes:
      value: φ now.
      history: `[window + 1]`, φ of step i at i modulo its length.
    """

    value: Array
    history: Array


def start_progress(
    tolerance: float | None, max_steps: int, dtype: jnp.dtype
) -> Progress | None:
    """Before the first step from zero; None where there is no tolerance to meet."""
    if tolerance is None:
        return None
    longest = -(-max_steps // _STEPS_FOR_EACH_OF_WINDOW)
    length = max(longest, _SHORTEST_WINDOW) + 1
    return Progress(jnp.zeros((), dtype), jnp.zeros((length,), dtype))


def restart(
    progress: Progress | None, x: PyTree, b: PyTree, r: PyTree
) -> Progress | None:
    """From a residual that is not of the recurrence: φ = -½ ⟨x, b + r⟩."""
    if progress is None:
        return None
    return progress._replace(value=-(tree.vdot(x, b) + tree.vdot(x, r)) / 2)


def record(
    progress: Progress | None, step: Array, decrease: Array, tolerance: float | None
) -> tuple[Progress | None, Array | None]:
    """After step number `step`, which took `decrease` off φ; and whether that is all.

    It is where i > k, φᵢ < 0 and (φᵢ - φᵢ₋ₖ) / φᵢ < k·tolerance, here without division.
    """
    if progress is None or tolerance is None:
        return None, None
    length = len(progress.history)
    value = progress.value - decrease
    history = progress.history.at[step % length].set(value)
    tenth = -(-step // _STEPS_FOR_EACH_OF_WINDOW)
    window = jnp.maximum(tenth, _SHORTEST_WINDOW)
    gain = history[(step - window) % length] - value
    is_small = gain < -window.astype(gain.dtype) * tolerance * value
    return Progress(value, history), (step > window) & (value < 0) & is_small


class Kept(NamedTuple):
    """Iterates by slot, and how good a solution each is.

    Attributes:
      iterates: a tree with a leading axis of slots.
      residuals: `[slots]`.
    """

    iterates: PyTree
    residuals: Array

    def iterate(self, slot: Array) -> PyTree:
        """The iterate in `slot`."""
        return jax.tree.map(lambda leaf: leaf[slot], self.iterates)


def checkpoints(max_steps: int) -> tuple[int, ...]:
    """The steps whose iterates stay: ⌈1.3ʲ⌉ and the last; about 8.8 log₁₀ of them."""
    steps, power = {max_steps}, 1.0
    while power <= max_steps:
        steps.add(math.ceil(power))
        power *= _GROWTH
    return tuple(sorted(step for step in steps if step <= max_steps))


def start_keeping(
    wanted: bool, x: PyTree, max_steps: int, dtype: jnp.dtype
) -> Kept | None:
    """Room for the iterates of `checkpoints`, each like `x`, if they are wanted."""
    if not wanted:
        return None
    slots = len(checkpoints(max_steps))
    iterates = jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype), x)
    return Kept(iterates, jnp.zeros((slots,), dtype))


def keep(
    kept: Kept | None, step: Array, max_steps: int, x: PyTree, residual: Array
) -> Kept | None:
    """Writes the iterate of a step into the slot of the next checkpoint.

    Later steps overwrite it up to that checkpoint, so that no test is needed, and the
    last iterate is there whatever its number.
    """
    if kept is None:
        return None
    return write(kept, slot_of(step, max_steps), x, residual)


def write(kept: Kept, slot: Array, x: PyTree, residual: Array) -> Kept:
    """Replaces what is in `slot`."""
    iterates = jax.tree.map(
        lambda all_of, one: all_of.at[slot].set(one), kept.iterates, x
    )
    return Kept(iterates, kept.residuals.at[slot].set(residual))


def slot_of(step: Array, max_steps: int) -> Array:
    """The number of checkpoints before `step`."""
    return jnp.sum(step > jnp.asarray(checkpoints(max_steps)), dtype=jnp.int32)


def walk_back(slot: Array, value_of: Callable[[Array], Scalar]) -> Array:
    """Goes from `slot` towards 0 while the value falls; a NaN is the worst value.

    Args:
      slot: where to start.
      value_of: slot -> its value.

    Returns:
      The slot that was reached.
    """

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
