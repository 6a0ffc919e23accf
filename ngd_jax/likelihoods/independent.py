"""Distributions whose Fisher information is diagonal in the outputs.

    H = diag(r²),   B = Bᵀ = diag(r),

for a root r that each of them gives in closed form. Owns the products and the checks
that Bernoulli, the Gaussians and Poisson share; knows none of their formulas.
"""

import abc
import operator

import jax
import jax.numpy as jnp

from ngd_jax.likelihoods import numerics
from ngd_jax.likelihoods.base import Likelihood
from ngd_jax.likelihoods.checks import batch_shape_of, check_number, check_targets
from ngd_jax.types import Array, Outputs

__all__ = ["IndependentLikelihood"]


class IndependentLikelihood(Likelihood):
    """Independent entries: the last `event_ndims` axes together are one example."""

    event_ndims: int

    def __post_init__(self):
        check_number("event_ndims", self.event_ndims, int)

    @abc.abstractmethod
    def _root(self, outputs: Outputs) -> Outputs:
        """The root r = √diag(H), in the structure of the outputs."""

    def batch_shape(self, outputs: Outputs) -> tuple[int, ...]:
        """All axes of the outputs but the last `event_ndims`.

        Raises:
          TypeError: unless the outputs are a real floating point array.
          ValueError: unless they have at least `event_ndims` axes.
        """
        return self._batch_shape_of(outputs, name="outputs")

    def _fisher_vp(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        """H t = r ∘ (r ∘ t): r² alone could overflow."""
        root = self._root(outputs)
        return jax.tree.map(lambda r, t: r * (r * t), root, tangents)

    def _sqrt_fisher_vp(self, outputs: Outputs, coefficients: Outputs) -> Outputs:
        """B u = r ∘ u."""
        return jax.tree.map(operator.mul, self._root(outputs), coefficients)

    def _sqrt_fisher_solve(self, outputs: Outputs, cotangents: Outputs) -> Outputs:
        """The coefficients u = c / r, 0 where r is 0 to working precision."""
        return jax.tree.map(numerics.divided, cotangents, self._root(outputs))

    def _batch_shape_of(self, array: Array, *, name: str) -> tuple[int, ...]:
        ndims = self.event_ndims
        axes = ", ".join(["...", *(f"D{i + 1}" for i in range(ndims))])
        expected = f"an array of shape [{axes}]"
        return batch_shape_of(self, array, ndims, name=name, expected=expected)

    def _wide_with_targets(
        self, outputs: Array, targets: Array, *, what: str
    ) -> tuple[Array, ...]:
        self.batch_shape(outputs)
        check_targets(self, targets, outputs.shape, what=what)
        return numerics.wide_together(outputs, targets)

    def _sum_event(self, values: Array) -> Array:
        axes = range(values.ndim - self.event_ndims, values.ndim)
        return jnp.sum(values, axis=tuple(axes))
