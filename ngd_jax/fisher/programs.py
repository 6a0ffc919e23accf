"""Reading the program of a linear function: what is multiplied by what, and when.

A JAX function can be written out as the list of its operations. Here is what those need
who look for structure in it, such as the outer products that the gradients of dense
layers are. Knows nothing of models or metrics.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend import core

from ngd_jax.types import Array

__all__ = ["Program", "Range", "join", "read_program"]

# Of places in an array that is laid out flat: how many, and how far apart. Of several
# ranges every sum is a place, and the last one goes fastest.
Range = tuple[int, int]

# What only changes how an array is laid out or how it is rounded.
_LAYOUT = ("convert_element_type", "copy", "reshape", "squeeze", "transpose")
# The same where axes of length 1 come or go.
_ALMOST_LAYOUT = ("broadcast_in_dim", "reduce_sum")
# Operations that call a program, and where they have it.
_CALLS = {
    "jit": "jaxpr",
    "linear_call": "callee",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
}


class Program:
    """A function written out, with what each of its values comes from.

    Attributes:
      jaxpr: the operations.
      consts: the values of its constants, which may be traced.
    """

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
        """The operation that a value comes out of; None for arguments and constants."""
        return self._source.get(variable) if _is_variable(variable) else None

    def before_layout(self, variable: Any, *, same_order: bool = False) -> Any:
        """The same numbers before anything changed their layout or their rounding.

        Args:
          variable: the numbers.
          same_order: goes back no further than their order is the same.
        """
        while (equation := self.source(variable)) is not None:
            if not _is_layout(equation):
                break
            if same_order and equation.primitive.name == "transpose":
                break
            variable = equation.invars[0]
        return variable

    def layout(self, variable: Any) -> tuple[Any, list[list[Range]]]:
        """A value before its layout was changed, and where its numbers are in it.

        Returns:
          The value, as of `before_layout` or, where that is harder to tell, later; and
          for every axis the ranges of the places that it goes along there.
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

    def function(self, outputs: list[Any]) -> Callable[..., list[Array]]:
        """The function from the arguments to any of the values."""
        jaxpr = self.jaxpr.replace(outvars=outputs)
        return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, self.consts))


def read_program(fn: Callable[..., list[Any]], *arguments: Any) -> Program:
    """The program of `fn`, with the functions that it calls written out."""
    program = jax.make_jaxpr(fn)(*arguments)
    if any(equation.primitive.name in _CALLS for equation in program.eqns):
        program = jax.make_jaxpr(_written_out(program))(*arguments)
    return Program(program)


def _written_out(program: core.ClosedJaxpr) -> Callable[..., list[Any]]:
    """The same function, with the functions that it calls in their place."""

    def run(*arguments: Any) -> list[Any]:
        jaxpr = program.jaxpr
        values = dict(zip(jaxpr.constvars, program.consts, strict=True))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(variable: Any) -> Any:
            return values[variable] if _is_variable(variable) else variable.val

        for equation in jaxpr.eqns:
            if (place := _CALLS.get(equation.primitive.name)) is not None:
                called = equation.params[place]
                if isinstance(called, core.Jaxpr):
                    called = core.ClosedJaxpr(called, ())
                outputs = _written_out(called)(*map(read, equation.invars))
                values |= dict(zip(equation.outvars, outputs, strict=True))
                continue
            bound = equation.primitive.get_bind_params(equation.params)
            # Before jax 0.10: with the functions that it calls apart.
            functions, parameters = bound if isinstance(bound, tuple) else ((), bound)
            inputs = map(read, equation.invars)
            outputs = equation.primitive.bind(*functions, *inputs, **parameters)
            if not equation.primitive.multiple_results:
                outputs = [outputs]
            values |= dict(zip(equation.outvars, outputs, strict=True))
        return [read(x) for x in jaxpr.outvars]

    return run


def join(ranges: Iterable[Range]) -> list[Range]:
    """The same places, in the same order, by as few ranges as can be."""
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
