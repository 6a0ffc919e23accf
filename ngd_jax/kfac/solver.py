"""`KFAC`: one step along the direction of the factors."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.kfac.kronecker import Factors
from ngd_jax.kfac.state import KroneckerState
from ngd_jax.solvers.protocol import (
    RightHandSide,
    Solution,
    Solver,
    SolverInfo,
    SolverStatus,
)
from ngd_jax.types import ArrayLike, PyTree

__all__ = ["KFAC"]


@dataclasses.dataclass(frozen=True)
class KFAC(Factors, Solver):
    """K-FAC: one step along M⁻¹ g, of exact length in F.

        z = M⁻¹ g,    d = α z,    α = gᵀ z / zᵀ (F + λI) z

    M as in `Kronecker`. `exact_length` costs one `jvp` of the model; without it
    d = M⁻¹ g costs none, for step sizes that come from elsewhere: a rate, a radius, or
    `contrib.QuadraticModelRate`, which minimises over every multiple of d itself.

    The residual is not computed, as that would take the other half of a product with F:
    `relative_residual` is infinity and the status UNCHECKED. If you need it,
    `CG(max_steps=1, rtol=0, preconditioner=Kronecker())` takes the same step.

    Attributes:
      decay, refresh_every, observe_every, max_size, sharding, max_block, dtype: as in
        `Kronecker`.
      exact_length: whether α minimises ½ dᵀ (F + λI) d - gᵀ d, or is 1.

    Raises:
      ValueError, TypeError: for numbers out of range.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
      ... )
      >>> d, info = KFAC()(fisher, jnp.array([[1.0], [9.0]]), damping=0.0)
      >>> d.ravel().round(3)  # F = diag(1/2, 9/2)
      Array([2., 2.], dtype=float32)

    References:
      Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate
      curvature, 2015, section 6.4.
    """

    exact_length: bool = True

    def solve(
        self, fisher: Any, rhs: RightHandSide, *, damping: ArrayLike, state: PyTree = ()
    ) -> Solution:
        """One step along M⁻¹ g, from the best multiple of a guess; see `Solver`."""
        if isinstance(state, KroneckerState):
            precondition, state = self.prepare(fisher, state, damping)
        else:
            precondition, _ = self.prepare(fisher, self.init(fisher.params), damping)
        residual, start, pushed, largest = rhs.gradient, None, None, None
        if rhs.guess is not None:
            product, pushed = fisher.matvec_and_push(rhs.guess)
            product = tree.axpy(damping, rhs.guess, product)
            square = tree.vdot(rhs.guess, product)
            safe = jnp.where(square > 0, square, 1)
            share = jnp.where(square > 0, tree.vdot(residual, rhs.guess) / safe, 0)
            start, pushed = tree.scale(share, rhs.guess), tree.scale(share, pushed)
            residual = tree.axpy(-share, product, residual)

        direction, is_usable = precondition(residual), jnp.asarray(True)
        if self.exact_length:
            # In units of its largest entry: its square could over- or underflow.
            direction, unit, largest = tree.in_units(direction)
            along = fisher.pushforward(direction)
            curvature = fisher.inner(along, along)
            curvature += damping * tree.vdot(direction, direction)
            slope = tree.vdot(residual, direction)
            # NaN and infinity pass, and are reported by `solve_scaled`.
            is_usable = ~((curvature <= 0) | (slope <= 0))
            length = jnp.where(is_usable, slope / curvature, 0)
            direction, along = tree.scale(length, (direction, along))
            largest = length * (largest / unit)
            pushed = along if pushed is None else tree.axpy(1.0, along, pushed)
        else:
            pushed = None
        if start is not None:
            direction, largest = tree.axpy(1.0, direction, start), None
        status = jnp.where(is_usable, SolverStatus.UNCHECKED, SolverStatus.BREAKDOWN)
        is_zero = ~is_usable & (rhs.guess is None)
        info = SolverInfo(
            num_steps=is_usable.astype(jnp.int32),
            relative_residual=jnp.where(is_zero, 1.0, jnp.inf),
            status=status,
        )
        return Solution(direction, pushed, info, state, largest=largest)
