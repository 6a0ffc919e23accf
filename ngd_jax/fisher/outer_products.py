"""Rows of dense layers as outer products, and their Gram matrix without the rows.

    ∂/∂(b, W) of  x ↦ b + x W  at one example:  (1, a) ⊗ δ
    ⟨a ⊗ δ, a' ⊗ δ'⟩ = ⟨a, a'⟩ ⟨δ, δ'⟩

a are the inputs of the layer, δ the cotangents of what comes out of it. For M rows and
a weight of m times n numbers that is 2M²(m + n) operations in place of 2M²mn. No layer
has to be known by name: whether the gradient of a weight is such a product is read off
the program of a row, where the last thing that happens to it is a product with nothing
to sum over; and its bias is the vector whose gradient is δ itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngd_jax.fisher.programs import Program, read_program
from ngd_jax.fisher.rows import Group, row_groups
from ngd_jax.types import Array, Params

if TYPE_CHECKING:
    from ngd_jax.fisher.operator import Fisher

__all__ = [
    "PASS",
    "FactoredRows",
    "Layer",
    "RowFactors",
    "factored_gram",
    "factored_rows",
    "find_factors",
    "has_large_weights",
]

# A pass over the M² entries costs about as much as so many operations on each.
PASS = 64


class Layer(NamedTuple):
    """A dense layer, by the places of its parameters among all leaves.

    Attributes:
      weight: of W.
      bias: of b; None where there is none, or it has another gradient than δ.
      order: for every entry of W, which entry of a ⊗ δ it is.
    """

    weight: int
    bias: int | None
    order: np.ndarray


class FactoredRows(NamedTuple):
    """The rows of N examples with K coefficients each.

    Attributes:
      outer: for each layer its inputs a `[N, m]`, with a one in front where it has a
        bias, and δ `[N, K, n]`.
      dense: all other entries of the rows, `[N, K, rest]`.
    """

    outer: list[tuple[Array, Array]]
    dense: Array


class RowFactors(NamedTuple):
    """All that `find_factors` finds.

    Attributes:
      group: the examples.
      rows: of A; with their mean, where F is a covariance.
      layers: to which the outer products belong.
      root: √μ, `[N, K]`, where F is a covariance; else None.
      apart: how far examples are from the batch; see `Group.map`.
    """

    group: Group
    rows: FactoredRows
    layers: list[Layer]
    root: Array | None
    apart: list[Array]


def find_factors(fisher: "Fisher", dtype: Any, memory: int) -> RowFactors | None:
    """All rows as outer products; None where there are none or they do not fit.

    Args:
      fisher: whose rows.
      dtype: of the result.
      memory: bytes that they may take.

    Raises:
      NoRowsError: where there are no rows.
    """
    values = (fisher.params, fisher.outputs)
    is_real = not any(map(jnp.iscomplexobj, jax.tree.leaves(values)))
    if not is_real or not has_large_weights(fisher.params):
        return None
    groups = row_groups(fisher, with_means=True)
    terms = groups[0].terms
    is_covariance = any(term.means is not None for term in terms)
    if len(groups) > 1 or (is_covariance and terms[1:]):
        return None
    shapes = jax.eval_shape(lambda: factored_rows(groups[0], dtype)[1])
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    if len(shapes.outer) == 0 or num_bytes > memory:
        return None
    apart, rows, layers = factored_rows(groups[0], dtype)
    root = None
    if is_covariance:
        root = jnp.sqrt(terms[0].data.measure).astype(dtype)
        root = root.reshape(groups[0].size, -1)
    return RowFactors(groups[0], rows, layers, root, apart)


def has_large_weights(params: Params) -> bool:
    """Whether outer products may be of use at all, by the shapes of the parameters."""
    return any(
        leaf.ndim > 1 and leaf.size > 4 * math.isqrt(leaf.size) + PASS
        for leaf in jax.tree.leaves(params)
    )


def factored_rows(
    group: Group, dtype: Any
) -> tuple[list[Array], FactoredRows, list[Layer]]:
    """All rows of real coefficients for real parameters.

    Args:
      group: the examples.
      dtype: of the rows.

    Returns:
      What `Group.map` tells of the examples, the rows, and the layers in them.
    """
    layers: list[Layer] = []

    def on_example(row: Callable[[Array], Params], units: Array) -> FactoredRows:
        program = read_program(lambda unit: jax.tree.leaves(row(unit)), units[0])
        found = _find_layers(program)
        layers[:] = [layer for layer, _, _ in found]
        inputs = [a for _, a, _ in found]
        deltas = [delta for _, _, delta in found]
        taken = {place for layer in layers for place in (layer.weight, layer.bias)}
        rest = [x for k, x in enumerate(program.jaxpr.outvars) if k not in taken]
        run = program.function([*inputs, *deltas, *rest])

        def on_unit(unit: Array) -> tuple[list[Array], list[Array]]:
            values = run(unit)
            return values[: len(found)], values[len(found) :]

        # What is the same for all coefficients of an example is made once.
        inputs, values = jax.vmap(on_unit, out_axes=(None, 0))(units)
        outer = []
        for layer, a, delta in zip(layers, inputs, values, strict=False):
            ones = [] if layer.bias is None else [jnp.ones(1, dtype)]
            a = jnp.concatenate([*ones, a.ravel().astype(dtype)])
            outer.append((a, _flat([delta], len(units), dtype)))
        return FactoredRows(outer, _flat(values[len(found) :], len(units), dtype))

    apart, rows = group.map(on_example, group.data)
    return apart, rows, layers


def factored_gram(rows: FactoredRows, root: Array | None) -> Array:
    """A Aᵀ, `[N·K, N·K]`.

    Args:
      rows: A itself, or where F is a covariance √μ J, whose mean is to be subtracted,
        aᵢ = rowᵢ - √μᵢ Σ √μⱼ rowⱼ / Σ μ.
      root: √μ, `[N, K]`, where F is a covariance; else None.
    """
    count, units, num_rest = rows.dense.shape
    dense = rows.dense.reshape(count * units, num_rest)
    if root is None:
        gram = _inner(dense)
        for a, delta in rows.outer:
            gram += _products(a, delta).reshape(gram.shape)
        return gram
    s = root.ravel()
    total = jnp.sum(s**2)
    gram = _inner(dense - jnp.outer(s, s @ dense / total))
    if not rows.outer:
        return gram
    products = jnp.zeros_like(gram)
    for a, delta in rows.outer:
        products += _centred_products(a, delta, root).reshape(gram.shape)
    # What is left of the mean, of which the largest part is off already.
    mean = products @ s / total
    correction = mean - s * (s @ mean) / (2 * total)
    return gram + products - jnp.outer(s, correction) - jnp.outer(correction, s)


def _products(a: Array, delta: Array) -> Array:
    """⟨rowᵢ, rowⱼ⟩ of rows a ⊗ δ, `[N, K, N, K]`."""
    count, units, _ = delta.shape
    of_delta = _inner(delta.reshape(count * units, -1))
    of_delta = of_delta.reshape(count, units, count, units)
    return _inner(a)[:, None, :, None] * of_delta


def _centred_products(a: Array, delta: Array, root: Array) -> Array:
    """⟨rowᵢ - √μᵢ c, rowⱼ - √μⱼ c⟩ of rows a ⊗ δ, `[N, K, N, K]`, for a certain c.

    The mean may be far longer than what the rows have beside it, so that to subtract it
    from the products would lose digits. c = ā ⊗ δ̄ is most of it, and in

        a ⊗ δ - √μ ā ⊗ δ̄ = (a - ā) ⊗ δ + ā ⊗ (δ - √μ δ̄)

    nothing cancels.
    """
    count, units, _ = delta.shape
    shape = (count, units, count, units)
    s = root.ravel()
    total = jnp.sum(s**2)
    a_mean = jnp.sum(root**2, axis=1) @ a / total
    flat = delta.reshape(count * units, -1)
    delta_mean = s @ flat / total
    # With x = a - ā and y = δ - √μ δ̄, rows are x ⊗ y + √μ x ⊗ δ̄ + ā ⊗ y.
    x, y = a - a_mean[None], flat - jnp.outer(s, delta_mean)
    inputs, along = _inner(x)[:, None, :, None], x @ a_mean
    across = (y @ delta_mean).reshape(count, units)
    both = along[:, None] + along[None] + a_mean @ a_mean
    products = _inner(y).reshape(shape) * (inputs + both[:, None, :, None])
    left, right = root[:, :, None, None], root[None, None]
    p, q = across[:, :, None, None], across[None, None]
    size = delta_mean @ delta_mean
    products += inputs * (left * q + p * right + size * left * right)
    slope = along[:, None] * root
    return products + slope[:, :, None, None] * q + p * slope[None, None]


def _inner(rows: Array) -> Array:
    return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)


def _flat(leaves: Sequence[Array], count: int, dtype: Any) -> Array:
    """Leaves with a leading axis of length `count`, side by side."""
    if not leaves:
        return jnp.zeros((count, 0), dtype)
    return jnp.concatenate(
        [leaf.reshape(count, -1).astype(dtype) for leaf in leaves], axis=1
    )


def _find_layers(program: Program) -> list[tuple[Layer, Any, Any]]:
    """The layers in the program of a row, each with its variables a and δ.

    δ depends on the argument of the program, a does not.
    """
    gradients, found = program.jaxpr.outvars, []
    for place, variable in enumerate(gradients):
        product = program.source(program.before_layout(variable))
        if product is None or not _is_outer(product):
            continue
        a, delta = sorted(product.invars, key=program.is_moving)
        if [program.is_moving(x) for x in (a, delta)] != [False, True]:
            continue
        m, n = (x.aval.size for x in (a, delta))
        if m * n <= 2 * (m + n) + PASS:
            continue
        source = program.before_layout(delta, same_order=True)
        biases = [
            other
            for other, gradient in enumerate(gradients)
            if gradient.aval.shape == (n,)
            and program.before_layout(gradient, same_order=True) is source
        ]
        order = _order(program, variable)
        if product.invars[0] is delta:
            order = order % m * n + order // m
        bias = biases[0] if len(biases) == 1 else None
        found.append((Layer(place, bias, order), a, delta))
    return found


def _order(program: Program, variable: Any) -> np.ndarray:
    """For every entry of a variable, which it was in the product that it comes from."""
    equation = program.source(variable)
    if equation.primitive.name == "dot_general":
        return np.arange(variable.aval.size)
    (before,) = equation.invars
    order = _order(program, before).reshape(before.aval.shape)
    if equation.primitive.name == "transpose":
        order = order.transpose(equation.params["permutation"])
    return order.ravel()


def _is_outer(equation: Any) -> bool:
    """Whether an equation multiplies each number of one thing by each of another."""
    if equation.primitive.name != "dot_general":
        return False
    sizes = [x.aval.size for x in equation.invars]
    return math.prod(sizes) == equation.outvars[0].aval.size
