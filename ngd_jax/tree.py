"""The few operations on trees of arrays that Optax lacks.

⟨a, b⟩ = Re Σᵢ conj(aᵢ) bᵢ, accumulated in float32 or wider whatever the leaves are.
Everything here keeps the dtype of each leaf, so that trees of mixed precision stay so.
Knows nothing of models, likelihoods or optimizers.
"""

import functools

import jax
import jax.numpy as jnp

from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = [
    "accumulator_dtype",
    "all_finite",
    "axpy",
    "check_like",
    "check_parameters",
    "max_abs",
    "scale",
    "select",
    "size",
    "vdot",
    "widen",
    "zeros_like_wide",
]


def _wide_dtype(leaf: ArrayLike) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def accumulator_dtype(tree: PyTree) -> jnp.dtype:
    """The real dtype in which sums over `tree` are taken: float32 or wider."""
    leaves = jax.tree.leaves(tree)
    real = (jnp.finfo(_wide_dtype(leaf)).dtype for leaf in leaves)
    return functools.reduce(jnp.promote_types, real, jnp.dtype(jnp.float32))


def widen(tree: PyTree) -> PyTree:
    """Converts every leaf to float32 where it is narrower, and leaves the rest."""
    return jax.tree.map(lambda x: jnp.asarray(x, _wide_dtype(x)), tree)


def zeros_like_wide(tree: PyTree) -> PyTree:
    """Zeros of the shapes of `tree`, each leaf in its `widen`ed dtype."""
    return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), _wide_dtype(x)), tree)


def size(tree: PyTree) -> int:
    """The number of scalars in `tree`."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))


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
        x, y = jnp.asarray(x, _wide_dtype(x)), jnp.asarray(y, _wide_dtype(y))
        if jnp.iscomplexobj(x) or jnp.iscomplexobj(y):
            product = jnp.real(jnp.conj(x) * y)
        else:
            product = x * y
        total += jnp.sum(product, dtype=dtype)
    return total


def max_abs(tree: PyTree) -> Scalar:
    """The largest absolute value in `tree`; 0 for a tree without entries."""
    dtype = accumulator_dtype(tree)
    total = jnp.zeros((), dtype)
    for leaf in jax.tree.leaves(tree):
        leaf = jnp.asarray(leaf)
        total = jnp.maximum(total, jnp.max(jnp.abs(leaf), initial=0).astype(dtype))
    return total


def axpy(alpha: ArrayLike, x: PyTree, y: PyTree) -> PyTree:
    """alpha·x + y, computed wide, in the dtype of the leaves of `y`."""

    def combine(x_leaf: ArrayLike, y_leaf: ArrayLike) -> Array:
        wide = jnp.promote_types(_wide_dtype(x_leaf), _wide_dtype(y_leaf))
        total = jnp.asarray(alpha).astype(_real_like(wide)) * jnp.asarray(
            x_leaf, wide
        ) + jnp.asarray(y_leaf, wide)
        return total.astype(jnp.result_type(y_leaf))

    return jax.tree.map(combine, x, y)


def scale(alpha: ArrayLike, x: PyTree) -> PyTree:
    """alpha·x, computed wide, in the dtype of the leaves of `x`."""

    def multiply(leaf: ArrayLike) -> Array:
        wide = _wide_dtype(leaf)
        product = jnp.asarray(alpha).astype(_real_like(wide)) * jnp.asarray(leaf, wide)
        return product.astype(jnp.result_type(leaf))

    return jax.tree.map(multiply, x)


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
