"""Finds dense layers and convolutions in the program of a model's backward pass.

    y = x W + b:    ∂/∂W = Σₜ aₜ ⊗ δₜ,    ∂/∂b = Σₜ δₜ

aₜ is the input of the layer (for a convolution a patch of its images), δₜ the cotangent
of its output, and t runs over examples and, if a layer is used at several positions of
an example, over positions. Owns everything that looks into a traced program; a layer is
claimed only where the program proves the formula. Knows nothing of metrics or solvers.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from ngd_jax import tree
from ngd_jax.types import Array, Params, PyTree

__all__ = ["Layer", "LayerValues", "backward_pass", "check_partition"]


class Layer(NamedTuple):
    """A dense layer or a convolution; hashable and static.

    Attributes:
      weight: the index of W among the leaves of the parameters.
      bias: the index of b; None if there is none, or if it is shared.
      inputs_first: whether the first axes of W are inputs and the last ones outputs, or
        the other way round.
      split: the axis of W's shape that separates the two: shape[:split] |
        shape[split:].
      num_inputs: the length of a.
      num_outputs: the length of δ.
      is_convolution: whether a is a patch.
    """

    weight: int
    bias: int | None
    inputs_first: bool
    split: int
    num_inputs: int
    num_outputs: int
    is_convolution: bool


class LayerValues(NamedTuple):
    """The terms of a layer's gradient, float32 or wider.

    Attributes:
      inputs: aₜ, `[T, m]`, with the first summed axis varying slowest, which is that of
        the examples in models that keep them first.
      cotangents: δₜ, `[T, n]`, in the same order.
    """

    inputs: Array
    cotangents: Array


def backward_pass(
    pull: Callable[[PyTree], Params],
    cotangents: PyTree,
    params: Params,
    *,
    keep_terms: bool = False,
) -> tuple[list[Layer], list[LayerValues], Params]:
    """Evaluates a pullback once, and finds the layers in it.

    Args:
      pull: linear, from cotangents of the outputs to the gradient of all parameters.
      cotangents: of the outputs of the whole batch.
      params: a tree of the structure and shapes of what `pull` returns.
      keep_terms: whether to return gradients that are nothing but a sum as separate
        terms.

    Returns:
      The layers, the values of each, and `pull(cotangents)`. With `keep_terms`, a leaf
      there that is the sum of T terms is `[T, *shape]`. Under `jit`, XLA removes what
      the caller does not use.
    """
    leaves, structure = jax.tree.flatten(cotangents)

    def pull_leaves(*leaves: Array) -> list[Array]:
        return jax.tree.leaves(pull(jax.tree.unflatten(structure, leaves)))

    try:
        if not _understands_jax():
            return [], [], pull(cotangents)
        program = _read_program(pull_leaves, *leaves)
        found = _find_layers(program, [jnp.shape(x) for x in jax.tree.leaves(params)])
    except Exception as error:  # noqa: BLE001  # internals of JAX may change in any way
        # An error of the model itself is raised again by its own program, below.
        gradients = pull(cotangents)
        _warn(f"{type(error).__name__}: {error}")
        return [], [], gradients

    gradients, summed = list(program.jaxpr.outvars), {}
    for place, gradient in enumerate(gradients):
        total = program.sum_of(gradient) if keep_terms else None
        if total is not None:
            gradients[place] = total.invars[0]
            summed[place] = total.params["axes"]
    wanted = [x for one in found for x in one.factors]
    values = iter(program.function([*wanted, *gradients])(*leaves))

    layer_values = [LayerValues(*one.rows(next(values), next(values))) for one in found]
    results = []
    for place, (value, leaf) in enumerate(
        zip(values, jax.tree.leaves(params), strict=True)
    ):
        if place in summed:
            axes = summed[place]
            value = jnp.moveaxis(value, axes, range(len(axes)))
            value = value.reshape(-1, *jnp.shape(leaf))
        results.append(value)
    layers = [one.layer for one in found]
    check_partition(layers)
    return layers, layer_values, jax.tree.unflatten(jax.tree.structure(params), results)


def check_partition(layers: Sequence[Layer]) -> None:
    """Raises where a parameter is claimed twice.

    Raises:
      AssertionError: an internal error: the finder claims each parameter at most once.
    """
    places = [x for one in layers for x in (one.weight, one.bias) if x is not None]
    if len(set(places)) < len(places):
        raise AssertionError(f"A parameter belongs to two layers: {list(layers)}.")


# --- Which gradients are sums of outer products


class _Found(NamedTuple):
    """A layer, the variables of its factors, and how to make rows of their values.

    Attributes:
      layer: the layer.
      factors: the variables that a and δ are computed from.
      output_axes: those axes of the second factor that count outputs.
      rows: from the values of the factors to a `[T, m]` and δ `[T, n]`.
    """

    layer: Layer
    factors: tuple[Any, Any]
    output_axes: tuple[int, ...]
    rows: Callable[[Array, Array], tuple[Array, Array]]


def _find_layers(program: "_Program", shapes: list[tuple[int, ...]]) -> list[_Found]:
    gradients = program.jaxpr.outvars
    candidates = [
        _outer_products(program, place, gradients[place], shape)
        for place, shape in enumerate(shapes)
        if len(shape) > 1 and math.prod(shape) > 0
    ]
    found = [one for one in candidates if one is not None]

    # A bias belongs to a layer if its gradient is the sum of exactly the numbers that
    # the layer has for δ, and neither has a competitor for them: two weights that feed
    # one sum (an LSTM cell) have the same δ, and none of them owns the bias.
    weights = {one.layer.weight for one in found}
    summands = [
        (place, program.summands(gradients[place]))
        for place in range(len(shapes))
        if place not in weights
    ]
    deltas = [program.kept(one.factors[1], one.output_axes) for one in found]
    for index, (one, delta) in enumerate(zip(found, deltas, strict=True)):
        partners = [place for place, summand in summands if summand == delta]
        if len(partners) == deltas.count(delta) == 1:
            layer = one.layer._replace(bias=partners[0])
            found[index] = one._replace(layer=layer)
    return found


def _outer_products(
    program: "_Program", place: int, gradient: Any, shape: tuple[int, ...]
) -> _Found | None:
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
    place: int,
    operation: Any,
    still: int,
    ranges: list["Range"],
    shape: tuple[int, ...],
) -> _Found | None:
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
    return _Found(layer, factors, tuple(free[1 - still]), rows)


def _of_convolution(
    place: int, operation: Any, layout: list[list["Range"]], shape: tuple[int, ...]
) -> _Found | None:
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
    return _Found(layer, (images, delta), (numbers.rhs_spec[0],), rows)


def _permutation(
    layout: list[list["Range"]], shape: tuple[int, ...]
) -> list[int] | None:
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


# --- Programs: what is computed from what, and where its numbers lie

# Positions in an array that is laid out flat: how many, and how far apart. With several
# ranges every sum is a position, and the last range varies fastest.
Range = tuple[int, int]

# Operations that only change how an array is laid out, placed or rounded.
_LAYOUT = (
    "convert_element_type",
    "copy",
    "reshape",
    "reshard",
    "sharding_constraint",
    "squeeze",
    "transpose",
)
# The same where axes of length 1 come or go.
_ALMOST_LAYOUT = ("broadcast_in_dim", "reduce_sum")
# Operations that call a program, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "linear_call": "callee",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
}


class _Program:
    """A function written out, with what each of its values is computed from."""

    def __init__(self, closed: core.ClosedJaxpr):
        self.jaxpr, self.consts = closed.jaxpr, closed.consts
        self._source: dict[Any, Any] = {}
        self._moving = set(self.jaxpr.invars)
        for equation in self.jaxpr.eqns:
            is_moving = any(self.is_moving(x) for x in equation.invars)
            for variable in equation.outvars:
                self._source[variable] = equation
                if is_moving:
                    self._moving.add(variable)

    def is_moving(self, variable: Any) -> bool:
        """Whether a value depends on the arguments."""
        return _is_variable(variable) and variable in self._moving

    def source(self, variable: Any) -> Any:
        """The operation that computes a value; None for arguments and constants."""
        return self._source.get(variable) if _is_variable(variable) else None

    def function(self, outputs: list[Any]) -> Callable[..., list[Array]]:
        """The function from the arguments to any of the values."""
        jaxpr = self.jaxpr.replace(outvars=outputs)
        return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, self.consts))

    def layout(self, variable: Any) -> tuple[Any, list[list[Range]]]:
        """A value before its layout was changed, and where its numbers are there.

        Returns:
          The earliest value of the same numbers (a later one where a reshape tears an
          axis apart), and for every axis of `variable` the ranges that it runs along.
        """
        equation, shape = self.source(variable), variable.aval.shape
        if equation is not None and _is_layout(equation):
            source, axes = self.layout(equation.invars[0])
            if equation.primitive.name == "transpose":
                return source, [axes[axis] for axis in equation.params["permutation"]]
            split = _split(join(one for axis in axes for one in axis), shape)
            if split is not None:
                return source, split
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return variable, [[one] for one in zip(shape, strides, strict=True)]

    def sum_of(self, gradient: Any) -> Any:
        """The sum that a gradient equals, in the same order; None if there is none."""
        while (equation := self.source(gradient)) is not None:
            if not _is_layout(equation) or equation.primitive.name == "transpose":
                break
            gradient = equation.invars[0]
        is_sum = equation is not None and equation.primitive.name == "reduce_sum"
        return equation if is_sum and self.is_moving(gradient) else None

    def summands(self, gradient: Any) -> tuple[Any, list[Range]]:
        """The value that a gradient sums, and which of its numbers go to each entry."""
        total = self.sum_of(gradient)
        if total is None:  # of a single example
            return self.kept(gradient, range(len(gradient.aval.shape)))
        terms, summed = total.invars[0], total.params["axes"]
        axes = [k for k in range(len(terms.aval.shape)) if k not in summed]
        return self.kept(terms, axes)

    def kept(self, variable: Any, axes: Sequence[int]) -> tuple[Any, list[Range]]:
        """Where a value comes from, and the positions there that axes run along."""
        source, layout = self.layout(variable)
        return source, join(one for axis in axes for one in layout[axis])


def _read_program(fn: Callable[..., list[Any]], *arguments: Any) -> _Program:
    """The program of `fn`, with the functions that it calls written out."""
    program = jax.make_jaxpr(fn)(*arguments)
    if any(equation.primitive.name in _CALLS for equation in program.eqns):
        program = jax.make_jaxpr(_written_out(program))(*arguments)
    return _Program(program)


def _written_out(program: core.ClosedJaxpr) -> Callable[..., list[Any]]:
    """The same function, with the functions that it calls in their place."""

    def run(*arguments: Any) -> list[Any]:
        jaxpr = program.jaxpr
        values = dict(zip(jaxpr.constvars, program.consts, strict=True))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(variable: Any) -> Any:
            return values[variable] if _is_variable(variable) else variable.val

        for equation in jaxpr.eqns:
            inputs = list(map(read, equation.invars))
            if (place := _CALLS.get(equation.primitive.name)) is not None:
                called = equation.params[place]
                if isinstance(called, core.Jaxpr):
                    called = core.ClosedJaxpr(called, ())
                outputs = _written_out(called)(*inputs)
            else:
                bound = equation.primitive.get_bind_params(equation.params)
                # Before jax 0.10: the functions that it calls come separately.
                functions, params = bound if isinstance(bound, tuple) else ((), bound)
                outputs = equation.primitive.bind(*functions, *inputs, **params)
                if not equation.primitive.multiple_results:
                    outputs = [outputs]
            values |= dict(zip(equation.outvars, outputs, strict=True))
        return [read(x) for x in jaxpr.outvars]

    return run


def join(ranges: Iterable[Range]) -> list[Range]:
    """The same positions, in the same order, in as few ranges as possible."""
    found: list[Range] = []
    for size, stride in ranges:
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            size *= found.pop()[0]
        found.append((size, stride))
    return found


def _split(ranges: list[Range], shape: tuple[int, ...]) -> list[list[Range]] | None:
    """The ranges of each axis of an array of that shape; None where one is torn."""
    if 0 in shape:
        return None
    rest, axes = list(ranges), []
    for length in reversed(shape):
        axis: list[Range] = []
        while length > 1:
            size, stride = rest.pop()
            part = min(size, length)
            if max(size, length) % part:
                return None
            if part < size:
                rest.append((size // part, part * stride))
            axis.insert(0, (part, stride))
            length //= part
        axes.insert(0, axis)
    return axes


def _is_layout(equation: Any) -> bool:
    if equation.primitive.name in _ALMOST_LAYOUT:
        return equation.invars[0].aval.size == equation.outvars[0].aval.size
    if equation.params.get("dimensions") and equation.primitive.name == "reshape":
        return False  # with a transpose in it
    return equation.primitive.name in _LAYOUT


def _is_variable(value: Any) -> bool:
    # The others are literals, which have no hash.
    return isinstance(value, core.Var)


# --- Whether the programs of this version of JAX can be read


@functools.cache
def _understands_jax() -> bool:
    """Finds the layers of a small model, whose layers are known; warns if it cannot."""
    shapes = {"b": (2,), "k": (3, 3, 2, 4), "w": (4, 2)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    numbers = ("NHWC", "HWIO", "NHWC")

    @jax.checkpoint
    def model_fn(params: Params) -> Array:
        images = jnp.zeros((2, 5, 5, 2))
        images = jax.lax.conv_general_dilated(
            images, params["k"], (1, 1), "SAME", dimension_numbers=numbers
        )
        return jax.jit(jnp.tanh)(images).sum((1, 2)) @ params["w"] + params["b"][None]

    with jax.ensure_compile_time_eval():
        outputs, pull = jax.vjp(model_fn, params)
    program = _read_program(lambda c: jax.tree.leaves(pull(c)), outputs)
    found = _find_layers(program, list(shapes.values()))
    places = [(one.layer.weight, one.layer.bias) for one in found]
    is_known = places == [(1, None), (2, 0)]
    if not is_known:
        _warn(f"expected two layers in a test model, found {places}")
    return is_known


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"ngd_jax cannot read the programs of JAX {jax.__version__} ({reason}). "
        f"Results stay right, but no layer of a model is recognised: solvers that use "
        f"layers fall back to slower or less precise substitutes. Please report this.",
        stacklevel=2,
    )
