"""Likelihoods from a function: a KL divergence, or a distribution object.

    H(z) = ∂²/∂z'² KL(p_z ‖ p_z') at z' = z, by automatic differentiation.

Knows distribution objects by their methods alone; imports no library of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from ngd_jax.likelihoods.base import Likelihood
from ngd_jax.likelihoods.checks import message
from ngd_jax.tree import check_like, widen
from ngd_jax.types import Array, KeyArray, Outputs, PyTree

__all__ = ["FromDistribution", "FromKL"]


@dataclasses.dataclass(frozen=True)
class FromKL(Likelihood):
    """The metric of any KL divergence, in one line.

    Args:
      kl_fn: `kl_fn(outputs_p, outputs_q)`, the KL divergence in nats of every example,
        twice differentiable where both are equal. One value per example: sum over the
        axes of one example only. Outputs come in float32 or wider.
      log_prob_fn: `log_prob_fn(outputs, targets)` per example; for losses and for the
        sampled and the empirical Fisher only.
      sample_fn: `sample_fn(key, outputs)`, targets for `log_prob_fn`; for the sampled
        Fisher only.

    Raises:
      TypeError: for arguments that cannot be called.

    Example:
      >>> import jax.numpy as jnp
      >>> from ngd_jax.likelihoods import FromKL
      >>> def exponential_kl(log_rate_p, log_rate_q):
      ...     d = log_rate_q - log_rate_p
      ...     return jnp.expm1(d) - d
      >>> likelihood = FromKL(exponential_kl)
      >>> likelihood.fisher_vp(jnp.array([0.0, 5.0]), jnp.array([2.0, 3.0]))
      Array([2., 3.], dtype=float32)
    """

    kl_fn: Callable[[Outputs, Outputs], Array]
    log_prob_fn: Callable[[Outputs, PyTree], Array] | None = None
    sample_fn: Callable[[KeyArray, Outputs], PyTree] | None = None

    def __post_init__(self):
        _check_callable("kl_fn", self.kl_fn)
        for name in ("log_prob_fn", "sample_fn"):
            if getattr(self, name) is not None:
                _check_callable(name, getattr(self, name))

    def kl(self, outputs_p: Outputs, outputs_q: Outputs) -> Array:
        """`kl_fn` of the outputs in float32 or wider: nats, per example.

        Raises:
          TypeError, ValueError: if the two outputs differ in structure or shapes.
        """
        check_like(outputs_q, outputs_p, name="outputs_q", like_name="outputs_p")
        return self.kl_fn(widen(outputs_p), widen(outputs_q))

    def log_prob(self, outputs: Outputs, targets: PyTree) -> Array:
        """`log_prob_fn` of the outputs in float32 or wider: nats, per example.

        Raises:
          TypeError: if there is no `log_prob_fn`.
        """
        return self._function("log_prob_fn")(widen(outputs), targets)

    def sample(self, key: KeyArray, outputs: Outputs) -> PyTree:
        """`sample_fn` of the outputs in float32 or wider.

        Raises:
          TypeError: if there is no `sample_fn`.
        """
        return self._function("sample_fn")(key, widen(outputs))

    def _function(self, name: str) -> Callable[..., Any]:
        function = getattr(self, name)
        if function is None:
            raise TypeError(
                f"{self!r} has no `{name}`. Construct it with FromKL(kl_fn, {name}=...)"
                f', or use the exact Fisher (kind="exact"), which needs the KL alone.'
            )
        return function


@dataclasses.dataclass(frozen=True)
class FromDistribution(Likelihood):
    """The likelihood of a distribution object such as those of distrax.

    Args:
      make: `make(outputs)` returns an object with `log_prob(targets)`,
        `kl_divergence(other)` and `sample(seed=key)`, batched like the outputs. Called
        with outputs in float32 or wider. Its KL must be twice differentiable where the
        two distributions are equal.

    Raises:
      TypeError: if `make` cannot be called.

    Example:
      With distrax, `FromDistribution(lambda z: distrax.Categorical(logits=z))`; for a
      policy, `FromDistribution(lambda z: distrax.MultivariateNormalDiag(z["mean"],
      jnp.exp(z["log_scale"])))`. Any object with the methods that are called will do:

      >>> import dataclasses, jax, jax.numpy as jnp
      >>> from ngd_jax.likelihoods import FromDistribution
      >>> @dataclasses.dataclass
      ... class Rayleigh:
      ...     log_scale: jax.Array
      ...
      ...     def kl_divergence(self, other):
      ...         d = 2 * (self.log_scale - other.log_scale)
      ...         return jnp.expm1(d) - d
      >>> likelihood = FromDistribution(Rayleigh)
      >>> likelihood.fisher_vp(jnp.zeros(2), jnp.array([1.0, 2.0]))
      Array([4., 8.], dtype=float32)
    """

    make: Callable[[Outputs], Any]

    def __post_init__(self):
        _check_callable("make", self.make)

    def kl(self, outputs_p: Outputs, outputs_q: Outputs) -> Array:
        """`kl_divergence` of the two distributions: nats, per example.

        Raises:
          TypeError, ValueError: if the two outputs differ in structure or shapes, or
            the object has no `kl_divergence`.
        """
        check_like(outputs_q, outputs_p, name="outputs_q", like_name="outputs_p")
        other = self.make(widen(outputs_q))
        return self._method(outputs_p, "kl_divergence")(other)

    def log_prob(self, outputs: Outputs, targets: PyTree) -> Array:
        """`log_prob` of the distribution: nats, per example.

        Raises:
          TypeError: if the object has no `log_prob`.
        """
        return self._method(outputs, "log_prob")(targets)

    def sample(self, key: KeyArray, outputs: Outputs) -> PyTree:
        """`sample(seed=key)` of the distribution.

        Raises:
          TypeError: if the object has no `sample`.
        """
        return self._method(outputs, "sample")(seed=key)

    def _method(self, outputs: Outputs, name: str) -> Callable[..., Any]:
        distribution = self.make(widen(outputs))
        method = getattr(distribution, name, None)
        if method is None:
            rule = f"return an object with a method `{name}`"
            raise TypeError(message(self, "make", rule, distribution))
        return method


def _check_callable(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"`{name}` must be a function, got {value!r}.")
