"""The dense layers of a model, found without their names, and what F is made of there.

    y = x W + b,    ∂/∂W at one example = a ⊗ δ,    F_W = Σ (a aᵀ) ⊗ (δ δᵀ)

a are the inputs of the layer and δ the cotangents of what comes out of it. Which
gradients are such products, and which biases go with them, is read off the program of a
backward pass over the batch. Of a layer that is used at many places of an example each
place counts as an example.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.fisher.linearization import Linearization, linearize, sum_microbatches
from ngd_jax.fisher.programs import Program, read_program
from ngd_jax.types import Array, PyTree

if TYPE_CHECKING:
    from ngd_jax.fisher.operator import Fisher

__all__ = ["BackwardPass", "Layer", "LayerSums", "backward_pass"]


class Layer(NamedTuple):
    """A dense layer.

    Attributes:
      weight: the place of W among the leaves of the parameters.
      bias: that of b; None where there is none, or it is not known which.
      inputs_first: whether W counts inputs by its first axes and outputs by its last
        ones, or the other way round.
      num_inputs: numbers in a.
      num_outputs: numbers in δ.
    """

    weight: int
    bias: int | None
    inputs_first: bool
    num_inputs: int
    num_outputs: int


class LayerSums(NamedTuple):
    """Sums over the batch.

    Attributes:
      num_terms: how many.
      input: Σ a.
      inputs: Σ a aᵀ.
      outputs: Σ δ δᵀ.
    """

    num_terms: Array
    input: Array
    inputs: Array
    outputs: Array


class BackwardPass(NamedTuple):
    """What a backward pass tells of F.

    Attributes:
      layers: of each layer that was found.
      squares: for every leaf of the parameters, the square of its gradient, or, where
        it is known, the sum of the squares for each example. Real.
    """

    layers: list[LayerSums]
    squares: list[Array]


def backward_pass(
    fisher: "Fisher", cotangents: PyTree
) -> tuple[list[Layer], BackwardPass]:
    """The dense layers, and the statistics of their inputs and cotangents.

    Args:
      fisher: at which parameters, on which batch.
      cotangents: of the outputs.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(fisher.params)]
    layers: list[Layer] = []

    def on_part(linearization: Linearization, cotangents: PyTree) -> BackwardPass:
        leaves, structure = jax.tree.flatten(cotangents)
        program = read_program(
            lambda *leaves: jax.tree.leaves(
                linearization.pull(jax.tree.unflatten(structure, leaves))
            ),
            *leaves,
        )
        found = _find_layers(program, shapes)
        layers[:] = [layer for layer, _ in found]
        return _run(program, found, shapes, leaves)

    def on_microbatch(data: PyTree) -> BackwardPass:
        batch, cotangents = data
        return on_part(linearize(fisher.model_fn, fisher.params, batch), cotangents)

    if isinstance(fisher.linearization, Linearization):
        return layers, on_part(fisher.linearization, cotangents)
    data = (fisher.batch, cotangents)
    return layers, sum_microbatches(on_microbatch, data, fisher.linearization)


def _run(
    program: Program,
    found: list[tuple[Layer, Any]],
    shapes: list[tuple[int, ...]],
    leaves: list[Array],
) -> BackwardPass:
    factors = [variable for _, product in found for variable in product.invars]
    gradients = list(program.jaxpr.outvars)
    summed_axes: list[tuple[int, ...]] = [()] * len(shapes)
    for place, shape in enumerate(shapes):
        total = _sum_over_examples(program, gradients[place])
        if len(shape) == 1 and total is not None:
            gradients[place] = total.invars[0]
            summed_axes[place] = total.params["axes"]
    values = iter(program.function([*factors, *gradients])(*leaves))

    sums = []
    for _, product in found:
        pair = [_rows(next(values), product, side) for side in (0, 1)]
        still = _still_side(program, product)
        a, delta = pair[still == 1], pair[still == 0]
        num_terms = jnp.asarray(len(a), a.dtype)
        sums.append(LayerSums(num_terms, jnp.sum(a, 0), a.T @ a, delta.T @ delta))
    squares = [
        jnp.sum(_square(value), axis=axes).reshape(shape)
        for value, axes, shape in zip(values, summed_axes, shapes, strict=True)
    ]
    return BackwardPass(sums, squares)


def _find_layers(
    program: Program, shapes: list[tuple[int, ...]]
) -> list[tuple[Layer, Any]]:
    """Layers, and for each the operation that makes the gradient of its weight."""
    gradients, found = program.jaxpr.outvars, []
    biases = {
        place: _cotangent_of_bias(program, gradients[place])
        for place, shape in enumerate(shapes)
        if len(shape) == 1
    }
    for place, shape in enumerate(shapes):
        product = program.source(program.before_layout(gradients[place]))
        still = _still_side(program, product)
        if len(shape) < 2 or still is None:
            continue
        m, n = (math.prod(_free_shape(product, side)) for side in (still, 1 - still))
        # What comes out counts what is free of the left factor by its first axes.
        is_in_order = _is_in_order(program, gradients[place], m if still == 0 else n)
        if is_in_order is None:
            continue
        inputs_first = is_in_order == (still == 0)
        if 1 in (m, n):  # no order can be told from the other
            inputs_first = shape[-1] == n
        delta = program.before_layout(product.invars[1 - still])
        partners = [
            other
            for other, cotangent in biases.items()
            if cotangent is delta and shapes[other] == (n,)
        ]
        layer = Layer(
            weight=place,
            bias=partners[0] if len(partners) == 1 else None,
            inputs_first=inputs_first,
            num_inputs=m,
            num_outputs=n,
        )
        found.append((layer, product))
    return found


def _still_side(program: Program, product: Any) -> int | None:
    """Which factor of a real product of matrices stays; None for all other things."""
    if product is None or product.primitive.name != "dot_general":
        return None
    (_, (batch, _)) = product.params["dimension_numbers"]
    moves = [program.is_moving(x) for x in product.invars]
    is_real = not jnp.issubdtype(product.outvars[0].aval.dtype, jnp.complexfloating)
    if batch or not is_real or sorted(moves) != [False, True]:
        return None
    return moves.index(False)


def _contracted(product: Any, side: int) -> tuple[int, ...]:
    (contracted, _) = product.params["dimension_numbers"]
    return tuple(contracted[side])


def _free_shape(product: Any, side: int) -> list[int]:
    shape = product.invars[side].aval.shape
    return [n for axis, n in enumerate(shape) if axis not in _contracted(product, side)]


def _rows(factor: Array, product: Any, side: int) -> Array:
    """A factor with one row for every term of the sum."""
    contracted = _contracted(product, side)
    factor = jnp.moveaxis(factor, contracted, range(len(contracted)))
    size = math.prod(_free_shape(product, side))
    return factor.reshape(-1, size).astype(tree.wide_dtype(factor))


def _is_in_order(program: Program, variable: Any, rows: int) -> bool | None:
    """Whether a matrix is still as it came out of the product that made it.

    Args:
      program: where it is from.
      variable: the matrix.
      rows: how many it had then.

    Returns:
      False where it is transposed; None where something else happened to its axes.
    """
    equation = program.source(variable)
    if equation.primitive.name == "dot_general":
        return True
    before = _is_in_order(program, equation.invars[0], rows)
    if before is None or equation.primitive.name != "transpose":
        return before
    shape = equation.invars[0].aval.shape
    axes = [axis for axis in equation.params["permutation"] if shape[axis] > 1]
    first = rows if before else math.prod(shape) // rows
    order = sorted(axes)
    for k in range(len(order)):
        if axes != order[k:] + order[:k]:
            continue
        if k == 0:
            return before
        if math.prod(shape[axis] for axis in order[:k]) == first:
            return not before
    return before if not order else None


def _sum_over_examples(program: Program, gradient: Any) -> Any:
    """The sum that a gradient is, if it is one and nothing more."""
    total = program.source(program.before_layout(gradient))
    is_sum = total is not None and total.primitive.name == "reduce_sum"
    return total if is_sum and program.is_moving(gradient) else None


def _cotangent_of_bias(program: Program, gradient: Any) -> Any:
    """What a gradient is the sum of; itself where there is one example."""
    total = _sum_over_examples(program, gradient)
    return program.before_layout(gradient if total is None else total.invars[0])


def _square(value: Array) -> Array:
    """Of the real and the imaginary part, since one number serves both."""
    value = value.astype(tree.wide_dtype(value))
    if jnp.iscomplexobj(value):
        return jnp.real(value * jnp.conj(value)) / 2
    return value**2
