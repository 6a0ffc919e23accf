"""Many steps per dispatch: a loop that compiles once for any number of steps.

The number of steps of a dispatch is an argument, not a shape: however a run is cut into
dispatches, the same compiled program runs. That is why a run can stop anywhere and
continue to the same numbers, bit for bit.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

__all__ = ["fix_types", "match_types", "take_steps"]

Carry = TypeVar("Carry")
Records = dict[str, jax.Array]


def take_steps(
    take_step: Callable[[Carry, jax.Array], tuple[Carry, Records]],
    carry: Carry,
    num_steps: jax.Array,
    capacity: int,
) -> tuple[Carry, Records]:
    """Takes `num_steps <= capacity` steps, by a scan of length `capacity`.

    Args:
      take_step: (carry, index) -> (carry, records of the step).
      carry: what is passed from step to step; its types do not change.
      num_steps: number of steps to take.
      capacity: largest number of steps.

    Returns:
      The last carry, and records with a leading axis of length `capacity`, of which
      only the first `num_steps` are valid; the others are zero.
    """
    _, record = jax.eval_shape(take_step, carry, jnp.int32(0))
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), record)
    return jax.lax.scan(
        lambda carry, index: jax.lax.cond(
            index < num_steps,
            lambda carry: take_step(carry, index),
            lambda carry: (carry, blank),
            carry,
        ),
        carry,
        jnp.arange(capacity, dtype=jnp.int32),
    )


def fix_types(tree: Any) -> Any:
    """Makes weak types strong, since a checkpoint would not restore them."""
    return jax.tree.map(lambda leaf: _cast(leaf, leaf), tree)


def match_types(tree: Any, old_tree: Any) -> Any:
    """Casts the leaves of `tree` to the dtypes of the leaves of `old_tree`."""
    return jax.tree.map(_cast, tree, old_tree)


def _cast(leaf: Any, like: jax.Array) -> Any:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return leaf
    return jax.lax.convert_element_type(leaf, like.dtype)
