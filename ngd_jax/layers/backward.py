"""The layers in a backward pass, those inside of loops too, and its evaluation.

    ∂/∂W = Σₜ aₜ ⊗ δₜ

A loop (`jax.lax.scan`) over a stack of layers returns the gradients of all of them:
each is such a sum in the body of the loop. A loop over places that uses one weight at
each of them adds these sums up. Whatever is wanted of a and δ is computed in the body,
so that those of all iterations are never in memory together.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax.layers.products import Found, Layer, LayerValues, outer_products
from ngd_jax.layers.programs import Loop, Program, Request, read_program
from ngd_jax.types import Array, Params, PyTree

__all__ = ["Backward", "Wanted", "check_partition", "read_backward"]


class Wanted(NamedTuple):
    """A function of one part of a backward pass.

    Attributes:
      weight: the index of a leaf of the parameters.
      layer: the layer of this weight that is meant; None for the gradient itself.
      fn: of the `LayerValues` of the layer; its results add up over the iterations of a
        loop. Without a layer, of the gradient.
      is_stacked: without a layer, whether `fn` is applied to each entry along the first
        axis of a leaf that is in `Backward.stacked`.
      keep_terms: without a layer, whether `fn` takes a gradient that is nothing but the
        sum of T terms as these terms, `[T, *shape]`.
    """

    weight: int
    layer: Layer | None
    fn: Callable[..., PyTree]
    is_stacked: bool = False
    keep_terms: bool = False


class Backward(NamedTuple):
    """A pullback at its cotangents, with what is known of its program.

    Attributes:
      layers: those that were found.
      stacked: the leaves that are stacks: a loop over their first axis uses each entry
        in one iteration.
      evaluate: the results of several `Wanted`, those of stacks along a new first axis.
        Under `jit`, XLA removes what the caller does not use.
    """

    layers: list[Layer]
    stacked: frozenset[int]
    evaluate: Callable[[Sequence[Wanted]], list[PyTree]]


def read_backward(
    pull: Callable[[PyTree], Params], cotangents: PyTree, params: Params
) -> Backward:
    """Reads the program of a pullback, and finds the layers in it.

    Args:
      pull: linear, from cotangents of the outputs to the gradient of all parameters.
      cotangents: of the outputs of the whole batch.
      params: a tree of the structure and shapes of what `pull` returns.
    """
    leaves, structure = jax.tree.flatten(cotangents)
    shapes = [jnp.shape(x) for x in jax.tree.leaves(params)]

    def pull_leaves(*leaves: Array) -> list[Array]:
        return jax.tree.leaves(pull(jax.tree.unflatten(structure, leaves)))

    try:
        if not _understands_jax():
            return _unread(pull, cotangents)
        program = read_program(pull_leaves, *leaves)
        gradients = dict(enumerate(program.results))
        found = _find_layers(program, gradients)
        inside = {place: program.in_loop(x) for place, x in gradients.items()}
        stacks = {place: x for place, x in inside.items() if x and x[0].is_stack}
    except Exception as error:  # noqa: BLE001  # internals of JAX may change in any way
        # An error of the model itself is raised again by its own program, here.
        jax.eval_shape(pull, cotangents)
        _warn(f"{type(error).__name__}: {error}")
        return _unread(pull, cotangents)

    layers = [one.as_seen() for one in found]
    check_partition(layers)
    by_layer = dict(zip(layers, found, strict=True))

    def request(wanted: Wanted) -> Request:
        if wanted.layer is not None:
            one = by_layer[wanted.layer]
            return Request(
                one.loops,
                one.factors,
                lambda a, delta: wanted.fn(LayerValues(*one.rows(a, delta))),
            )
        gradient, shape = gradients[wanted.weight], shapes[wanted.weight]
        loops, around = (), program
        if wanted.is_stacked:
            loop, gradient = stacks[wanted.weight]
            loops, around, shape = (loop,), loop.body, shape[1:]
        total = around.sum_of(gradient) if wanted.keep_terms else None
        if total is None:
            return Request(loops, (gradient,), wanted.fn)
        axes = total.params["axes"]

        def of_terms(values: Array) -> PyTree:
            values = jnp.moveaxis(values, axes, range(len(axes)))
            return wanted.fn(values.reshape(-1, *shape))

        return Request(loops, (total.invars[0],), of_terms)

    def evaluate(wanted: Sequence[Wanted]) -> list[PyTree]:
        return program.evaluate(leaves, (), list(map(request, wanted)))[1]

    return Backward(layers, frozenset(stacks), evaluate)


def check_partition(layers: Sequence[Layer]) -> None:
    """Raises where a parameter is claimed twice.

    Raises:
      AssertionError: an internal error: the finder claims each parameter at most once.
    """
    places = [x for one in layers for x in (one.weight, one.bias) if x is not None]
    if len(set(places)) < len(places):
        raise AssertionError(f"A parameter belongs to two layers: {list(layers)}.")


def _unread(pull: Callable[[PyTree], Params], cotangents: PyTree) -> Backward:
    """Without any layers."""

    def evaluate(wanted: Sequence[Wanted]) -> list[PyTree]:
        gradients = jax.tree.leaves(pull(cotangents))
        return [one.fn(gradients[one.weight]) for one in wanted]

    return Backward([], frozenset(), evaluate)


# --- Which gradients are sums of outer products


def _find_layers(program: Program, gradients: dict[int, Any]) -> list[Found]:
    """The layers among these gradients, by leaf."""
    own: list[Found] = []
    loops: dict[int, dict[int, tuple[Loop, Any]]] = {}
    for place, gradient in gradients.items():
        shape = gradient.aval.shape
        one = None
        if len(shape) > 1 and math.prod(shape) > 0:
            one = outer_products(program, place, gradient, shape)
        if one is not None:
            own.append(one)
        elif (inside := program.in_loop(gradient)) is not None:
            loops.setdefault(id(inside[0].equation), {})[place] = inside
    found = _with_biases(program, gradients, own)
    for inside in loops.values():
        body = next(iter(inside.values()))[0].body
        values = {place: value for place, (_, value) in inside.items()}
        for one in _find_layers(body, values):
            layer = one.layer
            loop, bias = inside[layer.weight][0], layer.bias
            if bias is not None and inside[bias][0].is_stack != loop.is_stack:
                # One bias for all weights of a stack, or the other way round.
                layer = layer._replace(bias=None)
            found.append(one._replace(layer=layer, loops=(loop, *one.loops)))
    return sorted(found, key=lambda one: one.layer.weight)


def _with_biases(
    program: Program, gradients: dict[int, Any], found: list[Found]
) -> list[Found]:
    """The same layers, with the biases that belong to them.

    A bias belongs to a layer if its gradient is the sum of exactly the numbers that the
    layer has for δ, and neither has a competitor for them: two weights that feed one
    sum (an LSTM cell) have the same δ, and none of them owns the bias.
    """
    weights = {one.layer.weight for one in found}
    summands = [
        (place, program.summands(gradient))
        for place, gradient in gradients.items()
        if place not in weights
    ]
    deltas = [program.kept(one.factors[1], one.output_axes) for one in found]
    owners = []
    for one, delta in zip(found, deltas, strict=True):
        partners = [place for place, summand in summands if summand == delta]
        bias = partners[0] if len(partners) == deltas.count(delta) == 1 else None
        owners.append(one._replace(layer=one.layer._replace(bias=bias)))
    return owners


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
    program = read_program(lambda c: jax.tree.leaves(pull(c)), outputs)
    found = _find_layers(program, dict(enumerate(program.results)))
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
