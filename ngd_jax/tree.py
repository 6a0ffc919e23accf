"""The few operations on trees of arrays that Optax lacks.

    ⟨a, b⟩ = Re Σᵢ conj(aᵢ) bᵢ,    accumulated in float32 or wider

Everything here keeps the dtype of each leaf, so that trees of mixed precision stay so,
and works on arrays that are sharded over devices, with automatic and with explicit mesh
axes. Knows nothing of models, likelihoods or optimizers.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ngd_jax.types import Array, ArrayLike, KeyArray, PyTree, Scalar

__all__ = [
    "accumulator_dtype",
    "all_finite",
    "axpy",
    "check_like",
    "check_parameters",
    "contract",
    "divide",
    "first_axis_sharding",
    "in_units",
    "max_abs",
    "norm",
    "pack",
    "placed_like",
    "random_like",
    "real_dtype",
    "replicate",
    "scale",
    "select",
    "size",
    "usable_unit",
    "vdot",
    "wide_dtype",
    "widen",
    "zeros_like_wide",
]

# Leaves with fewer entries are not worth a kernel of their own.
_SMALL = 2**16


def wide_dtype(leaf: ArrayLike) -> jnp.dtype:
    """The dtype of a leaf, or float32 if that is wider."""
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def real_dtype(leaf: ArrayLike) -> jnp.dtype:
    """The dtype of the real part of a leaf, float32 or wider."""
    return jnp.finfo(wide_dtype(leaf)).dtype


def accumulator_dtype(tree: PyTree) -> jnp.dtype:
    """The real dtype in which sums over `tree` are taken: float32 or wider."""
    real = map(real_dtype, jax.tree.leaves(tree))
    return functools.reduce(jnp.promote_types, real, jnp.dtype(jnp.float32))


def widen(tree: PyTree) -> PyTree:
    """Converts every leaf to float32 where it is narrower, and leaves the rest."""
    return jax.tree.map(lambda x: jnp.asarray(x, wide_dtype(x)), tree)


def zeros_like_wide(tree: PyTree) -> PyTree:
    """Zeros of the shapes of `tree`, placed alike, in the `widen`ed dtypes."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=wide_dtype(x)), tree)


def size(tree: PyTree) -> int:
    """The number of scalars in `tree`."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


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
        x, y = jnp.conj(jnp.asarray(x, wide)), jnp.asarray(y, wide)
        # A CPU adds up a sum into one number one entry at a time. Long sums are
        # therefore taken by columns first (the barrier keeps the compiler from merging
        # them again); short ones are one contraction, which compiles faster. Nothing is
        # flattened, since that would move the data of a sharded array.
        if _is_split(x) or _is_split(y):
            product = jnp.sum(x * y)
        elif x.ndim > 1 and x.size >= _SMALL:
            columns = jnp.sum(x * y, axis=tuple(range(x.ndim - 1)))
            product = jnp.sum(jax.lax.optimization_barrier(columns))
        else:
            axes = tuple(range(x.ndim))
            product = contract(x, y, axes, axes)
        total += jnp.real(product).astype(dtype)
    return total


def norm(x: PyTree) -> Scalar:
    """The Euclidean norm √⟨x, x⟩; its derivative at 0 is 0 instead of NaN."""
    square = vdot(x, x)
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def contract(a: Array, b: Array, axes_a: Sequence[int], axes_b: Sequence[int]) -> Array:
    """Sums a·b over pairs of axes at full precision; the free axes of a come first.

    With explicit mesh axes JAX asks how to place the result: here its axes are placed
    like those of the operands, and it is replicated over the axes that were summed.
    """
    dimensions = ((tuple(axes_a), tuple(axes_b)), ((), ()))
    highest = jax.lax.Precision.HIGHEST
    if not (_is_split(a) or _is_split(b)):
        return jax.lax.dot_general(a, b, dimensions, precision=highest)
    free = _free_spec(a, axes_a)
    if set(free) & set(_free_spec(b, axes_b)) - {None}:
        b = replicate(b)
    spec = PartitionSpec(*free, *_free_spec(b, axes_b))
    mesh = jax.typeof(a if _is_split(a) else b).sharding.mesh
    # One of the operands may be split along a contracted axis and the other one not.
    a, b = (
        x if _is_split(x) else jax.sharding.reshard(x, _replicated(x, mesh))
        for x in (a, b)
    )
    out_sharding = NamedSharding(mesh, spec)
    return jax.lax.dot_general(
        a, b, dimensions, precision=highest, out_sharding=out_sharding
    )


def replicate(tree: PyTree) -> PyTree:
    """The same values on every device, where mesh axes are explicit; else unchanged.

    Dense linear algebra ravels arrays, which an array that is split over an explicit
    axis does not allow.
    """

    def on_leaf(leaf: Any) -> Any:
        if not _is_split(leaf):
            return leaf
        mesh = jax.typeof(leaf).sharding.mesh
        return jax.sharding.reshard(leaf, _replicated(leaf, mesh))

    return jax.tree.map(on_leaf, tree)


def placed_like(values: PyTree, like: PyTree) -> PyTree:
    """Values on the devices of `like`, whose mesh axes may be explicit."""

    def place(value: Any, other: Any) -> Any:
        here, there = jax.typeof(value).sharding, jax.typeof(other).sharding
        if here == there or not (_is_split(value) or _is_split(other)):
            return value
        mesh = there.mesh if _is_split(other) else here.mesh
        return jax.sharding.reshard(value, NamedSharding(mesh, there.spec))

    return jax.tree.map(place, values, like)


def first_axis_sharding(tree: PyTree) -> NamedSharding | None:
    """What divides the first axis of the first leaf, if its mesh axes are explicit."""
    leaf = jax.tree.leaves(tree)[0]
    if not _is_split(leaf) or jax.typeof(leaf).sharding.spec[0] is None:
        return None
    sharding = jax.typeof(leaf).sharding
    return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))


def _replicated(leaf: Any, mesh: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*[None] * jnp.ndim(leaf)))


def _is_split(leaf: Any) -> bool:
    """Whether an array is split over mesh axes that are explicit."""
    sharding = getattr(jax.typeof(leaf), "sharding", None)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return False
    return any(entry is not None for entry in sharding.spec)


def _free_spec(leaf: Array, contracted: Sequence[int]) -> list[Any]:
    if not _is_split(leaf):
        return [None] * (leaf.ndim - len(contracted))
    spec = [*jax.typeof(leaf).sharding.spec] + [None] * leaf.ndim
    return [spec[axis] for axis in range(leaf.ndim) if axis not in contracted]


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
    groups: dict[Any, list[int]] = {}  # by dtype; a large leaf by its index
    for index, leaf in enumerate(leaves):
        is_small = leaf.size < _SMALL and not _is_split(leaf)
        groups.setdefault(leaf.dtype if is_small else index, []).append(index)

    joined = [
        leaves[key]
        if isinstance(key, int)
        else jnp.concatenate([jnp.ravel(leaves[index]) for index in group])
        for key, group in groups.items()
    ]

    def unpack(packed: list[Array]) -> PyTree:
        values = list(leaves)
        for (key, group), vector in zip(groups.items(), packed, strict=True):
            if isinstance(key, int):
                values[key] = vector
                continue
            stops = np.cumsum([leaves[index].size for index in group])
            for index, part in zip(group, jnp.split(vector, stops[:-1]), strict=True):
                values[index] = jnp.reshape(part, leaves[index].shape)
        return jax.tree.unflatten(structure, values)

    return joined, unpack


def max_abs(tree: PyTree) -> Scalar:
    """The largest absolute value in `tree`; 0 without entries, NaN if one is NaN.

    So one reduction gives both the scale of a tree and whether all of it is finite. Its
    derivative is zero, since it serves as a unit.
    """
    dtype = accumulator_dtype(tree)
    integer = jnp.int64 if dtype == jnp.float64 else jnp.int32
    total = jnp.zeros((), integer)
    for leaf in pack(tree)[0]:
        leaf = jax.lax.stop_gradient(leaf)
        # The maximum of floating point numbers in jaxlib 0.10 loses NaN in arrays of
        # 2^15 entries and more, on a CPU. Numbers that are not negative are ordered
        # like the integers of their bits, and NaN is above them all.
        size = jnp.abs(leaf).astype(dtype)
        bits = jax.lax.bitcast_convert_type(size, integer)
        total = jnp.maximum(total, jnp.max(bits, initial=0))
    return jax.lax.bitcast_convert_type(total, dtype)


def axpy(alpha: ArrayLike, x: PyTree, y: PyTree) -> PyTree:
    """Adds alpha·x + y, computed wide, in the dtype of the leaves of `y`."""

    def combine(x_leaf: ArrayLike, y_leaf: ArrayLike) -> Array:
        wide = jnp.promote_types(wide_dtype(x_leaf), wide_dtype(y_leaf))
        factor = jnp.asarray(alpha).astype(jnp.finfo(wide).dtype)
        total = factor * jnp.asarray(x_leaf, wide) + jnp.asarray(y_leaf, wide)
        return total.astype(jnp.result_type(y_leaf))

    return jax.tree.map(combine, x, y)


def scale(alpha: ArrayLike, x: PyTree) -> PyTree:
    """Multiplies alpha·x, computed wide, in the dtype of the leaves of `x`."""
    return _with_scalar(operator.mul, x, alpha)


def divide(x: PyTree, by: ArrayLike) -> PyTree:
    """Divides by a scalar, x / by; exact where the inverse of `by` would overflow."""
    return _with_scalar(operator.truediv, x, by)


def _with_scalar(operation: Callable, x: PyTree, scalar: ArrayLike) -> PyTree:
    def combine(leaf: ArrayLike) -> Array:
        wide = wide_dtype(leaf)
        other = jnp.asarray(scalar).astype(jnp.finfo(wide).dtype)
        return operation(jnp.asarray(leaf, wide), other).astype(jnp.result_type(leaf))

    return jax.tree.map(combine, x)


def usable_unit(largest: Scalar) -> Scalar:
    """A number to divide by so that entries up to `largest` are near 1, or become so.

    It is `largest` itself unless XLA could flush its inverse to zero or to infinity.
    """
    info = jnp.finfo(largest.dtype)
    return jnp.clip(largest, float(info.tiny) ** 0.8, float(info.max) ** 0.8)


def in_units(vector: PyTree) -> tuple[PyTree, Scalar, Scalar]:
    """A vector in units of its largest entry, whose square cannot over- or underflow.

    Returns:
      vector / unit, the unit, and the largest entry, which is the unit where that is
      fit to divide by.
    """
    largest = max_abs(vector)
    unit = usable_unit(largest)
    return divide(vector, unit), unit, largest


def select(predicate: ArrayLike, on_true: PyTree, on_false: PyTree) -> PyTree:
    """`on_true` where the scalar `predicate` holds, else `on_false`; never mixes."""
    return jax.tree.map(
        lambda x, y: jnp.where(predicate, x, y).astype(jnp.result_type(y)),
        on_true,
        on_false,
    )


def all_finite(tree: PyTree) -> Array:
    """Whether every entry of every leaf is finite, as a boolean scalar.

    By a sum of small multiples, which no finite entries can make overflow: a product
    compiles in a fraction of the time of a logical reduction.
    """
    total = jnp.zeros((), accumulator_dtype(tree))
    for leaf in pack(tree)[0]:
        leaf = leaf.astype(wide_dtype(leaf))
        small = jnp.full(leaf.shape, 2.0**-64, real_dtype(leaf)).astype(leaf.dtype)
        total += jnp.abs(vdot(small, leaf)).astype(total.dtype)
    return jnp.isfinite(total)


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
        dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"`{name}` must hold floating point or complex arrays: at "
                f"{jax.tree_util.keystr(path) or 'the root'} got {dtype}. Keep "
                f"counters, keys and other state out of `{name}` and hand them to the "
                f"model through `batch`."
            )


def random_like(sample: Callable[..., Array], key: KeyArray, like: PyTree) -> PyTree:
    """Independent samples shaped like a tree, in both parts of complex leaves."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, max(1, len(leaves)))

    def draw(key: KeyArray, leaf: Any) -> Array:
        real = jnp.finfo(leaf.dtype).dtype
        if not jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            return sample(key, leaf.shape, real)
        parts = sample(key, (2, *leaf.shape), real)
        return jax.lax.complex(parts[0], parts[1])

    drawn = [draw(key, leaf) for key, leaf in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(structure, drawn)
