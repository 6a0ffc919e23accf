"""What a likelihood is, and everything that follows from its KL divergence alone.

    H(z) = ∂²/∂z'² KL(p_z ‖ p_z') at z' = z,     H = B Bᵀ,

for the outputs z of one example: the Fisher information of the outputs is the
curvature of the KL divergence, so `kl` is all that a likelihood must define. Closed
forms override what is derived here. Knows nothing of models or of the batch mean.
"""

import abc
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from ngd_jax.likelihoods.checks import check_like, describe
from ngd_jax.tree import widen
from ngd_jax.types import Array, KeyArray, Outputs, PyTree

__all__ = ["Likelihood"]


class Likelihood(abc.ABC):
    """A distribution of targets for every example, given the outputs of a model.

    The leading axes of the outputs are the batch, the trailing ones belong to one
    example. Every method keeps the batch: values are per example, in nats, and who
    calls takes the mean. Methods are pure and work under `jit`, `vmap` and `grad`;
    they compute in float32 or wider, whatever the dtype of the outputs.

    A likelihood of your own defines `kl`. The Fisher products then come from automatic
    differentiation, and `log_prob` and `sample` are needed only by the losses and by
    the sampled and the empirical Fisher. Make it a frozen dataclass, so that it can be
    compared and hashed.

    Attributes:
      centered: Whether the metric is a covariance over the examples, so that it mixes
        them. The Fisher then centres with its own weighted mean.
      kl_curvature: The Hessian of the KL at equality divided by the metric. 1 for every
        Fisher metric.

    Example:
      Waiting times, exponentially distributed with the log rate as the output. With
      d = log λ_q − log λ_p, KL(p‖q) = eᵈ − 1 − d, and the Fisher information is 1.

      >>> import dataclasses, jax, jax.numpy as jnp
      >>> from ngd_jax.likelihoods import Likelihood
      >>> @dataclasses.dataclass(frozen=True)
      ... class Exponential(Likelihood):
      ...     def kl(self, outputs_p, outputs_q):
      ...         d = outputs_q - outputs_p
      ...         return jnp.expm1(d) - d
      ...
      ...     def log_prob(self, outputs, targets):
      ...         return outputs - targets * jnp.exp(outputs)
      ...
      ...     def sample(self, key, outputs):
      ...         return jax.random.exponential(key, outputs.shape) / jnp.exp(outputs)
      >>> log_rates = jnp.array([-1.0, 0.0, 2.0])
      >>> Exponential().fisher_vp(log_rates, jnp.array([1.0, 2.0, 3.0]))
      Array([1., 2., 3.], dtype=float32)
      >>> Exponential().batch_shape(log_rates)
      (3,)

    References:
      Amari, "Natural gradient works efficiently in learning", 1998; Martens, "New
      insights and perspectives on the natural gradient method", 2020, section 5.
    """

    centered: ClassVar[bool] = False
    kl_curvature: ClassVar[float] = 1.0

    @abc.abstractmethod
    def kl(self, outputs_p: Outputs, outputs_q: Outputs) -> Array:
        """KL(p‖q) = E_p[log p − log q] in nats, one value per example.

        Args:
          outputs_p: Outputs of the first distribution, over which the mean is taken.
          outputs_q: Outputs of the second, of the same structure and shapes.

        Returns:
          An array of the batch shape, exactly 0.0 where the outputs are equal.

        Raises:
          TypeError, ValueError: where the outputs do not fit the likelihood.
        """

    def log_prob(self, outputs: Outputs, targets: PyTree) -> Array:
        """The log-probability log p(targets | outputs) in nats, one value per example.

        Raises:
          TypeError: where the class defines no `log_prob`.
        """
        del outputs, targets
        raise TypeError(
            f"{self!r} has no log-probability, which the empirical and the sampled "
            f"Fisher and the losses need. Define "
            f"`log_prob(self, outputs, targets)` in {type(self).__name__}, or use the "
            f'exact Fisher (kind="exact").'
        )

    def sample(self, key: KeyArray, outputs: Outputs) -> PyTree:
        """Draws one target for every example, fit for `log_prob`.

        Raises:
          TypeError: where the class defines no `sample`.
        """
        del key, outputs
        raise TypeError(
            f"{self!r} cannot draw samples, which the sampled Fisher needs. Define "
            f"`sample(self, key, outputs)` in {type(self).__name__}, or use the exact "
            f'Fisher (kind="exact").'
        )

    def batch_shape(self, outputs: Outputs) -> tuple[int, ...]:
        """The per-example shape: that of `kl` and `log_prob`. Computes nothing.

        Args:
          outputs: Outputs, or their `jax.ShapeDtypeStruct`s.

        Raises:
          TypeError, ValueError: where the outputs do not fit the likelihood; the
            message names `outputs`, what was expected and what to do.
        """
        for leaf in jax.tree.leaves(outputs):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                raise TypeError(
                    f"`outputs` of {self!r} must have floating point dtypes, got "
                    f"{describe(outputs)}; convert with `.astype(jnp.float32)`."
                )
        result = jax.eval_shape(self.kl, outputs, outputs)
        if not hasattr(result, "shape"):
            raise TypeError(
                f"`kl` of {self!r} must return one array with a value per example, got "
                f"{describe(result)}."
            )
        return tuple(result.shape)

    def fisher_vp(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        """H t, the Fisher information of the outputs times a tangent, per example.

        Args:
          outputs: The outputs z at which H is taken.
          tangents: t, of the structure and shapes of the outputs.

        Returns:
          H t in the structure, shapes and dtypes of `tangents`; not averaged.
        """
        self.batch_shape(outputs)
        check_like(self, tangents, outputs, name="tangents")
        wide = widen(outputs)
        # The sum over examples has a block-diagonal Hessian, so that one
        # forward-over-reverse product gives all examples their own.
        gradient_fn = jax.grad(lambda other: jnp.sum(self.kl(wide, other)))
        like = jax.tree.map(lambda t, z: jnp.asarray(t, z.dtype), tangents, wide)
        _, products = jax.jvp(gradient_fn, (wide,), (like,))
        return jax.tree.map(
            lambda h, t: (h / self.kl_curvature).astype(jnp.result_type(t)),
            products,
            tangents,
        )

    def sqrt_fisher_vp(self, outputs: Outputs, coefficients: Outputs) -> Outputs:
        """B u, where H = B Bᵀ, per example.

        Without a closed form B is the symmetric root of the dense H of each example.

        Args:
          outputs: The outputs z at which H is taken.
          coefficients: u, of the structure and shapes of the outputs.

        Returns:
          B u in the structure, shapes and dtypes of `coefficients`; not averaged. For
          standard normal u it has the covariance H.
        """
        return self._apply_root(outputs, coefficients, name="coefficients")

    def sqrt_fisher_tvp(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        """Bᵀ t, the transpose of `sqrt_fisher_vp`, so that |Bᵀ t|² = tᵀ H t.

        Args:
          outputs: The outputs z at which H is taken.
          tangents: t, of the structure and shapes of the outputs.

        Returns:
          Bᵀ t in the structure, shapes and dtypes of `tangents`; not averaged.
        """
        return self._apply_root(outputs, tangents, name="tangents")

    def sqrt_fisher_solve(self, outputs: Outputs, cotangents: Outputs) -> Outputs:
        """The coefficients u of least norm with B u = c, per example.

        This is how the gradient of a loss with respect to the outputs enters a solver
        that works on the square root of the Fisher. What of c lies outside of the range
        of B (or within it only by round-off) is left out, so that u is finite; check
        with c − B u where it matters.

        Args:
          outputs: The outputs z at which H is taken.
          cotangents: c, of the structure and shapes of the outputs.

        Returns:
          u = B⁺ c in the structure and shapes of the outputs, float32 or wider.
        """
        shape = self.batch_shape(outputs)
        check_like(self, cotangents, outputs, name="cotangents")
        rows, split_fn = _ravel_examples(self, widen(cotangents), shape)
        root = self._dense_root(widen(outputs), shape)
        # The root of the round-off in H, which is what a null vector of H shows here.
        rtol = (rows.shape[-1] * float(jnp.finfo(root.dtype).eps)) ** 0.5
        inverse = jnp.linalg.pinv(root, rtol=rtol, hermitian=True)
        return split_fn(
            jnp.einsum("...ij,...j->...i", inverse, rows, precision="highest")
        )

    def _apply_root(self, outputs: Outputs, vector: Outputs, *, name: str) -> Outputs:
        shape = self.batch_shape(outputs)
        check_like(self, vector, outputs, name=name)
        rows, split_fn = _ravel_examples(self, vector, shape)
        root = self._dense_root(widen(outputs), shape)
        products = jnp.einsum(
            "...ij,...j->...i", root, rows.astype(root.dtype), precision="highest"
        )
        return split_fn(products)

    def _dense_root(self, outputs: Outputs, shape: tuple[int, ...]) -> Array:
        """The symmetric root of H for every example, [..., D, D]."""
        rows, split_fn = _ravel_examples(self, outputs, shape)

        def column(unit: Array) -> Array:
            tangents = split_fn(jnp.broadcast_to(unit, rows.shape))
            return _ravel_examples(self, self.fisher_vp(outputs, tangents), shape)[0]

        basis = jnp.eye(rows.shape[-1], dtype=rows.dtype)
        dense = jnp.moveaxis(jax.vmap(column)(basis), 0, -1)
        values, vectors = jnp.linalg.eigh((dense + jnp.swapaxes(dense, -1, -2)) / 2)
        values = jnp.sqrt(jnp.maximum(values, 0))  # round-off below zero
        return jnp.einsum(
            "...ik,...k,...jk->...ij", vectors, values, vectors, precision="highest"
        )


def _ravel_examples(likelihood: Likelihood, tree: PyTree, shape: tuple[int, ...]):
    """Lays the leaves of every example out in one row, [..., D], and back."""
    leaves, structure = jax.tree.flatten(tree)
    for leaf in leaves:
        if leaf.shape[: len(shape)] != shape:
            raise ValueError(
                f"`outputs` of {likelihood!r} must lead with the batch axes "
                f"{shape} of its `kl` in every leaf, got {describe(tree)}. Define "
                f"`sqrt_fisher_vp` and `sqrt_fisher_tvp` in "
                f"{type(likelihood).__name__} for outputs that examples share."
            )
    sizes = [math.prod(leaf.shape[len(shape) :]) for leaf in leaves]
    flat = widen([leaf.reshape((*shape, -1)) for leaf in leaves])
    dtype = jnp.result_type(*flat)
    rows = jnp.concatenate([leaf.astype(dtype) for leaf in flat], axis=-1)

    def split_fn(rows: Array) -> PyTree:
        parts, start = [], 0
        for leaf, size in zip(leaves, sizes, strict=True):
            part = rows[..., start : start + size].reshape(leaf.shape)
            parts.append(part.astype(leaf.dtype))
            start += size
        return jax.tree.unflatten(structure, parts)

    return rows, split_fn
