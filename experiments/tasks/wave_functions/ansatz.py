"""Networks for log ψ of spin configurations: `[N, L]` to `[N]`."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = [
    "Convolutional",
    "Perceptron",
    "RestrictedBoltzmann",
    "Transformer",
    "log_cosh",
]


def log_cosh(x: jax.Array) -> jax.Array:
    """Log cosh x without overflow, real or complex."""
    # cosh is even: use the sign with the smaller exponential.
    x = jnp.where(jnp.real(x) < 0, -x, x)
    return x + jnp.log1p(jnp.exp(-2 * x)) - math.log(2)


class RestrictedBoltzmann(nn.Module):
    """log ψ = a·s + Σ log cosh(b + W s).

    With complex parameters it is a holomorphic function of them.

    Attributes:
      num_hidden: hidden units.
      dtype: of the parameters.
      scale: initial standard deviation of the parameters; of both parts if complex.

    References:
      Carleo and Troyer, Solving the quantum many-body problem with artificial neural
      networks, 2017.
    """

    num_hidden: int
    dtype: Any
    scale: float = 0.01

    @nn.compact
    def __call__(self, spins: jax.Array) -> jax.Array:
        """Returns log ψ, `[N]`."""
        num_spins = spins.shape[-1]
        init, dtype = self._draw, self.dtype
        a = self.param("visible_bias", init, (num_spins,), dtype)
        b = self.param("hidden_bias", init, (self.num_hidden,), dtype)
        w = self.param("kernel", init, (num_spins, self.num_hidden), dtype)
        return spins @ a + log_cosh(spins @ w + b).sum(-1)

    def _draw(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if not jnp.issubdtype(dtype, jnp.complexfloating):
            return self.scale * jax.random.normal(key, shape, dtype)
        real, imaginary = jax.random.normal(key, (2, *shape), jnp.finfo(dtype).dtype)
        return self.scale * (real + 1j * imaginary)


class Perceptron(nn.Module):
    """log ψ by a tanh perceptron with one linear output.

    Attributes:
      widths: of the hidden layers.
      dtype: of the parameters.
    """

    widths: Sequence[int]
    dtype: Any

    @nn.compact
    def __call__(self, spins: jax.Array) -> jax.Array:
        """Returns log ψ, `[N]`."""
        x = spins
        for width in self.widths:
            x = jnp.tanh(nn.Dense(width, param_dtype=self.dtype)(x))
        return nn.Dense(1, param_dtype=self.dtype)(x)[..., 0]


class Convolutional(nn.Module):
    """log ψ by convolutions around the ring, summed: invariant to its rotations.

    Attributes:
      channels: of the layers.
      width: number of sites that a convolution sees.
      dtype: of the parameters.
    """

    channels: Sequence[int]
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, spins: jax.Array) -> jax.Array:
        """Returns log ψ, `[N]`."""
        x = spins[..., None]
        # A matrix product with the neighbourhood of each site instead of `nn.Conv`: in
        # float64 XLA has no fast convolutions for CPUs
        # (https://github.com/jax-ml/jax/issues/940), and per-sample gradients, grouped
        # convolutions, took 40 s for 512 samples.
        sites = jnp.arange(x.shape[-2])
        window = jnp.arange(self.width) - (self.width - 1) // 2
        seen = (sites[:, None] + window) % len(sites)
        for number, channels in enumerate(self.channels):
            patches = x[..., seen, :].reshape(*x.shape[:-1], -1)
            update = jnp.tanh(nn.Dense(channels, param_dtype=self.dtype)(patches))
            x = x + update if number and channels == x.shape[-1] else update
        return nn.Dense(1, param_dtype=self.dtype)(x.sum(axis=-2))[..., 0]


class Transformer(nn.Module):
    """log ψ by attention between the sites of a ring: invariant to its rotations.

    Each layer is x + attention(norm(x)), then x + perceptron(norm(x)). The attention
    between two sites depends on their distance around the ring, by one learned number
    for each distance.

    Attributes:
      num_layers: layers.
      width: number of features per site; a multiple of `num_heads`.
      dtype: of the parameters.
      num_heads: number of attention heads.

    References:
      Viteritti, Rende and Becca, Transformer variational wave functions for frustrated
      quantum spin systems, 2023.
    """

    num_layers: int
    width: int
    dtype: Any
    num_heads: int = 4

    @nn.compact
    def __call__(self, spins: jax.Array) -> jax.Array:
        """Returns log ψ, `[N]`."""
        x = nn.Dense(self.width, param_dtype=self.dtype)(spins[..., None])
        for number in range(self.num_layers):
            x = x + self._attention(nn.LayerNorm(param_dtype=self.dtype)(x), number)
            hidden = nn.LayerNorm(param_dtype=self.dtype)(x)
            hidden = nn.Dense(2 * self.width, param_dtype=self.dtype)(hidden)
            x = x + nn.Dense(self.width, param_dtype=self.dtype)(nn.gelu(hidden))
        x = nn.LayerNorm(param_dtype=self.dtype)(x).mean(axis=-2)
        # Small at first: the sites are normalised, so equal spins add up, and if ψ
        # starts out concentrated on one configuration, no gradient leads away from it.
        small = nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
        x = nn.Dense(self.width, param_dtype=self.dtype, kernel_init=small)(x)
        return log_cosh(x).sum(-1)

    def _attention(self, x: jax.Array, number: int) -> jax.Array:
        num_sites, size = x.shape[-2], self.width // self.num_heads
        shape = (3, self.num_heads, size)
        q, k, v = jnp.moveaxis(nn.DenseGeneral(shape, param_dtype=self.dtype)(x), -3, 0)
        zeros = nn.initializers.zeros_init()
        shape = (self.num_heads, num_sites)
        by_distance = self.param(f"distance_{number}", zeros, shape, self.dtype)
        sites = jnp.arange(num_sites)
        bias = by_distance[:, (sites[:, None] - sites[None]) % num_sites]
        scores = jnp.einsum("...ihc,...jhc->...hij", q, k) / math.sqrt(size)
        weights = jax.nn.softmax(
            scores + bias.reshape((1,) * (x.ndim - 2) + bias.shape)
        )
        mixed = jnp.einsum("...hij,...jhc->...ihc", weights, v)
        return nn.DenseGeneral(self.width, axis=(-2, -1), param_dtype=self.dtype)(mixed)
