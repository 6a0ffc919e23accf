"""Learning rate and momentum from the exact quadratic model, in two variables.

    min over α, β of  ½ Dᵀ(F + λI) D - gᵀD,    D = α d + β p,    θ ← θ - D

d is the new direction and p the last step. With d = M⁻¹ g on a quadratic loss this is
preconditioned conjugate gradients, spread over the steps of training.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.trust_region import RateRule
from ngd_jax.types import ArrayLike, PyTree, Scalar

__all__ = ["QuadraticModelRate", "minimize_quadratic_model"]


@dataclasses.dataclass(frozen=True)
class QuadraticModelRate(RateRule):
    """A rule for `learning_rate`: rate and momentum that minimise the quadratic model.

    Costs two more `jvp`s of the model.

    Attributes:
      momentum: whether the last step is the second variable; else only the rate is
        chosen.

    Example:
      >>> import ngd_jax as ngd
      >>> model_fn = lambda w, batch: batch["x"] @ w
      >>> tx = ngd.natural_gradient(
      ...     ngd.contrib.QuadraticModelRate(), model_fn, ngd.Gaussian()
      ... )

    References:
      Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate
      curvature, 2015, sections 6.4 and 7.
    """

    momentum: bool = True

    @property
    def uses_previous(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the last step is the second variable."""
        return self.momentum

    def combine(
        self,
        fisher: Any,
        gradient: PyTree,
        direction: PyTree,
        pushed: PyTree | None,
        previous: PyTree | None,
        damping: Scalar,
    ) -> tuple[PyTree, PyTree]:
        """The step D that minimises the quadratic model, and J D."""
        return minimize_quadratic_model(
            fisher.pushforward,
            gradient,
            direction,
            previous,
            damping,
            pushed=pushed,
            inner=fisher.inner,
        )


def minimize_quadratic_model(
    push_fn: Callable[[PyTree], PyTree],
    gradient: PyTree,
    direction: PyTree,
    previous: PyTree | None,
    damping: ArrayLike,
    *,
    pushed: PyTree | None = None,
    inner: Callable[[PyTree, PyTree], Scalar] = tree.vdot,
) -> tuple[PyTree, PyTree]:
    """The D = α d + β p that minimises ½ ⟨J D, J D⟩ + ½ λ DᵀD - gᵀD, and J D.

    Args:
      push_fn: v -> J v.
      gradient: g.
      direction: d.
      previous: p, or None for D = α d. If it adds nothing to d, β is 0.
      damping: λ.
      pushed: J d, if it is known.
      inner: ⟨·, ·⟩ of tangents of the outputs, with ⟨J v, J v⟩ = vᵀFv.

    Example:
      >>> import jax.numpy as jnp
      >>> minimize_quadratic_model(
      ...     lambda v: v,
      ...     jnp.array([2.0, 4.0]),
      ...     jnp.array([1.0, 0.0]),
      ...     jnp.array([1.0, 1.0]),
      ...     damping=1.0,
      ... )[0]
      Array([1., 2.], dtype=float32)
    """
    eps = float(jnp.finfo(tree.accumulator_dtype(gradient)).eps)

    def form(vector: PyTree, pushed: PyTree) -> Scalar:
        return inner(pushed, pushed) + damping * tree.vdot(vector, vector)

    def multiple(vector: PyTree, curvature: Scalar, usable: ArrayLike) -> Scalar:
        usable &= curvature > 0
        slope = tree.vdot(gradient, vector)
        return jnp.where(usable, slope / jnp.where(usable, curvature, 1.0), 0.0)

    # Both in units of their largest entry: squares could over- or underflow.
    d, unit, _ = tree.in_units(direction)
    pushed = tree.widen(push_fn(d)) if pushed is None else tree.divide(pushed, unit)
    curvature = form(d, pushed)
    rate = multiple(d, curvature, usable=True)
    combined, combined_pushed = tree.scale(rate, d), tree.scale(rate, pushed)
    if previous is None:
        return combined, combined_pushed
    p, _, _ = tree.in_units(previous)
    p_pushed = tree.widen(push_fn(p))
    p_curvature = form(p, p_pushed)
    # The part of p beyond d, as vectors: differences of curvatures would lose it.
    overlap = inner(pushed, p_pushed) + damping * tree.vdot(d, p)
    share = -jnp.where(curvature > 0, overlap / curvature, 0.0)
    rest, rest_pushed = tree.axpy(share, d, p), tree.axpy(share, pushed, p_pushed)
    rest_curvature = form(rest, rest_pushed)
    is_new = rest_curvature > (100 * eps) ** 2 * p_curvature
    rest_rate = multiple(rest, rest_curvature, is_new)
    return (
        tree.axpy(rest_rate, rest, combined),
        tree.axpy(rest_rate, rest_pushed, combined_pushed),
    )
