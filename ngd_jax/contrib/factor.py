"""A Cholesky factor of F + λI in lower precision, to precondition CG with.

    F + λI ≈ L Lᵀ in float32,    M⁻¹ = L⁻ᵀ L⁻¹

Conjugate gradients on products with F in float64 then need few steps to reach the
accuracy of a float64 factorisation, at half its cost.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ngd_jax.coordinates import ravel_real
from ngd_jax.dense import dense
from ngd_jax.solvers.positive_definite import factorise, make_positive_definite, solve
from ngd_jax.types import ArrayLike, MatVec, PyTree

__all__ = ["CholeskyFactor"]


@dataclasses.dataclass(frozen=True)
class CholeskyFactor:
    """Preconditions `CG` by a Cholesky factor of F + λI, in lower precision.

        F + λI ≈ L Lᵀ,    M⁻¹ = L⁻ᵀ L⁻¹

    Builds F as a matrix (see `ngd_jax.dense.dense`), in P² memory, at every step. For λ
    far below 1e-6 of the largest eigenvalue the factor helps little, and CG needs many
    steps: `Cholesky` is then cheaper.

    Args:
      dtype: the dtype to factorise in, `jnp.float32` or `jnp.float64`.

    Raises:
      TypeError: for another dtype.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> solver = ngd.CG(20, rtol=1e-14, preconditioner=CholeskyFactor())

    References:
      Langou et al., Exploiting the performance of 32 bit floating point arithmetic in
      obtaining 64 bit accuracy, 2006, which refines without conjugate gradients.
    """

    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        try:
            name = jnp.dtype(self.dtype).name
        except TypeError:
            name = repr(self.dtype)
        if name not in ("float32", "float64"):
            raise TypeError(f"`dtype` must be jnp.float32 or jnp.float64, got {name}.")

    def init(self, params: PyTree) -> PyTree:
        """Nothing is kept."""
        del params
        return ()

    def prepare(
        self, fisher: Any, state: PyTree, damping: ArrayLike
    ) -> tuple[MatVec, PyTree]:
        """The map for this step; see `Preconditioner`."""
        return self(fisher, damping), state

    def __call__(self, fisher: Any, damping: ArrayLike) -> MatVec:
        """The map v -> M⁻¹ v; the identity where there is no factor."""
        matrix = dense(fisher).astype(self.dtype)
        system = make_positive_definite(matrix, damping)
        # The least number that this precision can tell from zero, so that a singular F
        # has a factor too.
        jitter = len(matrix) * float(jnp.finfo(matrix.dtype).eps)
        factor, exists = factorise(system, jitter)

        def apply(vector: PyTree) -> PyTree:
            flat, unravel = ravel_real(vector)
            solved = solve(factor, flat.astype(matrix.dtype)).astype(flat.dtype)
            return unravel(jnp.where(exists, solved / system.unit, flat))

        return apply
