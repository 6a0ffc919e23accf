"""Preconditioners: v -> M⁻¹ v with M near F + λI, built from a Fisher.

    Jacobi:     M = (diag F + λ)^power
    Nystrom:    M⁻¹ = I - U (I - (λᵣ + λ)(Λ + λ)⁻¹) Uᵀ,    F ≈ U Λ Uᵀ of rank r
    Kronecker:  M = (A + ε) ⊗ (G + ε') for each dense layer and convolution

Conjugate gradients take about as many steps as M⁻¹(F + λI) has clusters of eigenvalues,
whatever the size of M. What is expensive to build is kept in a state and built anew
every `refresh_every` steps. Knows nothing of solvers.
"""

from ngd_jax.preconditioners.base import Preconditioner
from ngd_jax.preconditioners.jacobi import Jacobi, JacobiState
from ngd_jax.preconditioners.kronecker import Kronecker, KroneckerState
from ngd_jax.preconditioners.nystrom import Nystrom, NystromState

__all__ = [
    "Jacobi",
    "JacobiState",
    "Kronecker",
    "KroneckerState",
    "Nystrom",
    "NystromState",
    "Preconditioner",
]
