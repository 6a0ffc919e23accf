"""A tanh network with its first derivatives and a second-order operator, in one pass.

    z' = W z + b:       ∂z' = W ∂z,         D z' = W D z
    h = tanh(z):        ∂h = h' ∂z,         D h = h' D z + h'' Σᵢ cᵢ (∂ᵢz)²

with D = Σᵢ cᵢ ∂ᵢᵢ. This is the forward Laplacian (for c = 1): d + 2 forward passes, no
Hessian. The same for features of x as inputs, and for what a `Problem` makes of the
output. Also has the operator for any function, by Taylor mode or a dense Hessian.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import jet

__all__ = [
    "METHODS",
    "Jet",
    "affine",
    "by_hessian",
    "by_nested_jvp",
    "by_taylor",
    "forward_operator",
    "init_network",
    "jet_of",
    "network",
]

Params = list[tuple[jax.Array, jax.Array]]


class Jet(NamedTuple):
    """A function at one point, a scalar one or with values `[...]`.

    Attributes:
      value: u.
      gradient: ∂u, `[d, ...]`.
      second: D u = Σᵢ cᵢ ∂ᵢᵢ u.
    """

    value: jax.Array
    gradient: jax.Array
    second: jax.Array


def init_network(
    key: jax.Array, widths: Sequence[int], scale: float | None, dtype: Any = None
) -> Params:
    """Weights `[in, out]` and biases of every layer.

    Args:
      key: for the random draws.
      widths: inputs first, outputs last.
      scale: standard deviation of all weights and biases; None for weights of
        1/√inputs and biases of 1.
      dtype: of all arrays; JAX's default unless given.
    """
    layers = []
    for layer_key, fan_in, fan_out in zip(
        jax.random.split(key, len(widths) - 1), widths, widths[1:], strict=False
    ):
        keys = jax.random.split(layer_key)
        weights = jax.random.normal(keys[0], (fan_in, fan_out), dtype)
        biases = jax.random.normal(keys[1], (fan_out,), dtype)
        if scale is None:
            layers.append((weights / fan_in**0.5, biases))
        else:
            layers.append((scale * weights, scale * biases))
    return layers


def network(params: Params, x: jax.Array) -> jax.Array:
    """u_θ(x) at one point `[d]`: a scalar, or `[K]` of K > 1 outputs."""
    for weights, biases in params[:-1]:
        x = jnp.tanh(x @ weights + biases)
    weights, biases = params[-1]
    return _scalar_of_one(x @ weights + biases)


def _scalar_of_one(outputs: jax.Array) -> jax.Array:
    return outputs[..., 0] if outputs.shape[-1] == 1 else outputs


def forward_operator(
    params: Params, x: jax.Array, coefficients: jax.Array, inputs: Jet | None = None
) -> Jet:
    """u, ∂u and D u of the network at one point, in one pass.

    Args:
      params: as from `init_network`.
      x: the point, `[d]`.
      coefficients: c of D, `[d]`.
      inputs: features of x as `jet_of` gives them, the inputs of the network; None for
        x itself.

    References:
      Li et al., A computational framework for neural network-based variational Monte
      Carlo with Forward Laplacian, 2024.
    """
    if inputs is None:
        inputs = Jet(x, jnp.eye(x.size, dtype=x.dtype), jnp.zeros_like(x))
    value, gradient, second = inputs
    for index, (weights, biases) in enumerate(params):
        value = value @ weights + biases
        gradient, second = gradient @ weights, second @ weights
        if index + 1 < len(params):
            value = jnp.tanh(value)
            slope = 1 - value**2
            squares = jnp.sum(coefficients[:, None] * gradient**2, axis=0)
            second = slope * second - 2 * value * slope * squares
            gradient = slope * gradient
    return Jet(*(_scalar_of_one(part) for part in (value, gradient, second)))


def jet_of(fn: "Function", x: jax.Array, coefficients: jax.Array) -> Jet:
    """Any function of x with its derivatives, by forward mode."""
    gradient = jnp.moveaxis(jax.jacfwd(fn)(x), -1, 0)
    return Jet(fn(x), gradient, by_nested_jvp(fn, x, coefficients))


def affine(a: Jet, b: Jet, u: Jet, coefficients: jax.Array) -> Jet:
    """The jet of a + b u: D (b u) = u D b + 2 Σᵢ cᵢ ∂ᵢb ∂ᵢu + b D u."""
    across = jnp.tensordot(coefficients, b.gradient * u.gradient, 1)
    return Jet(
        a.value + b.value * u.value,
        a.gradient + b.gradient * u.value + b.value * u.gradient,
        a.second + b.second * u.value + 2 * across + b.value * u.second,
    )


Function = Callable[[jax.Array], jax.Array]


def by_hessian(fn: Function, x: jax.Array, coefficients: jax.Array) -> jax.Array:
    """D f from the dense Hessian."""
    return jnp.sum(coefficients * jnp.diagonal(jax.hessian(fn)(x)))


def by_nested_jvp(fn: Function, x: jax.Array, coefficients: jax.Array) -> jax.Array:
    """D f by forward over forward mode, along all directions at once."""

    def second(direction: jax.Array) -> jax.Array:
        def slope(x: jax.Array) -> jax.Array:
            return jax.jvp(fn, (x,), (direction,))[1]

        return jax.jvp(slope, (x,), (direction,))[1]

    along_axes = jax.vmap(second)(jnp.eye(x.size, dtype=x.dtype))
    return jnp.tensordot(coefficients, along_axes, 1)


def by_taylor(fn: Function, x: jax.Array, coefficients: jax.Array) -> jax.Array:
    """D f by Taylor mode: the second coefficient along every direction."""

    def second(direction: jax.Array) -> jax.Array:
        _, terms = jet.jet(fn, (x,), ((direction, jnp.zeros_like(x)),))
        return terms[1]

    return coefficients @ jax.vmap(second)(jnp.eye(x.size, dtype=x.dtype))


METHODS = {
    "dense Hessian": by_hessian,
    "nested jvp": by_nested_jvp,
    "Taylor mode": by_taylor,
}
