"""K-FAC: blocks of F as Kronecker products, as a preconditioner and as a solver.

    F ≈ M = A ⊗ G,    (A + ε) ⊗ (G + ε'),    ε = π √λ,    ε' = √λ / π

for every matrix among the parameters; vectors have a diagonal. Where `layers` proves a
dense layer or a convolution, A = E[a aᵀ] is computed from its inputs and G = E[δ δᵀ]
from the cotangents of its outputs; the factors of any other matrix use its gradients. M
is symmetric positive definite for every model. Owns these factors; must not look into
programs.
"""

from ngd_jax.kfac.kronecker import Kronecker, claims
from ngd_jax.kfac.solver import KFAC
from ngd_jax.kfac.state import KroneckerState

__all__ = ["KFAC", "Kronecker", "KroneckerState", "claims"]
