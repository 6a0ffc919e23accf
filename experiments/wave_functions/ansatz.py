"""Networks for log ψ of spin configurations: `[N, L]` to `[N]`."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["Convolutional", "Perceptron", "RestrictedBoltzmann", "log_cosh"]


def log_cosh(x: jax.Array) -> jax.Array:
    """Log cosh x without overflow, real or complex."""
    # cosh is even: of the two signs, the one whose exponential is the small one.
    x = jnp.where(jnp.real(x) < 0, -x, x)
    return x + jnp.log1p(jnp.exp(-2 * x)) - math.log(2)


class RestrictedBoltzmann(nn.Module):
    """log ψ = a·s + Σ log cosh(b + W s).

    With complex parameters it is a holomorphic function of them.

    Attributes:
      num_hidden: hidden units.
      dtype: of the parameters.
      scale: standard deviation of the first ones; of both parts of complex ones.

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
    """log ψ by convolutions around the ring, summed: the same for a turned ring.

    Attributes:
      channels: of the layers.
      width: sites that a convolution sees.
      dtype: of the parameters.
    """

    channels: Sequence[int]
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, spins: jax.Array) -> jax.Array:
        """Returns log ψ, `[N]`."""
        x = spins[..., None]
        for number, channels in enumerate(self.channels):
            convolution = nn.Conv(
                channels, (self.width,), padding="CIRCULAR", param_dtype=self.dtype
            )
            update = jnp.tanh(convolution(x))
            x = x + update if number and channels == x.shape[-1] else update
        return nn.Dense(1, param_dtype=self.dtype)(x.sum(axis=-2))[..., 0]
