"""Preconditioners: v -> M⁻¹ v with M near F + λI, built from a Fisher.

    Jacobi:   M = (diag F + λ)^power
    Nystrom:  M⁻¹ = I - U (I - (λᵣ + λ)(Λ + λ)⁻¹) Uᵀ,    F ≈ U Λ Uᵀ of rank r

Conjugate gradients take about as many steps as M⁻¹(F + λI) has distinct clusters of
eigenvalues, and do not depend on the size of M: each M here is in units of its largest
entry or eigenvalue, or of the smallest eigenvalue it deflates to. What is expensive to
build is kept in a state and built anew every `refresh_every` steps; the damping is not
part of it, and may change from step to step. Knows nothing of solvers.
"""

from typing import Any, Protocol, runtime_checkable

from ngd_jax.types import ArrayLike, MatVec, Params, PyTree

__all__ = ["Preconditioner"]


@runtime_checkable
class Preconditioner(Protocol):
    """A way to build v -> M⁻¹ v, with a state that outlives a step."""

    def init(self, params: Params) -> PyTree:
        """The state before anything is built, with which M is a multiple of I."""
        ...

    def update(self, fisher: Any, state: PyTree) -> PyTree:
        """The state for this step: built anew if it is due, else one step older."""
        ...

    def matvec(self, state: PyTree, damping: ArrayLike) -> MatVec:
        """The map v -> M⁻¹ v, symmetric positive definite."""
        ...

    def __call__(self, fisher: Any, damping: ArrayLike) -> MatVec:
        """The same, built for this Fisher and not kept."""
        ...
