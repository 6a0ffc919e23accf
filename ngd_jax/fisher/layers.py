"""Layers of a model, found without their names, and what F is made of there.

    y = x W + b,    ∂/∂W at one example = a ⊗ δ,    F_W = Σ (a aᵀ) ⊗ (δ δᵀ)

a are the inputs of a dense layer, or a patch of those of a convolution, and δ the
cotangents of what comes out of it. Which gradients are such products, and which biases
go with them, is read off the program of a backward pass over the batch. Of a layer that
is used at many places of an example each place counts as an example.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax.fisher.bilinear import OuterProducts, outer_products
from ngd_jax.fisher.coefficients import mean_square
from ngd_jax.fisher.linearization import Linearization, linearize, sum_microbatches
from ngd_jax.fisher.programs import Program, Range, join, read_program
from ngd_jax.types import Array, PyTree

if TYPE_CHECKING:
    from ngd_jax.fisher.operator import Fisher

__all__ = ["BackwardPass", "Layer", "LayerSums", "backward_pass"]


class Layer(NamedTuple):
    """A dense layer or a convolution.

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
      inputs: Σ a aᵀ; of long a its diagonal.
      outputs: Σ δ δᵀ; of long δ its diagonal.
    """

    num_terms: Array
    input: Array
    inputs: Array
    outputs: Array


class BackwardPass(NamedTuple):
    """What a backward pass tells of F.

    Attributes:
      layers: of each layer that was found.
      squares: for every leaf of the parameters an estimate of the diagonal of F, real:
        the sum of the squares of single examples where these are known; else the square
        of the gradient, a single sample.
    """

    layers: list[LayerSums]
    squares: list[Array]


def backward_pass(
    fisher: "Fisher", cotangents: PyTree, *, max_size: int
) -> tuple[list[Layer], BackwardPass]:
    """The layers, and the statistics of their inputs and cotangents.

    Args:
      fisher: at which parameters, on which batch.
      cotangents: of the outputs.
      max_size: longer a and δ have their squares summed, not their products.
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
        return _run(program, found, shapes, leaves, max_size)

    def on_microbatch(data: PyTree) -> BackwardPass:
        batch, cotangents = data
        return on_part(linearize(fisher.model_fn, fisher.params, batch), cotangents)

    if isinstance(fisher.linearization, Linearization):
        return layers, on_part(fisher.linearization, cotangents)
    data = (fisher.batch, cotangents)
    return layers, sum_microbatches(on_microbatch, data, fisher.linearization)


def _run(
    program: Program,
    found: list[tuple[Layer, OuterProducts]],
    shapes: list[tuple[int, ...]],
    leaves: list[Array],
    max_size: int,
) -> BackwardPass:
    factors = [factor for _, products in found for factor in products.factors]
    gradients = list(program.jaxpr.outvars)
    summed_axes: list[tuple[int, ...]] = [()] * len(shapes)
    for place, gradient in enumerate(gradients):
        total = _sum_over_examples(program, gradient)
        # Numbers that are added up may be others than those of examples.
        if total is not None and _num_terms(total) % len(leaves[0]) == 0:
            gradients[place] = total.invars[0]
            summed_axes[place] = total.params["axes"]
    values = iter(program.function([*factors, *gradients])(*leaves))

    sums = []
    for _, products in found:
        a, delta = products.rows(next(values), next(values))
        num_terms = jnp.asarray(len(a), a.dtype)
        inputs, outputs = (_gram(x, max_size) for x in (a, delta))
        sums.append(LayerSums(num_terms, jnp.sum(a, 0), inputs, outputs))
    squares = []
    for value, axes, shape in zip(values, summed_axes, shapes, strict=True):
        squares.append(jnp.sum(mean_square(value), axis=axes).reshape(shape))
    return BackwardPass(sums, squares)


def _find_layers(
    program: Program, shapes: list[tuple[int, ...]]
) -> list[tuple[Layer, OuterProducts]]:
    """Layers, and for each what the gradient of its weight is the sum of."""
    gradients, found = program.jaxpr.outvars, []
    biases = {
        place: _source_of_bias(program, gradients[place])
        for place, shape in enumerate(shapes)
        if len(shape) == 1
    }
    for place, gradient in enumerate(gradients):
        products = outer_products(program, gradient)
        if products is None:
            continue
        delta = _kept(program, products.factors[1], products.output_axes)
        partners = [other for other, source in biases.items() if source == delta]
        layer = Layer(
            weight=place,
            bias=partners[0] if len(partners) == 1 else None,
            inputs_first=products.inputs_first,
            num_inputs=products.num_inputs,
            num_outputs=products.num_outputs,
        )
        found.append((layer, products))
    return found


def _sum_over_examples(program: Program, gradient: Any) -> Any:
    """The sum that a gradient is, if it is one and nothing more."""
    total = program.source(program.before_layout(gradient, same_order=True))
    is_sum = total is not None and total.primitive.name == "reduce_sum"
    return total if is_sum and program.is_moving(gradient) else None


def _num_terms(total: Any) -> int:
    return total.invars[0].aval.size // total.outvars[0].aval.size


def _source_of_bias(program: Program, gradient: Any) -> tuple[Any, list[Range]]:
    """What a gradient is the sum of, and which of its numbers each entry has."""
    total = _sum_over_examples(program, gradient)
    if total is None:  # there may be one example
        return _kept(program, gradient, (0,))
    cotangents = total.invars[0]
    summed, axes = total.params["axes"], range(len(cotangents.aval.shape))
    return _kept(program, cotangents, [axis for axis in axes if axis not in summed])


def _kept(
    program: Program, variable: Any, axes: Sequence[int]
) -> tuple[Any, list[Range]]:
    """Where a value is from, and the places there that some of its axes go along."""
    source, layout = program.layout(variable)
    return source, join(one for axis in axes for one in layout[axis])


def _gram(rows: Array, max_size: int) -> Array:
    """Σ row rowᵀ, or its diagonal; TF32, a default elsewhere, would spoil it."""
    if rows.shape[1] > max_size:
        return jnp.sum(rows**2, axis=0)
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
