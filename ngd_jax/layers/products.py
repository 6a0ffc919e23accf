"""Gradients of matrices that are sums of outer products, and of kernels that are too.

    y = x W + b:    ∂/∂W = Σₜ aₜ ⊗ δₜ

Owns which operations of a program these are, and how to make rows a and δ of what they
multiply. Knows nothing of loops.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.layers.programs import Loop, Program, Range, join
from ngd_jax.types import Array

__all__ = ["Found", "Layer", "LayerValues", "outer_products"]


class Layer(NamedTuple):
    """A dense layer or a convolution; hashable and static.

    Attributes:
      weight: the index of W among the leaves of the parameters.
      bias: the index of b; None if there is none, or if it is shared.
      inputs_first: whether the first axes of W are inputs and the last ones outputs, or
        the other way round.
      split: the axis of W's shape that separates the two: shape[num_stacked:split] |
        shape[split:].
      num_inputs: the length of a.
      num_outputs: the length of δ.
      is_convolution: whether a is a patch.
      num_stacked: how many first axes of W count layers of a stack, each with its own a
        and δ: W is the input of a loop over layers.
      in_loop: whether the layer is in a loop, over layers or over places.
    """

    weight: int
    bias: int | None
    inputs_first: bool
    split: int
    num_inputs: int
    num_outputs: int
    is_convolution: bool
    num_stacked: int = 0
    in_loop: bool = False


class LayerValues(NamedTuple):
    """The terms of a layer's gradient, float32 or wider.

    Attributes:
      inputs: aₜ, `[T, m]`, with the first summed axis varying slowest, which is that of
        the examples in models that keep them first.
      cotangents: δₜ, `[T, n]`, in the same order.
    """

    inputs: Array
    cotangents: Array


class Found(NamedTuple):
    """A layer, the variables of its factors, and how to make rows of their values.

    Attributes:
      layer: the layer, as it is in the innermost loop around it.
      factors: the variables that a and δ are computed from.
      output_axes: those axes of the second factor that count outputs.
      rows: from the values of the factors to a `[T, m]` and δ `[T, n]`.
      loops: those around it, the outermost first.
    """

    layer: Layer
    factors: tuple[Any, Any]
    output_axes: tuple[int, ...]
    rows: Callable[[Array, Array], tuple[Array, Array]]
    loops: tuple[Loop, ...] = ()

    def as_seen(self) -> Layer:
        """The layer in terms of the leaves of the parameters."""
        num_stacked = sum(one.is_stack for one in self.loops)
        return self.layer._replace(
            split=self.layer.split + num_stacked,
            num_stacked=num_stacked,
            in_loop=bool(self.loops),
        )


def outer_products(
    program: Program, place: int, gradient: Any, shape: tuple[int, ...]
) -> Found | None:
    """The terms whose sum is the gradient of a matrix; None if that is not certain."""
    source, axes = program.layout(gradient)
    operation = program.source(source)
    if operation is None or jnp.iscomplexobj(source.aval):
        return None
    moves = [program.is_moving(x) for x in operation.invars]
    ranges = join(one for axis in axes for one in axis)
    if operation.primitive.name == "dot_general" and sorted(moves) == [False, True]:
        return _of_product(place, operation, moves.index(False), ranges, shape)
    if operation.primitive.name == "conv_general_dilated" and moves == [False, True]:
        return _of_convolution(place, operation, axes, shape)
    return None


def _of_product(
    place: int, operation: Any, still: int, ranges: list[Range], shape: tuple[int, ...]
) -> Found | None:
    """A matrix product Σₜ aₜ ⊗ δₜ; operand `still` is a."""
    contracted, (batch, _) = operation.params["dimension_numbers"]
    if batch:
        return None
    # In one order for both factors: that of the axes of δ.
    pairs = sorted(zip(*contracted, strict=True), key=lambda pair: pair[1 - still])
    contracted = [[pair[side] for pair in pairs] for side in range(2)]
    free = [
        [axis for axis in range(len(x.aval.shape)) if axis not in axes]
        for x, axes in zip(operation.invars, contracted, strict=True)
    ]
    sizes = [
        math.prod(x.aval.shape[axis] for axis in axes)
        for x, axes in zip(operation.invars, free, strict=True)
    ]
    m, n = sizes[still], sizes[1 - still]
    # The first axes of the product are the free axes of its left factor.
    by_rows, by_columns = (sizes[0], sizes[1]), (sizes[1], 1)
    if ranges == join([by_rows, by_columns]):
        inputs_first = still == 0
    elif ranges == join([by_columns, by_rows]):
        inputs_first = still == 1
    else:
        return None
    if 1 in (m, n):  # the two orders cannot be told apart
        inputs_first = shape[-1] == n
    first = m if inputs_first else n
    splits = [k for k in range(1, len(shape)) if math.prod(shape[:k]) == first]
    if not splits:
        return None

    def matrix(factor: Array, side: int) -> Array:
        order = (*contracted[side], *free[side])
        return _wide_matrix(factor.transpose(order), len(contracted[side]))

    def rows(a: Array, delta: Array) -> tuple[Array, Array]:
        return matrix(a, still), matrix(delta, 1 - still)

    layer = Layer(place, None, inputs_first, splits[-1], m, n, is_convolution=False)
    factors = (operation.invars[still], operation.invars[1 - still])
    return Found(layer, factors, tuple(free[1 - still]), rows)


def _of_convolution(
    place: int, operation: Any, layout: list[list[Range]], shape: tuple[int, ...]
) -> Found | None:
    """The gradient of a kernel: images convolved with cotangents, summed over examples.

    gradient[c, d, i] = Σₙₕ images[c, n, i·dilation + h·stride - low] δ[d, n, h]
    """
    options, (images, delta) = operation.params, operation.invars
    numbers = options["dimension_numbers"]
    groups = options["feature_group_count"], options["batch_group_count"]
    if groups != (1, 1) or any(x != 1 for x in options["lhs_dilation"]):
        return None
    # Channels, outputs and positions, and where the gradient has each of them.
    channel, output, *positions = numbers.out_spec
    sizes = operation.outvars[0].aval.shape
    axes = _permutation(layout, sizes)
    if axes is None or output not in (axes[0], axes[-1]):
        return None
    inputs_first = axes[-1] == output
    input_axes = [axis for axis in axes if axis != output]
    counts = [delta.aval.shape[axis] for axis in numbers.rhs_spec[2:]]
    m, n = math.prod(sizes[axis] for axis in input_axes), sizes[output]

    def patches(images: Array) -> Array:
        """[examples, places..., what `input_axes` count...]."""
        images = images.transpose(*numbers.lhs_spec[1:], numbers.lhs_spec[0])
        # One axis after the other: strided slices, since a convolution that only copies
        # is slow inside loops on a CPU.
        for k, (low, _) in enumerate(options["padding"]):
            axis, size = 1 + k, sizes[positions[k]]
            stride, dilation = options["rhs_dilation"][k], options["window_strides"][k]
            span = (counts[k] - 1) * stride + 1
            high = (size - 1) * dilation + span - images.shape[axis] - low
            padding = [(0, 0, 0)] * images.ndim
            padding[axis] = (low, high, 0)
            images = jax.lax.pad(images, jnp.zeros((), images.dtype), padding)
            slices = [
                jax.lax.slice_in_dim(
                    images, i * dilation, i * dilation + span, stride, axis
                )
                for i in range(size)
            ]
            images = jnp.stack(slices, axis=-1)
        # Now [examples, places..., channels, positions...].
        first = 1 + len(positions)
        order = {channel: first}
        order |= {axis: first + 1 + k for k, axis in enumerate(positions)}
        return images.transpose(*range(first), *(order[axis] for axis in input_axes))

    def rows(images: Array, delta: Array) -> tuple[Array, Array]:
        delta = delta.transpose(*numbers.rhs_spec[1:], numbers.rhs_spec[0])
        first = 1 + len(positions)
        return _wide_matrix(patches(images), first), _wide_matrix(delta, first)

    split = len(shape) - 1 if inputs_first else 1
    layer = Layer(place, None, inputs_first, split, m, n, is_convolution=True)
    return Found(layer, (images, delta), (numbers.rhs_spec[0],), rows)


def _permutation(layout: list[list[Range]], shape: tuple[int, ...]) -> list[int] | None:
    """Which axis of an array of that shape each axis is, if that is unambiguous."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    whole = [join([one]) for one in zip(shape, strides, strict=True)]
    axes = []
    for ranges in map(join, layout):
        matches = [k for k, one in enumerate(whole) if one == ranges and k not in axes]
        axes += matches[:1]
    return axes if len(axes) == len(layout) == len(shape) else None


def _wide_matrix(values: Array, num_leading: int) -> Array:
    """The leading axes as rows, the others as columns."""
    columns = values.shape[num_leading:]
    # In two steps: JAX 0.10 cannot merge both groups at once over explicit mesh axes.
    values = values.reshape(math.prod(values.shape[:num_leading]), *columns)
    values = values.reshape(len(values), math.prod(columns))
    return values.astype(tree.wide_dtype(values))
