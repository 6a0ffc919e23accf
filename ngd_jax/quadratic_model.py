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

    Costs two more products with the square root of F (one `jvp` each).

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
    sqrt_matvec: Callable[[PyTree], PyTree],
    gradient: PyTree,
    direction: PyTree,
    previous: PyTree | None,
    damping: ArrayLike,
) -> PyTree:
    """The D = α d + β p that minimises ½ Dᵀ(AᵀA + λI) D - gᵀD.

    Args:
      sqrt_matvec: v -> A v, with F = AᵀA.
      gradient: g.
      direction: d.
      previous: p, or None for D = α d. Where it adds nothing to d, β is 0.
      damping: λ.

    Example:
      >>> import jax.numpy as jnp
      >>> minimize_quadratic_model(
      ...     lambda v: v,
      ...     jnp.array([2.0, 4.0]),
      ...     jnp.array([1.0, 0.0]),
      ...     jnp.array([1.0, 1.0]),
      ...     damping=1.0,
      ... )
      Array([1., 2.], dtype=float32)
    """
    eps = float(jnp.finfo(tree.accumulator_dtype(gradient)).eps)

    def form(vector: PyTree, image: PyTree) -> Scalar:
        return tree.vdot(image, image) + damping * tree.vdot(vector, vector)

    def multiple(vector: PyTree, curvature: Scalar, usable: ArrayLike) -> Scalar:
        usable &= curvature > 0
        slope = tree.vdot(gradient, vector)
        return jnp.where(usable, slope / jnp.where(usable, curvature, 1.0), 0.0)

    # Both in units of their largest entry: squares could over- or underflow.
    d = _in_units(direction)
    image = sqrt_matvec(d)
    curvature = form(d, image)
    combined = tree.scale(multiple(d, curvature, usable=True), d)
    if previous is None:
        return combined
    p = _in_units(previous)
    p_image = sqrt_matvec(p)
    p_curvature = form(p, p_image)
    # What is left of p after d, as vectors: differences of curvatures would lose it.
    overlap = tree.vdot(image, p_image) + damping * tree.vdot(d, p)
    share = -jnp.where(curvature > 0, overlap / curvature, 0.0)
    rest = tree.axpy(share, d, p)
    rest_curvature = form(rest, tree.axpy(share, image, p_image))
    is_new = rest_curvature > (100 * eps) ** 2 * p_curvature
    return tree.axpy(multiple(rest, rest_curvature, is_new), rest, combined)


def _in_units(vector: PyTree) -> PyTree:
    return tree.divide(vector, tree.usable_unit(tree.max_abs(vector)))
