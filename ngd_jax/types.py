"""Aliases and protocols: what flows through the library, and what may plug in.

Nothing here computes. `Params`, `Batch` and `Outputs` are arbitrary pytrees; the
protocols say what a model, a matrix, a likelihood and a solver must be callable with.
"""

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import jax

__all__ = [
    "Array",
    "ArrayLike",
    "Batch",
    "Float",
    "KeyArray",
    "MatVec",
    "ModelFn",
    "Outputs",
    "Params",
    "PyTree",
    "Scalar",
    "ScalarOrSchedule",
]

if TYPE_CHECKING or importlib.util.find_spec("jaxtyping") is not None:
    from jaxtyping import Float
else:

    class Float:
        """Stands in for `jaxtyping.Float`, which only the tests need."""

        def __class_getitem__(cls, item: Any) -> Any:
            """Forgets the shape and keeps the array type."""
            return item[0]


Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.typing.ArrayLike
KeyArray: TypeAlias = jax.Array
PyTree: TypeAlias = Any

Params: TypeAlias = PyTree
Batch: TypeAlias = PyTree
Outputs: TypeAlias = PyTree
Scalar: TypeAlias = Float[Array, ""]
ScalarOrSchedule: TypeAlias = float | Array | Callable[[Any], Any]


@runtime_checkable
class ModelFn(Protocol):
    """A model as the library sees it: a pure function of parameters and a batch."""

    def __call__(self, params: Params, batch: Batch, /) -> Outputs:
        """Returns the outputs; the likelihood says what they mean."""
        ...


@runtime_checkable
class MatVec(Protocol):
    """A symmetric linear operator on trees of the structure of the parameters."""

    def __call__(self, vector: PyTree, /) -> PyTree:
        """Returns the product of the operator with `vector`."""
        ...
