"""Preconditioners: v -> M⁻¹ v with M near F + λI, built from a Fisher.

    Jacobi:   M = (diag F + λ)^power
    Nystrom:  M⁻¹ = I - U (I - (λᵣ + λ)(Λ + λ)⁻¹) Uᵀ,    F ≈ U Λ Uᵀ of rank r

Conjugate gradients take about as many steps as M⁻¹(F + λI) has clusters of eigenvalues,
whatever the size of M, so each M here has a largest or a typical entry of 1. What is
expensive to build is kept in a state and built anew every `refresh_every` steps; the
damping is not part of it, and may change from step to step. Knows nothing of solvers.
"""

from ngd_jax.preconditioners.base import Preconditioner
from ngd_jax.preconditioners.jacobi import Jacobi, JacobiState
from ngd_jax.preconditioners.nystrom import Nystrom, NystromState

__all__ = ["Jacobi", "JacobiState", "Nystrom", "NystromState", "Preconditioner"]
