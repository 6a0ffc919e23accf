"""Networks for log ψ of spin configurations: `[N, L]` to `[N]`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.wave_functions.lattices import Lattice

__all__ = [
    "Convolutional",
    "GroupConvolutional",
    "Perceptron",
    "RestrictedBoltzmann",
    "Transformer",
    "log_cosh",
    "symmetrized",
]

# Of last layers: sites add up, and if ψ starts out concentrated on one configuration,
# no gradient leads away from it.
_SMALL = nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")


def log_cosh(x: jax.Array) -> jax.Array:
    """Log cosh x without overflow, real or complex."""
    # cosh is even: use the sign with the smaller exponential.
    x = jnp.where(jnp.real(x) < 0, -x, x)
    return x + jnp.log1p(jnp.exp(-2 * x)) - math.log(2)


def symmetrized(
    log_psi_fn: Callable[[jax.Array], jax.Array], images: np.ndarray, *, flip: bool
) -> Callable[[jax.Array], jax.Array]:
    """Log of the mean of ψ over images of a configuration, log mean_g ψ(g s).

    It has the symmetries g if they are a group, or if a group consists of them and of
    symmetries that ψ has already. In a group of G elements it costs G times as much.

    Args:
      log_psi_fn: `[..., L]` to log ψ `[...]`, real or complex.
      images: the symmetries as permutations of the sites, `[G, L]`.
      flip: whether to add their products with s → -s.
    """

    def symmetric(spins: jax.Array) -> jax.Array:
        seen = spins[..., images]
        seen = jnp.concatenate([seen, -seen], axis=-2) if flip else seen
        return _log_mean(log_psi_fn(seen))

    return symmetric


def _log_mean(log_psi: jax.Array) -> jax.Array:
    """Log of the mean of ψ over the last axis, without overflow."""
    top = jax.lax.stop_gradient(jnp.max(jnp.real(log_psi), axis=-1, keepdims=True))
    return top[..., 0] + jnp.log(jnp.mean(jnp.exp(log_psi - top), axis=-1))


class _LogCosh(nn.Module):
    """Σ log cosh(W x + b) over features, complex of real parameters if `phase`."""

    dtype: Any
    phase: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (1 + self.phase, x.shape[-1])
        dense = nn.DenseGeneral(shape, param_dtype=self.dtype, kernel_init=_SMALL)
        parts = jnp.moveaxis(dense(x), -2, 0)
        return log_cosh(jax.lax.complex(*parts) if self.phase else parts[0]).sum(-1)


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
      phase: whether log ψ is complex, of real parameters.
    """

    widths: Sequence[int]
    dtype: Any
    phase: bool = False

    @nn.compact
    def __call__(self, spins: jax.Array) -> jax.Array:
        """Returns log ψ, `[N]`."""
        x = spins
        for width in self.widths:
            x = jnp.tanh(nn.Dense(width, param_dtype=self.dtype)(x))
        if self.phase:
            return _LogCosh(self.dtype, phase=True)(x)
        return nn.Dense(1, param_dtype=self.dtype)(x)[..., 0]


class Convolutional(nn.Module):
    """log ψ by convolutions over a lattice, summed: invariant to its translations.

    If complex, ψ = exp(f) (1 + g) with real f and complex g.

    Attributes:
      channels: of the layers.
      width: side of the cube of sites that a convolution sees.
      dtype: of the parameters.
      lattice: where the spins are; None for a ring.
      phase: whether log ψ is complex, of real parameters.
    """

    channels: Sequence[int]
    width: int
    dtype: Any
    lattice: Lattice | None = None
    phase: bool = False

    @nn.compact
    def __call__(self, spins: jax.Array) -> jax.Array:
        """Returns log ψ, `[N]`."""
        x = spins[..., None]
        # A matrix product with the neighbourhood of each site instead of `nn.Conv`: in
        # float64 XLA has no fast convolutions for CPUs
        # (https://github.com/jax-ml/jax/issues/940), and per-sample gradients, grouped
        # convolutions, took 40 s for 512 samples.
        seen = (self.lattice or Lattice((x.shape[-2],))).windows(self.width)
        for number, channels in enumerate(self.channels):
            patches = x[..., seen, :].reshape(*x.shape[:-1], -1)
            update = jnp.tanh(nn.Dense(channels, param_dtype=self.dtype)(patches))
            x = x + update if number and channels == x.shape[-1] else update
        if self.phase:
            return _modulus_and_factor(x.sum(axis=-2), 1, self.dtype)
        return nn.Dense(1, param_dtype=self.dtype)(x.sum(axis=-2))[..., 0]


class GroupConvolutional(nn.Module):
    """log ψ by group convolutions: invariant to all symmetries of a lattice and s → -s.

    A feature has a value for each site i and each g of the point group. With windows
    of sites x around each site,

        first layer: f(i, g) = tanh(b + Σₓ K(g⁻¹ x) sᵢ s(i + x))
        others: f(i, g) + tanh(b + Σₓₕ K(g⁻¹ x, g⁻¹ h) f(i + x, h))

    and log ψ is linear in mean_g Σᵢ f(i, g). If complex, ψ is the mean over g of
    exp(a_g) (1 + c_g / √L) for L sites, where a_g and c_g are linear in Σᵢ f(i, g): a
    mean of ψ, not of log ψ, so that the turned copies can interfere. It costs as much
    as `Convolutional` with as many times more channels as the group has elements, but
    has that many times fewer parameters than that.

    Attributes:
      channels: of the layers, for each element of the point group.
      width: odd side of the cube of sites that a convolution sees.
      dtype: of the parameters.
      lattice: where the spins are; None for a ring.
      phase: whether log ψ is complex, of real parameters.

    References:
      Cohen and Welling, Group equivariant convolutional networks, 2016. Roth and
      MacDonald, Group convolutional neural networks improve quantum state accuracy,
      2021.
    """

    channels: Sequence[int]
    width: int
    dtype: Any
    lattice: Lattice | None = None
    phase: bool = False

    @nn.compact
    def __call__(self, spins: jax.Array) -> jax.Array:
        """Returns log ψ, `[N]`."""
        lattice = self.lattice or Lattice((spins.shape[-1],))
        sites, products = lattice.turned_windows(self.width)
        x = spins[..., None]
        for number, channels in enumerate(self.channels):
            # Spins are the same for all elements of the group.
            turns = products if number else np.zeros_like(products[:, :1])
            kernel = self._kernel(number, channels, sites, turns, x.shape[-1])
            bias = self.param(
                f"bias_{number}", nn.initializers.zeros_init(), (channels,), self.dtype
            )
            linear = _convolve(lattice, self.width, x, kernel)
            linear = linear if number else x * linear  # the same for -s
            update = jnp.tanh(linear + jnp.tile(bias, len(sites)))
            x = x + update if number and update.shape == x.shape else update
        x = x.sum(axis=-2).reshape(*x.shape[:-2], len(sites), -1)
        if self.phase:
            # The features of even inputs do not cancel over the sites: undivided, the
            # factors would outweigh their 1 at first, with signs far from Marshall's.
            divisor = math.sqrt(lattice.num_sites)
            return _log_mean(_modulus_and_factor(x, divisor, self.dtype))
        x = x.mean(axis=-2)
        return nn.Dense(1, param_dtype=self.dtype, kernel_init=_SMALL)(x)[..., 0]

    def _kernel(
        self,
        number: int,
        channels: int,
        sites: np.ndarray,
        turns: np.ndarray,
        num_inputs: int,
    ) -> jax.Array:
        """The matrix from windows of all features to all features of a site."""
        (size, window), group = sites.shape, turns.shape[1]
        free = self.param(
            f"kernel_{number}",
            nn.initializers.lecun_normal(in_axis=(0, 1, 2)),
            (window, group, num_inputs // group, channels),
            self.dtype,
        )
        turned = free[sites[:, :, None], turns[:, None, :]]
        return jnp.moveaxis(turned, 0, 3).reshape(-1, size * channels)


def _convolve(
    lattice: Lattice, width: int, x: jax.Array, kernel: jax.Array
) -> jax.Array:
    """The features of all sites in a window, `[..., L, C]`, times a matrix."""
    seen = lattice.windows(width)

    def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return x[..., seen, :].reshape(*x.shape[:-1], -1) @ kernel

    # XLA has fast convolutions for CPUs in float32 only, along up to three axes.
    if x.dtype != jnp.float32 or len(lattice.shape) > 3:
        return multiply(x, kernel)

    @jax.custom_jvp
    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        # Four times as fast for 32 features. Its derivatives would not be: those of
        # single examples are grouped convolutions.
        sides, count = lattice.shape, x.shape[-1]
        before = (width - 1) // 2
        pads = [(0, 0), *((before, width - 1 - before),) * len(sides), (0, 0)]
        padded = jnp.pad(x.reshape(-1, *sides, count), pads, mode="wrap")
        axes = "HWD"[: len(sides)]
        outputs = jax.lax.conv_general_dilated(
            padded,
            kernel.reshape(*(width,) * len(sides), count, -1),
            window_strides=(1,) * len(sides),
            padding="VALID",
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        )
        return outputs.reshape(*x.shape[:-1], -1)

    @convolve.defjvp
    def _tangent(at: Any, along: Any) -> tuple[jax.Array, jax.Array]:
        (x, kernel), (dx, dkernel) = at, along
        return convolve(x, kernel), multiply(dx, kernel) + multiply(x, dkernel)

    return convolve(x, kernel)


def _modulus_and_factor(x: jax.Array, divisor: float, dtype: Any) -> jax.Array:
    """Log of ψ = exp(f) (1 + g / divisor), real f and complex g linear in features.

    The phase of a logarithm would have to turn by π to change a sign; a factor that is
    linear in the features goes through zero.
    """
    last = nn.Dense(3, param_dtype=dtype, kernel_init=_SMALL)
    modulus, *factor = jnp.moveaxis(last(x), -1, 0)
    return modulus + jnp.log(1 + jax.lax.complex(*factor) / divisor)


class Transformer(nn.Module):
    """log ψ by attention between patches of a lattice: invariant to their translations.

    Each layer is x + attention(norm(x)), then x + perceptron(norm(x)). The attention
    between two patches depends on their difference on the lattice, by one learned
    number for each difference.

    Attributes:
      num_layers: layers.
      width: number of features per patch; a multiple of `num_heads`.
      dtype: of the parameters.
      num_heads: number of attention heads.
      lattice: where the spins are; None for a ring.
      patch: side of a patch; it divides those of the lattice.
      phase: whether log ψ is complex, of real parameters.

    References:
      Viteritti, Rende and Becca, Transformer variational wave functions for frustrated
      quantum spin systems, 2023.
    """

    num_layers: int
    width: int
    dtype: Any
    num_heads: int = 4
    lattice: Lattice | None = None
    patch: int = 1
    phase: bool = False

    @nn.compact
    def __call__(self, spins: jax.Array) -> jax.Array:
        """Returns log ψ, `[N]`."""
        lattice = self.lattice or Lattice((spins.shape[-1],))
        patches = spins[..., lattice.patches(self.patch)]
        differences = lattice.coarse(self.patch).differences()
        x = nn.Dense(self.width, param_dtype=self.dtype)(patches)
        for number in range(self.num_layers):
            attended = nn.LayerNorm(param_dtype=self.dtype)(x)
            x = x + self._attention(attended, number, differences)
            hidden = nn.LayerNorm(param_dtype=self.dtype)(x)
            hidden = nn.Dense(2 * self.width, param_dtype=self.dtype)(hidden)
            x = x + nn.Dense(self.width, param_dtype=self.dtype)(nn.gelu(hidden))
        x = nn.LayerNorm(param_dtype=self.dtype)(x).mean(axis=-2)
        return _LogCosh(self.dtype, self.phase)(x)

    def _attention(
        self, x: jax.Array, number: int, differences: np.ndarray
    ) -> jax.Array:
        num_patches, size = x.shape[-2], self.width // self.num_heads
        shape = (3, self.num_heads, size)
        q, k, v = jnp.moveaxis(nn.DenseGeneral(shape, param_dtype=self.dtype)(x), -3, 0)
        zeros = nn.initializers.zeros_init()
        shape = (self.num_heads, num_patches)
        by_distance = self.param(f"distance_{number}", zeros, shape, self.dtype)
        bias = by_distance[:, differences]
        scores = jnp.einsum("...ihc,...jhc->...hij", q, k) / math.sqrt(size)
        weights = jax.nn.softmax(
            scores + bias.reshape((1,) * (x.ndim - 2) + bias.shape)
        )
        mixed = jnp.einsum("...hij,...jhc->...ihc", weights, v)
        return nn.DenseGeneral(self.width, axis=(-2, -1), param_dtype=self.dtype)(mixed)
