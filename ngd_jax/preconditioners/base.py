"""What every preconditioner is, and when it is built anew."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.types import Array, ArrayLike, KeyArray, MatVec, Params, PyTree

__all__ = [
    "Preconditioner",
    "check_key",
    "prepare",
    "random_like",
    "refresh",
]

_State = TypeVar("_State", bound=Any)


@runtime_checkable
class Preconditioner(Protocol):
    """A way to build v -> M⁻¹ v, with a state that outlives a step."""

    def init(self, params: Params) -> PyTree:
        """The state before anything is built, with which M is a multiple of I."""
        ...

    def prepare(
        self, fisher: Any, state: PyTree, damping: ArrayLike
    ) -> tuple[MatVec, PyTree]:
        """The map v -> M⁻¹ v for this step, and the state after it.

        The map is symmetric positive definite, float32 or wider. What it needs is built
        anew if that is due; a build that is not finite changes nothing, and is tried
        again in the next step.
        """
        ...

    def __call__(self, fisher: Any, damping: ArrayLike) -> MatVec:
        """The same, built for this Fisher and not kept."""
        ...


def prepare(
    preconditioner: Preconditioner | Callable[[Any, ArrayLike], MatVec],
    fisher: Any,
    state: PyTree,
    damping: ArrayLike,
) -> tuple[MatVec, PyTree]:
    """The map v -> M⁻¹ v for this step, and the state; () where nothing is kept."""
    is_empty = isinstance(state, tuple) and not state
    if isinstance(preconditioner, Preconditioner) and not is_empty:
        return preconditioner.prepare(fisher, state, damping)
    return preconditioner(fisher, damping), state


def refresh(
    state: _State, refresh_every: int, build: Callable[[_State], _State]
) -> _State:
    """Builds anew if it is time, else counts the step."""
    if refresh_every == 1:
        return _rebuild(state, build)
    return jax.lax.cond(
        state.age >= refresh_every,
        lambda state: _rebuild(state, build),
        lambda state: state._replace(age=state.age + 1),
        state,
    )


def _rebuild(state: _State, build: Callable[[_State], _State]) -> _State:
    """`build(state)` where that is finite, else the old, still due."""
    built = build(state)
    is_finite = tree.all_finite(built)
    built = built._replace(age=jnp.ones_like(state.age))
    # Counted either way: the next attempt has other random numbers.
    return tree.select(is_finite, built, state)._replace(
        num_builds=state.num_builds + 1
    )


def check_key(key: Any, what: str) -> None:
    """Raises TypeError unless `key` is a typed key."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{what} needs `key`, a typed key such as jax.random.key(0), got "
            f"{type(key).__name__}."
        )


def random_like(sample: Callable[..., Array], key: KeyArray, like: PyTree) -> PyTree:
    """Independent samples shaped like a tree, in both parts of what is complex."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, max(1, len(leaves)))

    def draw(key: KeyArray, leaf: Any) -> Array:
        real = jnp.finfo(leaf.dtype).dtype
        if not jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            return sample(key, leaf.shape, real)
        parts = sample(key, (2, *leaf.shape), real)
        return jax.lax.complex(parts[0], parts[1])

    drawn = [draw(key, leaf) for key, leaf in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(structure, drawn)
