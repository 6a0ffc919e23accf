"""Solves of (G + λI) y = w with the rows of G divided over devices, by CG.

    G v = [G₁ v; …; G_D v],    M = diag(G₁₁ + λI, …, G_DD + λI)

Device i has its rows Gᵢ of the Gram matrix and the Cholesky factor of its own block on
the diagonal, which precondition CG (block Jacobi). A step gathers two vectors; no
device ever has all of G. Knows nothing of models.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ngd_jax import placement, tree
from ngd_jax.solvers.cg import conjugate_gradient
from ngd_jax.solvers.positive_definite import unit_of
from ngd_jax.solvers.protocol import SolverInfo
from ngd_jax.types import Array, ArrayLike, Scalar

__all__ = ["DividedGram"]


class DividedGram:
    """A = (G + λI) / u, as in `PositiveDefinite`, for a G with divided rows.

    Args:
      matrix: G, `[M, M]`, its rows divided by `sharding`.
      damping: λ ≥ 0.
      sharding: the mesh, and its axes that divide the rows.
      max_steps: the most steps of CG in a solve.
    """

    def __init__(
        self,
        matrix: Array,
        damping: ArrayLike,
        sharding: NamedSharding,
        max_steps: int,
    ) -> None:
        self.matrix, self._sharding, self._max_steps = matrix, sharding, max_steps
        self._axes = placement.axes_of(sharding)
        self.diagonal = self._on_rows(lambda rows: jnp.diagonal(self._block(rows)))
        damping = jnp.asarray(damping).astype(matrix.dtype)
        self.unit = unit_of(self.diagonal, damping)
        self.shift = damping / self.unit
        self._roots = self._map(self._root, self.unit, self.shift)

    def product(self, x: Array) -> Array:
        """A x."""
        return self.without_shift(x) + self.shift * x

    def without_shift(self, x: Array) -> Array:
        """G x / u."""
        product = self._on_rows(lambda rows, x: tree.contract(rows, x, (1,), (0,)), x)
        return product / self.unit

    def size(self) -> Scalar:
        """The Frobenius norm of G, in units of u so that no square overflows."""
        norms = self._on_rows(
            lambda rows, unit: jnp.linalg.norm(rows / unit, axis=1), self.unit
        )
        return jnp.linalg.norm(norms) * self.unit

    def solve(self, b: Array) -> tuple[Array, SolverInfo]:
        """Solves A x = b to working precision, if the steps suffice."""
        return conjugate_gradient(
            self.without_shift,
            b,
            max_steps=self._max_steps,
            damping=self.shift,
            preconditioner=self._precondition,
        )

    def pseudo_solve(self, b: Array) -> Array:
        """G⁺ u b, for a b in the range of G."""
        return conjugate_gradient(self.without_shift, b, max_steps=self._max_steps)[0]

    def _precondition(self, vector: Array) -> Array:
        """The solution with every device's own block."""

        def solve(_: Array, root: Array, vector: Array) -> Array:
            own = placement.slice_of(vector, self._axes)
            return jax.scipy.linalg.cho_solve((root, True), own)

        return placement.place(
            self._map(solve, vector, divided=(self._roots,)), self._sharding
        )

    def _block(self, rows: Array) -> Array:
        """A device's own block on the diagonal, from its rows."""
        return placement.slice_of(rows, self._axes, axis=1)

    def _root(self, rows: Array, unit: Scalar, shift: Scalar) -> Array:
        """The Cholesky factor of a device's block of A, or of I with little damping.

        CG finds the solution of least norm of a singular system, up to round-off, only
        without a preconditioner: M⁻¹ is as large in null vectors of G as 1 / λ.
        """
        block = self._block(rows) / unit
        eps = float(jnp.finfo(block.dtype).eps)
        identity = jnp.eye(len(block), dtype=block.dtype)
        root = jax.lax.linalg.cholesky(block + shift * identity, symmetrize_input=False)
        is_usable = jnp.isfinite(root[-1, -1]) & (shift >= eps**0.5)
        return jnp.where(is_usable, root, identity)

    def _on_rows(self, fn: Callable[..., Array], *whole: Array) -> Array:
        """`fn(rows, *whole)` of every device, gathered."""
        return placement.place(self._map(fn, *whole), self._sharding)

    def _map(
        self, fn: Callable[..., Array], *whole: Array, divided: tuple[Array, ...] = ()
    ) -> Array:
        """`fn(rows, *divided, *whole)` of every device, along the first axis."""
        by_rows = PartitionSpec(self._axes)
        parts = self.matrix, *divided
        specs = (by_rows,) * len(parts) + (PartitionSpec(),) * len(whole)
        whole = tuple(placement.place(x, self._sharding) for x in whole)
        mapped = jax.shard_map(
            fn, mesh=self._sharding.mesh, in_specs=specs, out_specs=by_rows
        )
        return mapped(*parts, *whole)
