"""Distributions whose Fisher information is diagonal in the outputs.

    H = diag(r²),   B = Bᵀ = diag(r),

for a root r that each of them gives in closed form. Owns the products and the checks
that Bernoulli, the Gaussians and Poisson share; knows none of their formulas.
"""

import abc

import jax
import jax.numpy as jnp

from ngd_jax.likelihoods.base import Likelihood
from ngd_jax.likelihoods.checks import (
    batch_shape_of,
    check_like,
    check_nonnegative_int,
    check_targets,
)
from ngd_jax.likelihoods.numerics import divided, wide_together
from ngd_jax.types import Array, Outputs

__all__ = ["IndependentLikelihood"]


class IndependentLikelihood(Likelihood):
    """Independent entries: the last `event_ndims` axes together are one example."""

    event_ndims: int

    def __post_init__(self):
        check_nonnegative_int("event_ndims", self.event_ndims)

    @abc.abstractmethod
    def fisher_root(self, outputs: Outputs) -> Outputs:
        """The root r = √diag(H), in the structure of the outputs, float32 or wider."""

    def batch_shape(self, outputs: Outputs) -> tuple[int, ...]:
        """All axes of the outputs but the last `event_ndims`.

        Raises:
          TypeError: unless the outputs are a real floating point array.
          ValueError: unless they have at least `event_ndims` axes.
        """
        return batch_shape_of(
            self, outputs, self.event_ndims, name="outputs", expected=self._expected
        )

    def fisher_vp(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        """H t = r² ∘ t, in the dtypes of `tangents`.

        Raises:
          TypeError, ValueError: where the outputs or the tangents do not fit.
        """
        half = self._scaled(outputs, tangents, name="tangents")
        return self._scaled(outputs, half, name="tangents", like=tangents)

    def sqrt_fisher_vp(self, outputs: Outputs, coefficients: Outputs) -> Outputs:
        """B u = r ∘ u, in the dtypes of `coefficients`.

        Raises:
          TypeError, ValueError: where the outputs or the coefficients do not fit.
        """
        return self._scaled(
            outputs, coefficients, name="coefficients", like=coefficients
        )

    def sqrt_fisher_tvp(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        """Bᵀ t = r ∘ t, in the dtypes of `tangents`.

        Raises:
          TypeError, ValueError: where the outputs or the tangents do not fit.
        """
        return self._scaled(outputs, tangents, name="tangents", like=tangents)

    def sqrt_fisher_solve(self, outputs: Outputs, cotangents: Outputs) -> Outputs:
        """The coefficients u = c / r, 0 where r is 0 to working precision.

        Raises:
          TypeError, ValueError: where the outputs or the cotangents do not fit.
        """
        self.batch_shape(outputs)
        check_like(self, cotangents, outputs, name="cotangents")

        def quotient(root: Array, x: Array) -> Array:
            return divided(*wide_together(x, root))

        return jax.tree.map(quotient, self.fisher_root(outputs), cotangents)

    @property
    def _expected(self) -> str:
        axes = ", ".join(["...", *(f"D{i + 1}" for i in range(self.event_ndims))])
        return f"an array of shape [{axes}]"

    def _scaled(
        self,
        outputs: Outputs,
        vector: Outputs,
        *,
        name: str,
        like: Outputs | None = None,
    ) -> Outputs:
        """Returns r ∘ vector, wide, or in the dtypes of `like`."""
        self.batch_shape(outputs)
        check_like(self, vector, outputs, name=name)

        def multiply(root: Array, x: Array) -> Array:
            root, x = wide_together(root, x)
            return root * x

        products = jax.tree.map(multiply, self.fisher_root(outputs), vector)
        if like is None:
            return products
        return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), products, like)

    def _wide_pair(self, outputs_p: Array, outputs_q: Array) -> tuple[Array, ...]:
        self.batch_shape(outputs_p)
        check_like(self, outputs_q, outputs_p, name="outputs_q")
        return wide_together(outputs_p, outputs_q)

    def _wide_with_targets(
        self, outputs: Array, targets: Array, *, what: str
    ) -> tuple[Array, ...]:
        self.batch_shape(outputs)
        check_targets(self, targets, outputs.shape, what=what)
        return wide_together(outputs, targets)

    def _sum_event(self, values: Array) -> Array:
        axes = range(values.ndim - self.event_ndims, values.ndim)
        return jnp.sum(values, axis=tuple(axes))
