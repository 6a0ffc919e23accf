"""Learning rate and momentum from the exact quadratic model, in two variables.

    min over α, β of  ½ Dᵀ(F + λI) D - gᵀD,    D = α d + β p,    θ ← θ - D

d is the new direction and p the last step. With d = M⁻¹ g on a quadratic loss this is
preconditioned conjugate gradients, spread over the steps of training.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.types import ArrayLike, PyTree, Scalar

__all__ = ["QuadraticModelRate", "minimize_quadratic_model"]


@dataclasses.dataclass(frozen=True)
class QuadraticModelRate:
    """As `learning_rate`: rate and momentum that minimise the quadratic model.

    Costs two more `jvp`s of the model.

    Attributes:
      momentum: whether the last step is the second variable; else the rate alone.

    Example:
      >>> import ngd_jax as ngd
      >>> model_fn = lambda w, batch: batch["x"] @ w
      >>> tx = ngd.natural_gradient(ngd.QuadraticModelRate(), model_fn, ngd.Gaussian())

    References:
      Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate
      curvature, 2015, sections 6.4 and 7.
    """

    momentum: bool = True


def minimize_quadratic_model(
    image_fn: Callable[[PyTree], PyTree],
    gradient: PyTree,
    direction: PyTree,
    previous: PyTree | None,
    damping: ArrayLike,
    *,
    image: PyTree | None = None,
    inner: Callable[[PyTree, PyTree], Scalar] = tree.vdot,
) -> tuple[PyTree, PyTree]:
    """The D = α d + β p that minimises ½ ⟨J D, J D⟩ + ½ λ DᵀD - gᵀD, and J D.

    Args:
      image_fn: v -> J v.
      gradient: g.
      direction: d.
      previous: p, or None for D = α d. Where it adds nothing to d, β is 0.
      damping: λ.
      image: J d, if it is known.
      inner: ⟨·, ·⟩ of images, with ⟨J v, J v⟩ = vᵀFv.

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

    def form(vector: PyTree, image: PyTree) -> Scalar:
        return inner(image, image) + damping * tree.vdot(vector, vector)

    def multiple(vector: PyTree, curvature: Scalar, usable: ArrayLike) -> Scalar:
        usable &= curvature > 0
        slope = tree.vdot(gradient, vector)
        return jnp.where(usable, slope / jnp.where(usable, curvature, 1.0), 0.0)

    # Both in units of their largest entry: squares could over- or underflow.
    d, unit, _ = tree.in_units(direction)
    image = tree.widen(image_fn(d)) if image is None else tree.divide(image, unit)
    curvature = form(d, image)
    rate = multiple(d, curvature, usable=True)
    combined, combined_image = tree.scale(rate, d), tree.scale(rate, image)
    if previous is None:
        return combined, combined_image
    p, _, _ = tree.in_units(previous)
    p_image = tree.widen(image_fn(p))
    p_curvature = form(p, p_image)
    # What is left of p after d, as vectors: differences of curvatures would lose it.
    overlap = inner(image, p_image) + damping * tree.vdot(d, p)
    share = -jnp.where(curvature > 0, overlap / curvature, 0.0)
    rest, rest_image = tree.axpy(share, d, p), tree.axpy(share, image, p_image)
    rest_curvature = form(rest, rest_image)
    is_new = rest_curvature > (100 * eps) ** 2 * p_curvature
    rest_rate = multiple(rest, rest_curvature, is_new)
    return (
        tree.axpy(rest_rate, rest, combined),
        tree.axpy(rest_rate, rest_image, combined_image),
    )
