"""Programs as JAX writes them: what is computed from what, and where its numbers lie.

A `Program` is a function with the functions that it calls written out. Loops of
`jax.lax.scan` stay, each with the program of its body, and can be run with more results
than the function has: something computed in every iteration, stacked or summed. Knows
nothing of models.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from ngd_jax import tree
from ngd_jax.types import Array, PyTree

__all__ = ["Loop", "Program", "Range", "Request", "join", "read_program"]

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
_CALLS = {"jit": "jaxpr", "linear_call": "callee", "pjit": "jaxpr", "remat2": "jaxpr"}


class Loop(NamedTuple):
    """What a loop does with a value that its body computes in every iteration.

    Attributes:
      equation: the `scan` in the program around it.
      body: the program of an iteration.
      is_stack: whether the loop returns all of these values along a new first axis, in
        the order of its other stacked values, or their sum.
    """

    equation: Any
    body: "Program"
    is_stack: bool


class Request(NamedTuple):
    """Something to compute from the values of a program.

    Attributes:
      loops: those around the values, the outermost first.
      variables: the values, of the program of the innermost loop.
      fn: a function of them to a tree of arrays. Its results add up to the result
        wanted, over the iterations of every loop that sums.
    """

    loops: tuple[Loop, ...]
    variables: tuple[Any, ...]
    fn: Callable[..., PyTree]


class Program:
    """A function written out, with what each of its values is computed from.

    Args:
      closed: the program.
      moving: for every argument whether it depends on those of the whole function; by
        default all do.
      zeros: the places of arguments that are zero.
    """

    def __init__(
        self,
        closed: core.ClosedJaxpr,
        moving: Sequence[bool] | None = None,
        zeros: Sequence[int] = (),
    ):
        self.closed, self.jaxpr = closed, closed.jaxpr
        self.results = self.jaxpr.outvars
        arguments = self.jaxpr.invars
        moving = [True] * len(arguments) if moving is None else moving
        self._moving = {x for x, is_so in zip(arguments, moving, strict=True) if is_so}
        self._zeros = {arguments[place] for place in zeros}
        self._source: dict[Any, Any] = {}
        self._bodies: dict[int, Program] = {}
        for equation in self.jaxpr.eqns:
            flags = [self.is_moving(x) for x in equation.invars]
            if equation.primitive.name != "optimization_barrier":  # one to one
                flags = [any(flags)] * len(equation.outvars)
            for variable, is_moving in zip(equation.outvars, flags, strict=True):
                self._source[variable] = equation
                if is_moving:
                    self._moving.add(variable)

    def is_moving(self, variable: Any) -> bool:
        """Whether a value may depend on the arguments."""
        return _is_variable(variable) and variable in self._moving

    def source(self, variable: Any) -> Any:
        """The operation that computes a value; None for arguments and constants."""
        return self._source.get(variable) if _is_variable(variable) else None

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

    def in_loop(self, variable: Any) -> tuple[Loop, Any] | None:
        """The loop that collects or sums a value, and this value in its body.

        None if that is not certain: the results must be those of the loop, in their
        order, and a sum must start at zero and be used in the body for nothing else.
        """
        source, axes = self.layout(variable)
        equation = self.source(source)
        if equation is None or equation.primitive.name != "scan":
            return None
        if equation.params["length"] == 0:  # there is nothing to sum or to stack
            return None
        shape, size = source.aval.shape, math.prod(source.aval.shape)
        is_in_order = join(one for axis in axes for one in axis) == join([(size, 1)])
        if shape != variable.aval.shape or not is_in_order:
            return None
        _, first, num_carry = _parts_of_scan(equation)
        place, body = equation.outvars.index(source), self._body(equation)
        result = body.results[place]
        if place >= num_carry:
            return Loop(equation, body, is_stack=True), result
        total = body.jaxpr.invars[first + place]
        added = body.source(result)
        if added is None or added.primitive.name not in ("add", "add_any"):
            return None
        uses = [x for one in body.jaxpr.eqns for x in one.invars if x is total]
        uses += [x for x in body.results if x is total]
        if len(uses) != 1 or not any(x is total for x in added.invars):
            return None
        if not self._is_zero(equation.invars[first + place]):
            return None
        (term,) = (x for x in added.invars if x is not total)
        if term.aval.shape != shape:
            return None
        return Loop(equation, body, is_stack=False), term

    def evaluate(
        self,
        arguments: Sequence[Array],
        outputs: Sequence[Any],
        requests: Sequence[Request] = (),
    ) -> tuple[list[Array], list[PyTree]]:
        """Any of the values, and what is computed from others.

        Args:
          arguments: of the function.
          outputs: variables of this program.
          requests: what else to compute, in the loops where its values are.
        """
        numbers: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            if request.loops:
                place = id(request.loops[0].equation)
                numbers.setdefault(place, []).append(number)
        results: list[PyTree] = [None] * len(requests)

        def apply(equation: Any, inputs: list[Any]) -> list[Any]:
            own = numbers.get(id(equation))
            if own is None:
                return _apply(equation, inputs)
            asked = [requests[number] for number in own]
            computed, found = _run_loop(equation, inputs, asked)
            for number, result in zip(own, found, strict=True):
                results[number] = result
            return computed

        read = _interpret(self.closed, arguments, apply)
        for number, request in enumerate(requests):
            if not request.loops:
                values = [jnp.asarray(read(x)) for x in request.variables]
                results[number] = request.fn(*values)
        return [read(x) for x in outputs], results

    def _body(self, equation: Any) -> "Program":
        """The program of an iteration of a `scan`."""
        if id(equation) in self._bodies:
            return self._bodies[id(equation)]
        closed, first, num_carry = _parts_of_scan(equation)
        moving = [self.is_moving(x) for x in equation.invars]
        zeros = [k for k, x in enumerate(equation.invars[:first]) if self._is_zero(x)]
        while True:  # until no more of the carry moves than was assumed
            body = Program(closed, moving, zeros)
            before = list(moving)
            results = closed.jaxpr.outvars[:num_carry]
            for place, result in enumerate(results, first):
                moving[place] |= body.is_moving(result)
            if moving == before:
                break
        self._bodies[id(equation)] = body
        return body

    def _is_zero(self, variable: Any) -> bool:
        """Whether all numbers of a value are certainly 0."""
        if not _is_variable(variable):
            return jnp.ndim(variable.val) == 0 and bool(variable.val == 0)
        equation = self.source(variable)
        if equation is None:
            return variable in self._zeros
        is_copy = equation.primitive.name == "broadcast_in_dim" or _is_layout(equation)
        return is_copy and self._is_zero(equation.invars[0])


# From an operation and its inputs to its results.
_Apply = Callable[[Any, list[Any]], list[Any]]


def _interpret(
    program: core.ClosedJaxpr, arguments: Sequence[Any], apply: _Apply
) -> Callable[[Any], Any]:
    """Runs a program; returns the function from its variables to their values."""
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.constvars, program.consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
        return values[variable] if _is_variable(variable) else variable.val

    for equation in jaxpr.eqns:
        results = apply(equation, list(map(read, equation.invars)))
        values |= dict(zip(equation.outvars, results, strict=True))
    return read


def _apply(equation: Any, inputs: list[Any]) -> list[Any]:
    """The results of one operation."""
    bound = equation.primitive.get_bind_params(equation.params)
    # Before jax 0.10: the functions that it calls come separately.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    outputs = equation.primitive.bind(*functions, *inputs, **params)
    return outputs if equation.primitive.multiple_results else [outputs]


def _scan(
    equation: Any,
    inputs: list[Any],
    run: Callable[[list[Any]], tuple[list[Any], PyTree, PyTree]],
    *,
    has_sum: bool,
) -> tuple[list[Any], PyTree, PyTree]:
    """A `scan` with another body.

    Args:
      equation: the `scan`.
      inputs: those of the equation.
      run: from the inputs of an iteration to its results, something to be summed over
        all iterations, and something to be stacked.
      has_sum: whether there is anything to be summed.

    Returns:
      The results, the sum, and the stack.
    """
    options = equation.params
    _, first, num_carry = _parts_of_scan(equation)
    consts, others = inputs[:first], inputs[first:]
    carry, xs = others[:num_carry], others[num_carry:]

    def step(state: Any, xs: list[Any]) -> tuple[Any, Any]:
        carry, totals = state
        outputs, summed, stacked = run([*consts, *carry, *xs])
        number = len(carry)
        totals = jax.tree.map(jnp.add, totals, summed)
        return (outputs[:number], totals), (outputs[number:], stacked)

    def sums_of_one(xs: list[Any]) -> PyTree:
        one = [jax.lax.index_in_dim(x, 0, keepdims=False) for x in xs]
        return run([*consts, *carry, *one])[1]

    shapes = jax.eval_shape(sums_of_one, xs) if has_sum else []
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (carry, totals), (ys, stacked) = jax.lax.scan(
        step,
        (carry, zeros),
        xs,
        length=options["length"],
        reverse=options["reverse"],
        unroll=options["unroll"],
    )
    return [*carry, *ys], totals, stacked


def _run_loop(
    equation: Any, inputs: list[Any], requests: Sequence[Request]
) -> tuple[list[Array], list[PyTree]]:
    """The results of a `scan`, and what is computed in its iterations."""
    body = requests[0].loops[0].body
    is_stack = [request.loops[0].is_stack for request in requests]
    inner = [request._replace(loops=request.loops[1:]) for request in requests]

    def run(arguments: list[Array]) -> tuple[list[Array], PyTree, PyTree]:
        outputs, found = body.evaluate(arguments, body.results, inner)
        pairs = list(zip(found, is_stack, strict=True))
        sums = tree.replicate([one for one, is_so in pairs if not is_so])
        return outputs, sums, [one for one, is_so in pairs if is_so]

    has_sum = not all(is_stack)
    outputs, sums, stacks = _scan(equation, inputs, run, has_sum=has_sum)
    parts = {True: iter(stacks), False: iter(sums)}
    return outputs, [next(parts[is_so]) for is_so in is_stack]


def read_program(fn: Callable[..., list[Any]], *arguments: Any) -> Program:
    """The program of `fn`, with the functions that it calls written out."""
    program = jax.make_jaxpr(fn)(*arguments)
    return Program(jax.make_jaxpr(_written_out(program))(*arguments))


def _closed(program: Any) -> core.ClosedJaxpr:
    is_open = isinstance(program, core.Jaxpr)
    return core.ClosedJaxpr(program, ()) if is_open else program


def _parts_of_scan(equation: Any) -> tuple[core.ClosedJaxpr, int, int]:
    """The body, the number of constants among its arguments, and that of the carry."""
    params = equation.params
    body = _closed(params["jaxpr"])
    if "num_consts" in params:
        return body, params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # from jax 0.12 on
    return body, len(consts), len(carry)


def _written_out(program: core.ClosedJaxpr) -> Callable[..., list[Any]]:
    """The same function, with the functions that it calls in their place."""

    def apply(equation: Any, inputs: list[Any]) -> list[Any]:
        name = equation.primitive.name
        if name == "scan":
            body = _written_out(_parts_of_scan(equation)[0])
            return _scan(
                equation, inputs, lambda values: (body(*values), [], []), has_sum=False
            )[0]
        if name not in _CALLS:
            return _apply(equation, inputs)
        called = _closed(equation.params[_CALLS[name]])
        if name == "remat2" and _is_kept_apart(equation):
            inputs = jax.lax.optimization_barrier(inputs)
        return _written_out(called)(*inputs)

    def run(*arguments: Any) -> list[Any]:
        read = _interpret(program, arguments, apply)
        return [read(x) for x in program.jaxpr.outvars]

    return run


def _is_kept_apart(equation: Any) -> bool:
    """Whether what `jax.checkpoint` computes again must not be merged with the first.

    Writing it out would undo this, and with it the saving of memory.
    """
    prevents = equation.params.get("prevent_cse", False)
    if isinstance(prevents, tuple):
        prevents = any(prevents)
    return bool(prevents) and bool(equation.params.get("differentiated", False))


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
