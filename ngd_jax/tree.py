"""The few operations on trees of arrays that Optax lacks.

⟨a, b⟩ = Re Σᵢ conj(aᵢ) bᵢ, accumulated in float32 or wider whatever the leaves are.
Everything here keeps the dtype of each leaf, so that trees of mixed precision stay so.
Knows nothing of models, likelihoods or optimizers.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = [
    "accumulator_dtype",
    "all_finite",
    "axpy",
    "check_like",
    "check_parameters",
    "divide",
    "in_units",
    "max_abs",
    "norm",
    "pack",
    "scale",
    "select",
    "size",
    "usable_unit",
    "vdot",
    "wide_dtype",
    "widen",
    "zeros_like_wide",
]


def wide_dtype(leaf: ArrayLike) -> jnp.dtype:
    """The dtype of a leaf, float32 where that is narrower."""
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def accumulator_dtype(tree: PyTree) -> jnp.dtype:
    """The real dtype in which sums over `tree` are taken: float32 or wider."""
    leaves = jax.tree.leaves(tree)
    real = (jnp.finfo(wide_dtype(leaf)).dtype for leaf in leaves)
    return functools.reduce(jnp.promote_types, real, jnp.dtype(jnp.float32))


def widen(tree: PyTree) -> PyTree:
    """Converts every leaf to float32 where it is narrower, and leaves the rest."""
    return jax.tree.map(lambda x: jnp.asarray(x, wide_dtype(x)), tree)


def zeros_like_wide(tree: PyTree) -> PyTree:
    """Zeros of the shapes of `tree`, each leaf in its `widen`ed dtype."""
    return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), wide_dtype(x)), tree)


def size(tree: PyTree) -> int:
    """The number of scalars in `tree`."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))


# Below this many entries a leaf is not worth a kernel of its own.
_SMALL = 2**16


def vdot(a: PyTree, b: PyTree) -> Scalar:
    """Re Σ conj(a) b over all leaves, accumulated in float32 or wider.

    `optax.tree.vdot` accumulates in the dtype of the leaves, where a sum over bfloat16
    stops growing at 256.

    Example:
      >>> import jax.numpy as jnp
      >>> ones = {"w": jnp.ones(1000, jnp.bfloat16)}
      >>> float(vdot(ones, ones))
      1000.0
    """
    dtype = accumulator_dtype((a, b))
    total = jnp.zeros((), dtype)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        wide = jnp.promote_types(wide_dtype(x), wide_dtype(y))
        x, y = jnp.asarray(x, wide), jnp.asarray(y, wide)
        x = jnp.conj(x)
        # Over all axes, since flattening would move the data of a sharded array. A sum
        # into one number waits on a CPU for each addition before the next: long ones
        # go by columns, which the compiler must not merge again. Short ones are one
        # contraction, which is less to compile.
        if x.ndim > 1 and x.size >= _SMALL:
            columns = jnp.sum(x * y, axis=tuple(range(x.ndim - 1)))
            product = jnp.sum(jax.lax.optimization_barrier(columns))
        else:
            axes = tuple(range(x.ndim))
            precision = jax.lax.Precision.HIGHEST
            dimensions = ((axes, axes), ((), ()))
            product = jax.lax.dot_general(x, y, dimensions, precision=precision)
        total += jnp.real(product).astype(dtype)
    return total


def norm(x: PyTree) -> Scalar:
    """The Euclidean norm √⟨x, x⟩; its derivative at 0 is 0, where it would be NaN."""
    square = vdot(x, x)
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def pack(tree: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Joins the small leaves into one vector for each dtype; and the way back.

    An elementwise loop over a tree compiles and launches one kernel for each leaf: most
    of the compile time of a solver on a network of many small leaves. Large leaves are
    left as they are, so that neither a copy nor a resharding of them is made.

    Example:
      >>> import jax.numpy as jnp
      >>> packed, unpack = pack({"w": jnp.ones((2, 2)), "b": jnp.zeros(2)})
      >>> [leaf.shape for leaf in jax.tree.leaves(packed)]
      [(6,)]
      >>> unpack(packed)["b"]
      Array([0., 0.], dtype=float32)
    """
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    groups: dict[jnp.dtype, list[int]] = {}
    for index, leaf in enumerate(leaves):
        if leaf.size < _SMALL:
            groups.setdefault(leaf.dtype, []).append(index)
    large = [index for index, leaf in enumerate(leaves) if leaf.size >= _SMALL]

    def join(values: list[Array]) -> list[Array]:
        small = [
            jnp.concatenate([jnp.ravel(values[index]) for index in group])
            for group in groups.values()
        ]
        return [values[index] for index in large] + small

    def unpack(packed: list[Array]) -> PyTree:
        values: list[Array] = [jnp.zeros(())] * len(leaves)
        for index, value in zip(large, packed, strict=False):
            values[index] = value
        for group, vector in zip(groups.values(), packed[len(large) :], strict=True):
            start = 0
            for index in group:
                stop = start + leaves[index].size
                values[index] = jnp.reshape(vector[start:stop], leaves[index].shape)
                start = stop
        return jax.tree.unflatten(structure, values)

    return join(leaves), unpack


def max_abs(tree: PyTree) -> Scalar:
    """The largest absolute value in `tree`; 0 without entries, NaN if one is NaN.

    So one reduction tells both the scale of a tree and whether all of it is finite.
    """
    dtype = accumulator_dtype(tree)
    total = jnp.zeros((), dtype)
    for leaf in jax.tree.leaves(tree):
        leaf = jnp.asarray(leaf)
        total = jnp.maximum(total, jnp.max(jnp.abs(leaf), initial=0).astype(dtype))
    return total


def axpy(alpha: ArrayLike, x: PyTree, y: PyTree) -> PyTree:
    """Adds alpha·x + y, computed wide, in the dtype of the leaves of `y`."""

    def combine(x_leaf: ArrayLike, y_leaf: ArrayLike) -> Array:
        wide = jnp.promote_types(wide_dtype(x_leaf), wide_dtype(y_leaf))
        total = jnp.asarray(alpha).astype(_real_like(wide)) * jnp.asarray(
            x_leaf, wide
        ) + jnp.asarray(y_leaf, wide)
        return total.astype(jnp.result_type(y_leaf))

    return jax.tree.map(combine, x, y)


def scale(alpha: ArrayLike, x: PyTree) -> PyTree:
    """Multiplies alpha·x, computed wide, in the dtype of the leaves of `x`."""

    def multiply(leaf: ArrayLike) -> Array:
        wide = wide_dtype(leaf)
        product = jnp.asarray(alpha).astype(_real_like(wide)) * jnp.asarray(leaf, wide)
        return product.astype(jnp.result_type(leaf))

    return jax.tree.map(multiply, x)


def divide(x: PyTree, by: ArrayLike) -> PyTree:
    """Divides by a scalar, x / by; exact where the inverse of `by` would overflow."""

    def quotient(leaf: ArrayLike) -> Array:
        wide = wide_dtype(leaf)
        divisor = jnp.asarray(by).astype(_real_like(wide))
        return (jnp.asarray(leaf, wide) / divisor).astype(jnp.result_type(leaf))

    return jax.tree.map(quotient, x)


def usable_unit(largest: Scalar) -> Scalar:
    """A number to divide by so that entries up to `largest` are near 1, or become so.

    It is `largest` but where XLA could flush the inverse to zero or infinity.
    """
    info = jnp.finfo(largest.dtype)
    return jnp.clip(largest, float(info.tiny) ** 0.8, float(info.max) ** 0.8)


def in_units(vector: PyTree) -> tuple[PyTree, Scalar, Scalar]:
    """A vector in units of its largest entry, whose square cannot over- or underflow.

    Returns:
      vector / unit, the unit, and the largest entry, which is the unit where that is
      fit to divide by.
    """
    packed, unpack = pack(vector)
    largest = max_abs(packed)
    unit = usable_unit(largest)
    return unpack(divide(packed, unit)), unit, largest


def _real_like(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.finfo(dtype).dtype


def select(predicate: ArrayLike, on_true: PyTree, on_false: PyTree) -> PyTree:
    """`on_true` where the scalar `predicate` holds, else `on_false`; never mixes."""
    return jax.tree.map(
        lambda x, y: jnp.where(predicate, x, y).astype(jnp.result_type(y)),
        on_true,
        on_false,
    )


def all_finite(tree: PyTree) -> Array:
    """Whether every entry of every leaf is finite, as a boolean scalar."""
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.stack(flags).all() if flags else jnp.asarray(True)


def check_like(tree: PyTree, like: PyTree, *, name: str, like_name: str) -> None:
    """Raises unless `tree` has the structure and the shapes of `like`.

    Raises:
      ValueError: naming both arguments and the first place where they differ.
    """
    structure, expected = jax.tree.structure(tree), jax.tree.structure(like)
    if structure != expected:
        raise ValueError(
            f"`{name}` must have the tree structure of `{like_name}`: got {structure}, "
            f"expected {expected}."
        )
    paths = jax.tree.leaves_with_path(like)
    for leaf, (path, other) in zip(jax.tree.leaves(tree), paths, strict=True):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"`{name}` must have the shapes of `{like_name}`: at "
                f"{jax.tree_util.keystr(path) or 'the root'} got {jnp.shape(leaf)}, "
                f"expected {jnp.shape(other)}."
            )


def check_parameters(params: PyTree, *, name: str = "params") -> None:
    """Raises unless every leaf of `params` can be differentiated.

    Raises:
      TypeError: naming the first leaf that is neither real nor complex floating.
    """
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"`{name}` must hold floating point or complex arrays: at "
                f"{jax.tree_util.keystr(path) or 'the root'} got "
                f"{jnp.result_type(leaf)}. Keep counters, keys and other state out of "
                f"`{name}` and hand them to the model through `batch`."
            )
