"""What a likelihood is, and everything that follows from its KL divergence alone.

    H(z) = ∂²/∂z'² KL(p_z ‖ p_z') at z' = z,     H = B Bᵀ,

for the outputs z of one example: the Fisher information of the outputs is the
curvature of the KL divergence, so `kl` is all that a likelihood must define. Closed
forms override what is derived here: the public methods check their arguments, convert
them to float32 or wider and round the result; the private ones (`_fisher_vp`, ...) hold
the formulas. Knows nothing of models or of the batch mean.
"""

import abc
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ngd_jax.likelihoods import numerics
from ngd_jax.likelihoods.checks import check_inexact, describe, message
from ngd_jax.tree import check_like
from ngd_jax.types import Array, KeyArray, Outputs, PyTree

__all__ = ["Likelihood"]


class Likelihood(abc.ABC):
    """A distribution of targets for every example, given the outputs of a model.

    The leading axes of the outputs are the batch, the trailing ones belong to one
    example. Every method keeps the batch: values are per example, in nats, and the
    caller takes the mean. Methods are pure and work under `jit`, `vmap` and `grad`;
    they compute in float32 or wider, whatever the dtype of the outputs.

    To write your own, define `kl`. The Fisher products then come from automatic
    differentiation, and `log_prob` and `sample` are needed only by the losses and by
    the sampled and the empirical Fisher. Make it a frozen dataclass, so that it can be
    compared and hashed.

    Attributes:
      centered: Whether the metric is a covariance over the examples, and so mixes them.
        The Fisher then subtracts its own weighted mean.
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
          outputs_p: Outputs of the first distribution, under which the expectation is
            taken.
          outputs_q: Outputs of the second, of the same structure and shapes.

        Returns:
          An array of the batch shape, exactly 0.0 where the outputs are equal.

        Raises:
          TypeError, ValueError: if the outputs do not fit the likelihood.
        """

    def log_prob(self, outputs: Outputs, targets: PyTree) -> Array:
        """The log-probability log p(targets | outputs) in nats, one value per example.

        Raises:
          TypeError: if the class defines no `log_prob`.
        """
        del outputs, targets
        raise TypeError(
            f"{self!r} has no log-probability, which losses and the empirical and "
            f"sampled Fisher need. Define `log_prob(self, outputs, targets)` in "
            f'{type(self).__name__}, or use the exact Fisher (kind="exact").'
        )

    def sample(self, key: KeyArray, outputs: Outputs) -> PyTree:
        """Draws one target for every example, as `log_prob` takes them.

        Raises:
          TypeError: if the class defines no `sample`.
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
          TypeError, ValueError: if the outputs do not fit the likelihood, or its `kl`
            does not return one number per example.
        """
        check_inexact(self, outputs, name="outputs")
        result = jax.eval_shape(self.kl, outputs, outputs)
        if not jnp.issubdtype(getattr(result, "dtype", jnp.bool_), jnp.floating):
            rule = "return one array of real numbers, one per example"
            raise TypeError(message(self, "kl", rule, result))
        shape = tuple(result.shape)
        shapes = jax.eval_shape(lambda x: x, outputs)
        leads = [leaf.shape[: len(shape)] == shape for leaf in jax.tree.leaves(shapes)]
        if not all(leads) or (shape == () and _mixes_examples(self.kl, shapes)):
            rule = (
                f"return one value per example, with the leading axes of the outputs "
                f"{describe(outputs)} as its shape"
            )
            advice = (
                "sum over the axes of one example only, do not average over the "
                "batch, and let `model_fn` broadcast what examples share"
            )
            raise ValueError(message(self, "kl", rule, result, advice))
        return shape

    def fisher_vp(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        """H t, the Fisher information of the outputs times a tangent, per example.

        Args:
          outputs: The outputs z at which H is taken.
          tangents: t, of the structure and shapes of the outputs.

        Returns:
          H t in the structure, shapes and dtypes of `tangents`; not averaged.

        Raises:
          TypeError, ValueError: if the outputs or the tangents do not fit.
        """
        z, t = self._wide_pair(outputs, tangents, name="tangents")
        return numerics.cast_like(self._fisher_vp(z, t), tangents)

    def sqrt_fisher_vp(self, outputs: Outputs, coefficients: Outputs) -> Outputs:
        """B u, where H = B Bᵀ, per example.

        Without a closed form, B is the symmetric root of the dense H of each example.

        Args:
          outputs: The outputs z at which H is taken.
          coefficients: u, of the structure and shapes of the outputs.

        Returns:
          B u in the structure, shapes and dtypes of `coefficients`; not averaged. For
          standard normal u it has the covariance H.

        Raises:
          TypeError, ValueError: if the outputs or the coefficients do not fit.
        """
        z, u = self._wide_pair(outputs, coefficients, name="coefficients")
        return numerics.cast_like(self._sqrt_fisher_vp(z, u), coefficients)

    def sqrt_fisher_tvp(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        """Bᵀ t, the transpose of `sqrt_fisher_vp`, so that |Bᵀ t|² = tᵀ H t.

        Args:
          outputs: The outputs z at which H is taken.
          tangents: t, of the structure and shapes of the outputs.

        Returns:
          Bᵀ t in the structure, shapes and dtypes of `tangents`; not averaged.

        Raises:
          TypeError, ValueError: if the outputs or the tangents do not fit.
        """
        z, t = self._wide_pair(outputs, tangents, name="tangents")
        return numerics.cast_like(self._sqrt_fisher_tvp(z, t), tangents)

    def sqrt_fisher_solve(self, outputs: Outputs, cotangents: Outputs) -> Outputs:
        """The coefficients u of least norm with B u = c, per example.

        This is how the gradient of a loss with respect to the outputs enters a solver
        that works on the square root of the Fisher. The part of c outside the range of
        B (or inside it only by round-off) is dropped, so that u is finite; compute
        c − B u where it matters.

        Args:
          outputs: The outputs z at which H is taken.
          cotangents: c, of the structure and shapes of the outputs.

        Returns:
          u = B⁺ c in the structure and shapes of the outputs, float32 or wider.

        Raises:
          TypeError, ValueError: if the outputs or the cotangents do not fit.
        """
        z, c = self._wide_pair(outputs, cotangents, name="cotangents")
        return self._sqrt_fisher_solve(z, c)

    # The formulas. Arguments are checked, and float32 or wider.

    def _fisher_vp(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        # The sum over examples has a block-diagonal Hessian, so that one
        # forward-over-reverse product gives every example its own H t.
        gradient_fn = jax.grad(lambda other: jnp.sum(self.kl(outputs, other)))
        _, products = jax.jvp(gradient_fn, (outputs,), (tangents,))
        return jax.tree.map(lambda product: product / self.kl_curvature, products)

    def _sqrt_fisher_vp(self, outputs: Outputs, coefficients: Outputs) -> Outputs:
        shape = self.batch_shape(outputs)
        return _multiply(self._dense_root(outputs, shape), coefficients, shape)

    def _sqrt_fisher_tvp(self, outputs: Outputs, tangents: Outputs) -> Outputs:
        return self._sqrt_fisher_vp(outputs, tangents)  # symmetric unless overridden

    def _sqrt_fisher_solve(self, outputs: Outputs, cotangents: Outputs) -> Outputs:
        shape = self.batch_shape(outputs)
        inverse = self._dense_root(outputs, shape, is_inverse=True)
        return _multiply(inverse, cotangents, shape)

    def _dense_root(
        self, outputs: Outputs, shape: tuple[int, ...], *, is_inverse: bool = False
    ) -> Array:
        """The symmetric root B of H for every example, [..., D, D], or B⁺."""
        rows, split_fn = _ravel_examples(outputs, shape)

        def column(unit: Array) -> Array:
            tangents = split_fn(jnp.broadcast_to(unit, rows.shape))
            return _ravel_examples(self.fisher_vp(outputs, tangents), shape)[0]

        size = rows.shape[-1]
        dense = jnp.moveaxis(jax.vmap(column)(jnp.eye(size, dtype=rows.dtype)), 0, -1)
        values, vectors = jnp.linalg.eigh((dense + jnp.swapaxes(dense, -1, -2)) / 2)
        values = jnp.sqrt(jnp.maximum(values, 0))  # round-off below zero
        if is_inverse:
            # The round-off in H is ε times its size, and in a zero eigenvalue of B the
            # square root of that.
            rtol = (size * float(jnp.finfo(values.dtype).eps)) ** 0.5
            is_used = values > rtol * jnp.max(values, -1, keepdims=True, initial=0)
            values = jnp.where(is_used, 1 / jnp.where(is_used, values, 1), 0)
        scaled = vectors * values[..., None, :]
        return jnp.einsum("...ik,...jk->...ij", scaled, vectors, precision="highest")

    def _wide_pair(
        self, outputs: Outputs, other: Outputs, *, name: str = "outputs_q"
    ) -> tuple[Outputs, Outputs]:
        self.batch_shape(outputs)
        check_like(other, outputs, name=name, like_name="outputs")
        check_inexact(self, other, name=name)
        return numerics.wide_pair(outputs, other)


def _mixes_examples(kl_fn: Callable[..., Array], outputs: Outputs) -> bool:
    """Whether a `kl_fn` of shape () is a sum or mean over the batch.

    One number is right for the outputs of one example (under `vmap`) and wrong for
    those of a batch. With one more leading axis, of length 2, the former gives two.
    """
    if not any(leaf.shape for leaf in jax.tree.leaves(outputs)):
        return False
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), outputs
    )
    try:
        return jax.eval_shape(kl_fn, batch, batch).shape != (2,)
    except Exception:  # noqa: BLE001  # anything that a user's function may raise
        return True


def _multiply(matrices: Array, vectors: Outputs, shape: tuple[int, ...]) -> Outputs:
    rows, split_fn = _ravel_examples(vectors, shape)
    return split_fn(jnp.einsum("...ij,...j->...i", matrices, rows, precision="highest"))


def _ravel_examples(
    tree: PyTree, shape: tuple[int, ...]
) -> tuple[Array, Callable[[Array], PyTree]]:
    """Lays the leaves of every example out in one row, [..., D]; and the way back."""

    def empty(leaf: Array) -> Array:
        return jnp.zeros(leaf.shape[len(shape) :], leaf.dtype)

    _, split_fn = ravel_pytree(jax.tree.map(empty, tree))

    def ravel_fn(example: PyTree) -> Array:
        return ravel_pytree(example)[0]

    for _ in shape:
        ravel_fn, split_fn = jax.vmap(ravel_fn), jax.vmap(split_fn)
    return ravel_fn(tree), split_fn
