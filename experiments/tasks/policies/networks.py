"""Networks: a policy, whose outputs parametrise its likelihood, and a value function.

    observation --tanh layers--> logits,  or mean with a separate log scale
    observation --tanh layers--> value

They share no parameters. Images (`[height, width, channels]`) first go through one
convolution.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.tasks.policies.environments import Environment

__all__ = ["PolicyNetwork", "ValueNetwork", "make_policy_fn", "make_value_fn"]

PyTree = Any

HIDDEN_SCALE = 2.0**0.5
# The first policy is nearly uniform for every observation.
LAST_POLICY_SCALE = 0.01
CONVOLUTION_FEATURES = 16


class Torso(nn.Module):
    """The first layers of both networks.

    Attributes:
      sizes: widths of the hidden layers.
      num_axes: number of axes of one observation: three for images.
    """

    sizes: Sequence[int]
    num_axes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns features `[..., sizes[-1]]`."""
        if self.num_axes == 3:
            x = jnp.tanh(nn.Dense(CONVOLUTION_FEATURES)(patches(x)))
        if self.num_axes > 1:
            x = x.reshape((*x.shape[: -self.num_axes], -1))
        for size in self.sizes:
            x = jnp.tanh(nn.Dense(size, kernel_init=scaled(HIDDEN_SCALE))(x))
        return x


def patches(images: jax.Array) -> jax.Array:
    """The patches of 3 by 3 pixels, `[..., H, W, C]` to `[..., H - 2, W - 2, 9 C]`.

    A dense layer on them is a convolution. XLA's CPU compiler turns the derivatives of
    a true convolution into plain loops inside `scan`, and all of training is one scan.
    """
    height, width = images.shape[-3] - 2, images.shape[-2] - 2
    shifts = [(row, column) for row in range(3) for column in range(3)]
    return jnp.concatenate(
        [images[..., i : i + height, j : j + width, :] for i, j in shifts], axis=-1
    )


class PolicyNetwork(nn.Module):
    """The outputs of the policy's distribution.

    Attributes:
      sizes: widths of the hidden layers.
      num_axes: number of axes of one observation.
      num_actions: number of logits; 0 for a normal distribution.
      action_size: number of entries of the normal distribution.
      initial_scale: its initial standard deviation.
    """

    sizes: Sequence[int]
    num_axes: int
    num_actions: int
    action_size: int
    initial_scale: float

    @nn.compact
    def __call__(self, x: jax.Array) -> PyTree:
        """Returns logits, or a dict of mean and log scale."""
        size = self.num_actions or self.action_size
        x = Torso(self.sizes, self.num_axes)(x)
        out = nn.Dense(size, kernel_init=scaled(LAST_POLICY_SCALE))(x)
        if self.num_actions:
            return out
        start = nn.initializers.constant(jnp.log(self.initial_scale))
        log_scale = self.param("log_scale", start, (size,))
        return {"mean": out, "log_scale": jnp.broadcast_to(log_scale, out.shape)}


class ValueNetwork(nn.Module):
    """The value of an observation.

    Attributes:
      sizes: widths of the hidden layers.
      num_axes: number of axes of one observation.
    """

    sizes: Sequence[int]
    num_axes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns values `[...]`."""
        x = Torso(self.sizes, self.num_axes)(x)
        return nn.Dense(1, kernel_init=scaled(1.0))(x)[..., 0]


def scaled(scale: float) -> nn.initializers.Initializer:
    """Normal weights that make outputs `scale` times as large as the inputs."""
    return nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")


def make_policy_fn(
    environment: Environment, sizes: Sequence[int], initial_scale: float
) -> tuple[Callable[[jax.Array], PyTree], Callable[[PyTree, PyTree], PyTree]]:
    """Makes `init_fn(key) -> params` and `policy_fn(params, batch) -> outputs`.

    The batch holds "observations"; the outputs are those of `environment.likelihood`.
    """
    network = PolicyNetwork(
        sizes=tuple(sizes),
        num_axes=len(environment.observation_shape),
        num_actions=environment.num_actions,
        action_size=environment.action_size,
        initial_scale=initial_scale,
    )
    return _functions(network, environment)


def make_value_fn(
    environment: Environment, sizes: Sequence[int]
) -> tuple[Callable[[jax.Array], PyTree], Callable[[PyTree, PyTree], jax.Array]]:
    """Makes `init_fn(key) -> params` and `value_fn(params, batch) -> values`."""
    network = ValueNetwork(
        sizes=tuple(sizes), num_axes=len(environment.observation_shape)
    )
    return _functions(network, environment)


def _functions(
    network: nn.Module, environment: Environment
) -> tuple[Callable[[jax.Array], PyTree], Callable[[PyTree, PyTree], Any]]:
    def init_fn(key: jax.Array) -> PyTree:
        blank = jnp.zeros((1, *environment.observation_shape))
        return network.init(key, blank)["params"]

    def apply_fn(params: PyTree, batch: PyTree) -> Any:
        return network.apply({"params": params}, batch["observations"])

    return init_fn, apply_fn
