"""One step along M⁻¹ g: natural gradient in the metric of a preconditioner.

    z = M⁻¹ g,    d = α z,    α = gᵀz / zᵀ(F + λI) z

`CG(max_steps=1)` takes the same step and tells its residual, for a product with F; here
one with J does, less than half of it. Knows nothing of how M is built.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.preconditioners import Preconditioner
from ngd_jax.preconditioners.base import prepare
from ngd_jax.solvers.interface import (
    SolverInfo,
    SolverStatus,
    SolverWithImages,
    check_system,
)
from ngd_jax.types import ArrayLike, MatVec, Params, PyTree, Scalar

__all__ = ["ApproximateInverse"]


@dataclasses.dataclass(frozen=True)
class ApproximateInverse(SolverWithImages):
    """d = α M⁻¹ g: the metric is M, of exact length in F + λI.

    With `Kronecker()` this is K-FAC, with `Jacobi()` a diagonal metric. `exact_length`
    costs one `jvp` of the model; without it d = M⁻¹ g costs none, for step sizes that
    someone else finds: a rate, a radius, or `QuadraticModelRate`, which minimises over
    every multiple of d itself.

    The residual is not computed: it would take the other half of a product with F. So
    `relative_residual` is infinity, an upper bound, and the status UNCHECKED. Where it
    is of interest, `CG(max_steps=1, rtol=0, preconditioner=...)` takes the same step.

    Attributes:
      preconditioner: M: a `Preconditioner`, whose state is kept between steps, or a
        function (fisher, damping) -> (v -> M⁻¹ v); symmetric positive definite.
      exact_length: whether α minimises ½ dᵀ(F + λI)d - gᵀd, or is 1.

    Raises:
      TypeError: on a preconditioner that is neither.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
      ... )
      >>> solver = ApproximateInverse(ngd.Jacobi(power=1.0))
      >>> d, info = solver(fisher, jnp.array([[1.0], [9.0]]), damping=0.0)
      >>> d.ravel().round(3)  # F = diag(1/2, 9/2)
      Array([2., 2.], dtype=float32)

    References:
      Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate
      curvature, 2015, section 6.4.
    """

    preconditioner: Preconditioner | Callable[[Any, ArrayLike], MatVec]
    exact_length: bool = True

    def __post_init__(self) -> None:
        given = self.preconditioner
        if isinstance(given, type) or not callable(given):
            raise TypeError(
                f"`preconditioner` must be one, such as Kronecker(), or a function "
                f"(fisher, damping) -> (v -> M⁻¹ v), got {given!r}."
            )

    def init(self, params: Params) -> PyTree:
        """The state before the first solve: the preconditioner's, if it has one."""
        if isinstance(self.preconditioner, Preconditioner):
            return self.preconditioner.init(params)
        return ()

    def solve_with_image(
        self,
        fisher: Any,
        rhs: PyTree,
        *,
        damping: ArrayLike,
        x0: PyTree | None = None,
        coefficients: PyTree | None = None,
        objective: Callable[[PyTree], Scalar] | None = None,
        state: PyTree = (),
    ) -> tuple[PyTree, PyTree | None, SolverInfo, PyTree]:
        """An approximate solution of (F + λI) d = g; see `StatefulSolver`.

        J d is known if the length has asked for it. `coefficients` and `objective` are
        of no use here. The state () builds the preconditioner anew and keeps nothing.
        """
        del coefficients, objective
        check_system(rhs, damping, x0)
        precondition, state = prepare(self.preconditioner, fisher, state, damping)
        damping = jnp.asarray(damping).astype(tree.accumulator_dtype(rhs))

        residual, start, start_image = tree.widen(rhs), None, None
        has_start = jnp.asarray(False)
        if x0 is not None:
            start = tree.widen(x0)
            has_start = tree.all_finite(start)
            product, start_image = fisher.matvec_with_image(start)
            start_image = tree.widen(start_image)
            residual = tree.axpy(-1.0, tree.axpy(damping, start, product), residual)

        # Both in units of their largest entry: squares could over- or underflow.
        residual, unit, size = tree.in_units(residual)
        z = tree.widen(precondition(residual))
        length, image, is_usable = jnp.ones_like(unit), None, jnp.asarray(True)
        is_finite = jnp.isfinite(size)
        if self.exact_length:
            z, _, z_size = tree.in_units(z)
            image = tree.widen(fisher.pushforward(z))
            curvature = fisher.inner(image, image) + damping * tree.vdot(z, z)
            slope = tree.vdot(residual, z)
            is_finite &= jnp.isfinite(curvature)
            is_usable = (curvature > 0) & (slope > 0) | (size == 0)
            length = slope / jnp.where(curvature > 0, curvature, 1)
        else:
            z_size = tree.max_abs(tree.pack(z)[0])
        length = length * unit
        is_finite &= jnp.isfinite(z_size) & jnp.isfinite(length)
        is_taken = is_finite & is_usable

        def along(step: PyTree, origin: PyTree | None) -> PyTree:
            zero = optax.tree.zeros_like(step)
            step = tree.select(is_taken, tree.scale(length, step), zero)
            if origin is None:
                return step
            return tree.axpy(1.0, step, tree.select(has_start, origin, zero))

        solution = optax.tree.cast_like(along(z, start), rhs)
        image = None if image is None else along(image, start_image)
        status = jnp.select(
            [~is_finite, ~is_usable, size == 0],
            [SolverStatus.NON_FINITE, SolverStatus.BREAKDOWN, SolverStatus.CONVERGED],
            SolverStatus.UNCHECKED,
        )
        is_zero = ~is_taken & ~has_start
        bound = jnp.select([size == 0, is_zero], [0.0, 1.0], jnp.inf)
        info = SolverInfo(
            num_steps=is_taken.astype(jnp.int32),
            relative_residual=bound.astype(damping.dtype),
            status=status.astype(jnp.int32),
        )
        return solution, image, info, state
