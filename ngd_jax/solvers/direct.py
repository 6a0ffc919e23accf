"""Direct solves of (F + λI) d = g on the dense matrix, for few parameters.

    F + λI = L Lᵀ,    d = L⁻ᵀ L⁻¹ g

The one place where trees become vectors.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ngd_jax import tree
from ngd_jax.solvers.interface import SolverInfo, check_system
from ngd_jax.solvers.positive_definite import factorise, report, solve_refined
from ngd_jax.types import ArrayLike, PyTree

__all__ = ["Cholesky"]


@dataclasses.dataclass(frozen=True)
class Cholesky:
    """Cholesky factorisation of F + λI in parameter space: exact, O(P³), P² memory.

    Builds F (see `Fisher.dense`), then refines the solution once with its
    true residual. Where the factorisation fails, which says that λ is below the
    round-off of F, it is repeated with ε·P times the diagonal added: the smallest
    damping that working precision can tell from none. `relative_residual` is of the
    system asked for, so it shows what that cost; above the square root of the machine
    precision the status is STAGNATED.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
      ... )
      >>> d, info = Cholesky()(fisher, jnp.array([[12.0], [17.0]]), damping=0.0)
      >>> d.ravel().round(2)
      Array([1., 1.], dtype=float32)
    """

    def __call__(
        self,
        fisher: Any,
        rhs: PyTree,
        *,
        damping: ArrayLike,
        x0: PyTree | None = None,
    ) -> tuple[PyTree, SolverInfo]:
        """Solves (F + λI) d = g; see `Solver`. Nothing to start from, so no `x0`."""
        check_system(rhs, damping, x0)
        g, unravel = ravel_pytree(tree.widen(rhs))
        dtype = tree.accumulator_dtype(g)
        dense = fisher.dense().astype(g.dtype)
        finite = jnp.all(jnp.isfinite(dense)) & jnp.all(jnp.isfinite(g))

        # Units in which the largest diagonal entry and the largest |gᵢ| are one.
        size = jnp.max(jnp.real(jnp.diagonal(dense)), initial=0.0) + damping
        size = jnp.where(finite & (size > 0), size, 1.0).astype(dtype)
        largest = jnp.max(jnp.abs(g), initial=0.0)
        largest = jnp.where(finite & (largest > 0), largest, 1.0).astype(dtype)
        identity = jnp.eye(g.size, dtype=g.dtype)
        matrix = jnp.where(finite, dense / size, identity)
        shift = jnp.asarray(damping, dtype) / size
        b = jnp.where(finite, g / largest, 0.0)

        x, residual = solve_refined(factorise(matrix, shift), b)
        norm = jnp.linalg.norm(b)
        relative = jnp.linalg.norm(residual) / jnp.where(norm > 0, norm, 1.0)
        solution = unravel((x / size * largest).astype(g.dtype))
        return report(solution, rhs, relative, finite)
