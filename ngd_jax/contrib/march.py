"""Natural gradient with momentum, and a diagonal metric of second moments.

    minimise over d   ½ dᵀFd - gᵀd + ½ λ ‖d - μ d₋₁‖²_D,    D = √(v / v̄)
    v ← β v + |d - d₋₁|²

d₋₁ is the last direction, v̄ the mean of v over all parameters. With D = I this is
proximal momentum (SPRING). Here it is `natural_gradient` with a `CovariantDamping` that
changes in each step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.auto import Auto
from ngd_jax.damping import CovariantDamping, LevenbergMarquardt, RelativeDamping
from ngd_jax.likelihoods import Likelihood
from ngd_jax.metric import Metric
from ngd_jax.solvers.protocol import Solver
from ngd_jax.transform import NaturalGradientState, natural_gradient
from ngd_jax.trust_region import RadiusRule, SufficientDecrease
from ngd_jax.types import (
    Array,
    Batch,
    ModelFn,
    Outputs,
    PyTree,
    Scalar,
    ScalarOrSchedule,
)

__all__ = ["MarchState", "march"]

# D is at least the root of this: parameters that hardly ever move are damped less than
# others, but by no more than a factor of 100.
_FLOOR = 1e-4


class MarchState(NamedTuple):
    """The state of `march`.

    Attributes:
      moments: v, zero before the first step.
      natural_gradient: its state; the direction is in the coordinates of the
        parameters.
    """

    moments: PyTree
    natural_gradient: NaturalGradientState


def march(
    learning_rate: ScalarOrSchedule | None,
    model_fn: ModelFn,
    likelihood: Likelihood,
    *,
    max_kl: ScalarOrSchedule | RadiusRule | None = None,
    damping: ScalarOrSchedule | RelativeDamping | LevenbergMarquardt = 1e-3,
    momentum: ScalarOrSchedule = 0.95,
    decay: float = 0.995,
    solver: Solver = Auto(),  # noqa: B008  # frozen
    loss_fn: Callable[[Outputs, Batch], Scalar] | None = None,
    accept: SufficientDecrease | None = None,
    metric: Metric = Metric(),  # noqa: B008  # frozen
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient with momentum and second moments: MARCH.

    (F + λD) d = g + λμ D d₋₁ with D = √(v / v̄) and v ← βv + |d - d₋₁|². Parameters
    whose direction changes from step to step are held back more than others.

    Args:
      learning_rate, model_fn, likelihood, max_kl, solver, loss_fn, accept, metric: as
        of `natural_gradient`.
      damping: λ. The published D is √v; in units of the mean, λ keeps the unit that it
        has in `natural_gradient`.
      momentum: μ, not 0.
      decay: β, in [0, 1).

    Returns:
      A transformation as `natural_gradient`, with a `MarchState`.

    Raises:
      ValueError: `momentum` is 0, or `decay` is not in [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, ngd_jax as ngd
      >>> likelihood, solver = ngd.Gaussian(event_ndims=0), ngd.Cholesky()
      >>> tx = ngd.contrib.march(0.1, lambda p, x: x @ p, likelihood, solver=solver)
      >>> params, x = jnp.ones(2), jnp.eye(2)
      >>> update = jax.jit(lambda g, s: tx.update(g, s, params, batch=x))
      >>> updates, state = update(jnp.ones(2), tx.init(params))
      >>> int(state.natural_gradient.count)
      1

    References:
      Gu et al., Solving the Hubbard model with neural quantum states, 2025
      (arXiv:2507.02644); Goldshlager, Abrahamsen and Lin, A Kaczmarz-inspired approach
      to accelerate the optimization of neural network wavefunctions, 2024.
    """
    if isinstance(momentum, int | float) and momentum == 0:
        raise ValueError(
            "`momentum` of march must not be 0: without it, the last direction is not "
            "kept; use natural_gradient."
        )
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` must be in [0, 1), got {decay}.")

    def inner(damping: Any) -> optax.GradientTransformationExtraArgs:
        return natural_gradient(
            learning_rate,
            model_fn,
            likelihood,
            max_kl=max_kl,
            damping=damping,
            momentum=momentum,
            solver=solver,
            loss_fn=loss_fn,
            accept=accept,
            metric=metric,
        )

    def init(params: PyTree) -> MarchState:
        state: Any = inner(damping).init(params)
        moments = jax.tree.map(
            lambda leaf: jnp.zeros_like(leaf, jnp.finfo(leaf.dtype).dtype),
            state.direction,
        )
        return MarchState(moments, state)

    def update(
        updates: PyTree, state: MarchState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, MarchState]:
        scales, before = _scales(state.moments), state.natural_gradient
        tx: Any = inner(CovariantDamping(damping, scales))
        # The direction is kept in the coordinates of λI, which change with the scales.
        there = jax.tree.map(jnp.divide, before.direction, scales)
        updates, after = tx.update(
            updates, before._replace(direction=there), params, **extra_args
        )
        is_taken = after.count != before.count
        here = jax.tree.map(jnp.multiply, after.direction, scales)
        direction = tree.select(is_taken, here, before.direction)
        moments = jax.tree.map(
            lambda v, d, last: decay * v + jnp.abs(d - last) ** 2,
            state.moments,
            direction,
            before.direction,
        )
        moments = tree.select(is_taken, moments, state.moments)
        return updates, MarchState(moments, after._replace(direction=direction))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _scales(moments: PyTree) -> PyTree:
    """D^(-1/2), of every leaf."""
    leaves = jax.tree.leaves(moments)
    total: Array | float = sum(jnp.sum(leaf) for leaf in leaves)
    mean = total / max(1, sum(leaf.size for leaf in leaves))

    def scale(leaf: Array) -> Array:
        # All ones before the first step.
        relative = jnp.where(mean > 0, leaf / jnp.where(mean > 0, mean, 1), 1.0)
        return jnp.maximum(relative, _FLOOR).astype(leaf.dtype) ** -0.25

    return jax.tree.map(scale, moments)
