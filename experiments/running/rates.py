"""Learning rates that rise and fall in the course of a run.

    c(p) = p / w for p < w,   then   e + (1 - e) (1 + cos(π (p - w) / (1 - w))) / 2

for the part p of the run that is over, w = 1/20 for the rise and e = 1/100 for the end.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.running.settings import AT_LEAST_ONE, POSITIVE

__all__ = ["ProgressState", "cosine", "follow_progress", "warmup_cosine"]

_RISE, _END = 0.05, 0.01

PyTree = Any


def cosine(progress: jax.Array) -> jax.Array:
    """The factor c(p) of the learning rate; at least `_END`, so that no step is 0."""
    angle = jnp.pi * jnp.clip((progress - _RISE) / (1 - _RISE), 0, 1)
    falling = _END + (1 - _END) * (1 + jnp.cos(angle)) / 2
    return jnp.clip(progress / _RISE, _END, falling)


def warmup_cosine(
    peak: Annotated[float, POSITIVE], steps: Annotated[int, AT_LEAST_ONE]
) -> optax.Schedule:
    """`peak` times c(p) after each of `steps` steps."""
    return lambda count: peak * cosine(jnp.asarray(count) / steps)


class ProgressState(NamedTuple):
    """The state of an optimizer whose learning rate follows another clock.

    Attributes:
      progress: the part of the run that is over; whoever calls the step sets it.
      inner: the state of the optimizer.
    """

    progress: jax.Array
    inner: PyTree


def follow_progress(
    settings: dict[str, Any],
    make: Callable[[dict[str, Any]], optax.GradientTransformationExtraArgs],
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of `settings`, its `learning_rate` times c(p) of `progress`.

    A search for the step along a line (`learning_rate: null`, L-BFGS) is left alone.

    Args:
      settings: of an optimizer; a rate may be a part of a part.
      make: builds it; a rate may be a schedule.
    """

    def at(progress: jax.Array) -> optax.GradientTransformationExtraArgs:
        return make(_times(settings, lambda _: cosine(progress)))

    def init(params: PyTree) -> ProgressState:
        progress = jnp.zeros(())
        return ProgressState(progress, at(progress).init(params))

    def update(
        updates: PyTree, state: ProgressState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, ProgressState]:
        tx = at(state.progress)
        updates, inner = tx.update(updates, state.inner, params, **extra_args)
        return updates, state._replace(inner=inner)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _times(settings: dict[str, Any], factor: optax.Schedule) -> dict[str, Any]:
    changed = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            value = _times(value, factor)
        elif name.endswith("learning_rate") and isinstance(value, int | float):
            value = _scheduled(value, factor)
        changed[name] = value
    return changed


def _scheduled(rate: float, factor: optax.Schedule) -> optax.Schedule:
    return lambda count: rate * factor(count)
