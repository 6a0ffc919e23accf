"""Rows of dense layers as outer products, and their Gram matrix without the rows.

    ∂/∂W of  x ↦ x W  at one example:  a ⊗ δ
    ⟨a ⊗ δ, a' ⊗ δ'⟩ = ⟨a, a'⟩ ⟨δ, δ'⟩

a are the inputs of the layer, δ the cotangents of what comes out of it. For M rows and
a weight of m times n numbers that is 2M²(m + n) operations in place of 2M²mn. No layer
has to be known by name: whether the gradient of a weight is such a product is read off
the program of a row, where the last thing that happens to it is a product with nothing
to sum over.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax.fisher.programs import Program, read_program
from ngd_jax.fisher.rows import Group
from ngd_jax.types import Array, Params

__all__ = ["FactoredRows", "factored_gram", "factored_rows", "has_large_weights"]

# A pass over the M² entries costs about as much as so many operations on each.
_PASS = 64


class FactoredRows(NamedTuple):
    """The rows of N examples with K coefficients each.

    Attributes:
      outer: a `[N, m]` and δ `[N, K, n]` of each weight whose rows are outer products.
      dense: all other entries of the rows, `[N, K, rest]`.
    """

    outer: list[tuple[Array, Array]]
    dense: Array


def has_large_weights(params: Params) -> bool:
    """Whether outer products may be of use at all, by the shapes of the parameters."""
    return any(
        leaf.ndim > 1 and leaf.size > 4 * math.isqrt(leaf.size) + _PASS
        for leaf in jax.tree.leaves(params)
    )


def factored_rows(group: Group, dtype: Any) -> tuple[list[Array], FactoredRows]:
    """All rows of real coefficients for real parameters, and what `Group.map` tells.

    Args:
      group: the examples.
      dtype: of the result.
    """

    def on_example(row: Callable[[Array], Params], units: Array) -> FactoredRows:
        program = read_program(lambda unit: jax.tree.leaves(row(unit)), units[0])
        places, variables = _factors(program)
        if not places:
            leaves = jax.vmap(lambda unit: jax.tree.leaves(row(unit)))(units)
            return FactoredRows([], _flat(leaves, len(units), dtype))
        inputs, outputs = [], list(program.jaxpr.outvars)
        for place, (a, delta) in zip(places, variables, strict=True):
            inputs.append(a)
            outputs[place] = delta
        run = program.function([*inputs, *outputs])

        def on_unit(unit: Array) -> tuple[list[Array], list[Array]]:
            values = run(unit)
            return values[: len(inputs)], values[len(inputs) :]

        # What is the same for all coefficients of an example is made once.
        found, leaves = jax.vmap(on_unit, out_axes=(None, 0))(units)
        outer = [
            (a.ravel().astype(dtype), _flat([leaves[place]], len(units), dtype))
            for place, a in zip(places, found, strict=True)
        ]
        rest = [leaf for place, leaf in enumerate(leaves) if place not in places]
        return FactoredRows(outer, _flat(rest, len(units), dtype))

    return group.map(on_example, group.data)


def factored_gram(rows: FactoredRows, root: Array | None) -> Array:
    """A Aᵀ, `[N·K, N·K]`.

    Args:
      rows: A itself, or where F is a covariance √μ J, whose mean is to be subtracted,
        aᵢ = rowᵢ - √μᵢ Σ √μⱼ rowⱼ / Σ μ.
      root: √μ, `[N, K]`, where F is a covariance; else None.
    """
    dense = rows.dense.reshape(-1, rows.dense.shape[-1])
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


def _factors(program: Program) -> tuple[list[int], list[tuple[Any, Any]]]:
    """Which outputs of the program of a row are outer products, and of what.

    Returns:
      Their places among the outputs; and for each the variables of a and δ. δ depends
      on the argument of the program, a does not.
    """
    places, variables = [], []
    for place, variable in enumerate(program.jaxpr.outvars):
        product = program.source(program.before_layout(variable))
        if product is None or not _is_outer(product):
            continue
        factors = sorted(product.invars, key=program.is_moving)
        if [program.is_moving(x) for x in factors] != [False, True]:
            continue
        m, n = (x.aval.size for x in factors)
        if m * n > 2 * (m + n) + _PASS:
            places.append(place)
            variables.append((factors[0], factors[1]))
    return places, variables


def _is_outer(equation: Any) -> bool:
    """Whether an equation multiplies each number of one thing by each of another."""
    if equation.primitive.name != "dot_general":
        return False
    sizes = [x.aval.size for x in equation.invars]
    return math.prod(sizes) == equation.outvars[0].aval.size
