"""What a preconditioner M of CG is, and when it is built anew."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.types import ArrayLike, MatVec, Params, PyTree

__all__ = ["Preconditioner", "check_key", "prepare", "refresh"]

_State = TypeVar("_State", bound=Any)


@runtime_checkable
class Preconditioner(Protocol):
    """A way to build v -> M⁻¹ v, with a state that outlives a step."""

    def init(self, params: Params) -> PyTree:
        """The state before anything is built; M is then a multiple of I."""
        ...

    def prepare(
        self, fisher: Any, state: PyTree, damping: ArrayLike
    ) -> tuple[MatVec, PyTree]:
        """The map v -> M⁻¹ v for this step, and the state after it.

        The map is symmetric positive definite, float32 or wider. Its parts are rebuilt
        when that is due; a build that is not finite changes nothing, and is tried again
        in the next step.
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
    """Rebuilds if it is time, else counts the step; `age` and `num_builds` count.

    A build that is not finite leaves the old one in place, still due.
    """

    def rebuild(state: _State) -> _State:
        built = build(state)
        is_finite = tree.all_finite(built)
        built = built._replace(age=jnp.ones_like(state.age))
        # Counted either way: the next attempt has other random numbers.
        return tree.select(is_finite, built, state)._replace(
            num_builds=state.num_builds + 1
        )

    if refresh_every == 1:
        return rebuild(state)
    return jax.lax.cond(
        state.age >= refresh_every,
        rebuild,
        lambda state: state._replace(age=state.age + 1),
        state,
    )


def check_key(key: Any, what: str) -> None:
    """Raises TypeError unless `key` is a typed key."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{what} needs `key`, a typed key such as jax.random.key(0), got "
            f"{type(key).__name__}."
        )
