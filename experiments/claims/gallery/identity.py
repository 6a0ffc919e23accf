"""An identity: a textbook algorithm, and the equivalent call of this library.

    the textbook's update, in NumPy   =   the update of ngd.natural_gradient(...)

Both are short, readable functions; the report shows the source that actually ran.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims.claim import Check, check, theory
from experiments.claims.texts import labelled
from ngd_jax.types import Batch, Params, PyTree

__all__ = [
    "Identity",
    "call_in",
    "compiled",
    "descend",
    "equal",
    "listing",
    "relative_error",
    "text_of",
    "unequal",
]

# Results that are not equal differ by at least this much: far above any round-off, and
# far below the differences that the theory predicts here.
_CLEARLY = 1e-3


class Text(NamedTuple):
    """What to know of an identity.

    Attributes:
      condition: when it holds, and what happens otherwise.
      source: paper and equation.
      setup: the problem on which it was measured.
    """

    condition: str
    source: str
    setup: str


class Identity(NamedTuple):
    """An algorithm that is the natural gradient in disguise, and how well they agree.

    Attributes:
      algorithm: its name.
      ours: the function with the call.
      textbook: the algorithm as in its source, without any of our code.
      equality: the largest difference of the two, which is round-off.
      limit: the same difference if the condition is violated, which is not round-off.
      text: when it holds, and on what it was measured.
      others: further figures.
    """

    algorithm: str
    ours: Callable[..., Any]
    textbook: Callable[..., Any]
    equality: Check
    limit: Check
    text: Text
    others: Sequence[Check] = ()


def text_of(measure: Callable[..., Any], **values: Any) -> Text:
    """The text of an identity, from the docstring of the function that measures it."""
    labels = ("Condition", "Source", "Measured on")
    return Text(*(labelled(measure, label, **values) for label in labels))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` for small functions that run once: most of the time is compilation."""

    # A new function each time: JAX would cache `function`, and a test that changes what
    # it calls would get an old result.
    def fresh(*arguments: Any) -> Any:
        return function(*arguments)

    return jax.jit(fresh, compiler_options={"xla_backend_optimization_level": 0})


def descend(
    tx: optax.GradientTransformation,
    loss_fn: Callable[[Params, Batch], jax.Array],
    params: Params,
    batch: Batch,
    num_steps: int = 1,
) -> tuple[Params, PyTree]:
    """Steps on one batch: the parameters and the optimizer's states after each."""
    tx = optax.with_extra_args_support(tx)

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        params, state = carry
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        # JAX's gradient by a complex number is the conjugate of the steepest ascent.
        grads = jax.tree.map(jnp.conj, grads)
        updates, state = tx.update(
            grads, state, params, batch=batch, value=value, value_fn=loss_fn
        )
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    return jax.lax.scan(step, (params, tx.init(params)), length=num_steps)[1]


def relative_error(ours: Any, truth: Any) -> float:
    """Largest difference over the largest entry of `truth`; in trees the worst leaf."""
    errors = []
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape:
            raise ValueError(f"`ours` has shape {a.shape}, `truth` {b.shape}.")
        errors.append(np.abs(a - b).max() / np.abs(b).max())
    return float(np.max(errors))


def equal(
    name: str, ours: Any, truth: Any, *, num_rounded: int, condition: float = 1.0
) -> Check:
    """Checks that two results differ only by round-off: at most n ε κ, relative.

    Args:
      name: of the algorithm.
      ours: by the natural gradient.
      truth: by the textbook.
      num_rounded: n, the number of terms in sums, or of steps in a chain.
      condition: κ, the condition number of the matrix in the solve.
    """
    bound = num_rounded * float(np.finfo(float).eps) * condition
    return check(
        f"{name}: difference",
        relative_error(ours, truth),
        theory(
            None,
            bound,
            f"exact; round-off n ε κ, n = {num_rounded}, κ = {condition:.2g}",
        ),
    )


def unequal(name: str, ours: Any, truth: Any, reason: str) -> Check:
    """Checks that two results differ, for `reason`, by more than any round-off."""
    error = relative_error(ours, truth)
    return check(name, error, theory(_CLEARLY, None, reason))


def call_in(function: Callable[..., Any]) -> str:
    """What `function` assigns to `tx`, on one line, with constants filled in."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
    }
    numbers = {
        name: value
        for name, value in {**_globals_of(function), **defaults}.items()
        if isinstance(value, int | float)
    }
    for node in ast.walk(_parse(function)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "tx":
            return ast.unparse(_Filled(numbers).visit(node.value))
    raise ValueError(f"{function.__name__} assigns nothing to `tx`.")


def listing(*functions: Callable[..., Any]) -> str:
    """The source that ran: the functions, and what they use from their module."""
    used: dict[str, Any] = {}
    found = list(functions)
    while found:
        function = found.pop()
        used[function.__name__] = function
        for name, value in _globals_of(function).items():
            is_here = getattr(value, "__module__", None) == function.__module__
            if name not in used and is_here:
                found.append(value)
            elif isinstance(value, int | float):
                used[name] = value
    numbers = [f"{name} = {v!r}" for name, v in used.items() if not callable(v)]
    rest = [value for value in used.values() if callable(value)]
    rest.sort(key=lambda value: inspect.getsourcelines(value)[1])
    parts = ["\n".join(numbers), *(inspect.getsource(value) for value in rest)]
    return "\n\n\n".join(part.strip() for part in parts if part)


class _Filled(ast.NodeTransformer):
    """Replaces names by their numbers."""

    def __init__(self, numbers: Mapping[str, float]) -> None:
        self.numbers = numbers

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Returns a number if there is one for the name."""
        if node.id in self.numbers:
            return ast.Constant(self.numbers[node.id])
        return node


def _parse(function: Callable[..., Any]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def _globals_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The names from its module that the source of a function or class uses."""
    names = {n.id for n in ast.walk(_parse(function)) if isinstance(n, ast.Name)}
    module = vars(sys.modules[function.__module__])
    return {name: module[name] for name in sorted(names) if name in module}
