"""The damped inverses of all factors, and v -> M⁻¹ v with them.

    (A + ε)⁻¹ V (G + ε')⁻¹,    ε = π √λ,    ε' = √λ / π

for a matrix V, with a bias as one more row next to the inputs, and v / (diag + λ) for a
vector. Knows nothing of models and batches.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ngd_jax import placement, tree
from ngd_jax.kfac.blocks import BlockRoots, Blocks, inverse_roots, multiply, trace
from ngd_jax.kfac.division import divide, map_factors
from ngd_jax.kfac.groups import Block, Group, Member, padded
from ngd_jax.kfac.state import KroneckerState, Long, LongInverse, Pair
from ngd_jax.types import Array, MatVec, PyTree, Scalar

__all__ = ["damping_weights", "inverse_matvec", "refreshed_inverses"]

# An entry of an estimated diagonal counts as at least this fraction of the leaf's mean.
_SMALLEST_SHARE = 0.1
# With TF32, the default on some GPUs, a barely positive matrix may have no Cholesky
# factor.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def damping_weights(fisher: Any) -> list[Array] | None:
    """S⁻² of every leaf: in coordinates θ = S φ, M_φ + λ I = S (M + λ S⁻²) S.

    None where S = I.
    """
    if fisher.scales is None:
        return None
    scales = zip(
        jax.tree.leaves(tree.replicate(tree.widen(fisher.scales))),
        jax.tree.leaves(fisher.params),
        strict=True,
    )
    return [jnp.broadcast_to(1 / scale**2, like.shape) for scale, like in scales]


def refreshed_inverses(
    groups: list[Group],
    sharding: NamedSharding | None,
    state: KroneckerState,
    damping: Scalar,
    weights: list[Array] | None,
) -> tuple[Array, PyTree]:
    """Age 1 and new inverses; if these are not finite, the old ones, still due."""
    inverses, witnesses = list(state.inverses), []
    for place, group in enumerate(groups):
        if group.is_matrices and group.is_used:
            sides, shifts = _damped(group, state.averages[place], damping, weights)
            every = zip(sides, shifts, inverses[place], strict=True)
            inverses[place] = Pair(*(_inverse(group, sharding, *x) for x in every))
            # No entry of an inverse is above 1 / ε, and a Cholesky factorisation that
            # breaks down leaves only NaN: checking its trace is enough.
            witnesses += [1 / shift for shift in shifts]
            witnesses += map(_witness, inverses[place])
    sums = [jnp.sum(x).astype(damping.dtype) for x in witnesses]
    is_finite = jnp.isfinite(sum(sums, jnp.zeros_like(damping)))
    age = jnp.where(is_finite, 1, state.age)
    return age, tree.select(is_finite, tuple(inverses), state.inverses)


def _witness(inverse: Any) -> Array:
    return inverse.diagonal if isinstance(inverse, LongInverse) else _trace(inverse)


def _damped(
    group: Group, averages: Pair, damping: Scalar, weights: list[Array] | None
) -> tuple[Pair, Pair]:
    """The factors of both sides, and ε of each."""
    rows, columns = averages
    row_trace, column_trace = _trace(rows), _trace(columns)
    of_gradients = [b is not None and b.layer is None for b in group.blocks]
    if any(of_gradients):  # L ⊗ R / tr L
        divides = group.repeated(of_gradients) & (row_trace > 0)
        factor = 1 / jnp.where(divides, row_trace, 1)
        columns = jax.tree.map(
            lambda x: x * factor.reshape(-1, *[1] * (x.ndim - 1)), columns
        )
        column_trace *= factor
    num_rows, num_columns = (_lengths(group, is_turned=x) for x in (False, True))
    row_size, column_size = row_trace / num_rows, column_trace / num_columns
    is_usable = (row_size > 0) & (column_size > 0)
    ratio = jnp.where(is_usable, row_size / jnp.where(is_usable, column_size, 1), 1)
    balance = jnp.sqrt(ratio)
    if weights is not None:  # one number for each whole block: it stays a product
        total = jnp.sum(_bordered(group, weights), (1, 2))
        damping = damping * (total / (num_rows * num_columns))
    root = jnp.sqrt(damping).astype(balance.dtype)
    tiny = jnp.finfo(balance.dtype).eps
    shifts = root * balance + tiny * row_trace, root / balance + tiny * column_trace
    return Pair(rows, columns), Pair(*(jnp.where(x > 0, x, 1) for x in shifts))


def _lengths(group: Group, *, is_turned: bool) -> np.ndarray:
    """The number of rows (or columns) of every block, including any bias."""
    has_bias = [
        block is not None and block.bias is not None and block.is_turned == is_turned
        for block in group.blocks
    ]
    return group.shape[is_turned] + group.repeated(has_bias)


def _trace(side: Any) -> Array:
    """The trace of each."""
    if isinstance(side, Long):
        return jnp.sum(side.square, 1)
    if isinstance(side, Blocks | BlockRoots):
        return trace(side)
    # As a product: `jnp.trace` is a gather and a reduction.
    identity = jnp.eye(*side.shape[1:], dtype=side.dtype)
    return tree.contract(side, identity, (1, 2), (0, 1))


def _inverse(
    group: Group, sharding: NamedSharding | None, side: Any, shift: Array, old: Any
) -> Any:
    """(A + ε)⁻¹ of each, in the form and the dtype of the old ones."""
    if isinstance(side, Long):
        square, mean = side
        diagonal = 1 / (jnp.maximum(square - mean**2, 0) + shift[:, None])
        scaled = diagonal * mean
        norm = jnp.sqrt(1 + jnp.sum(mean * scaled, 1, keepdims=True))
        return LongInverse(diagonal, scaled / norm)
    if isinstance(side, Blocks):
        return inverse_roots(side, shift, old.values.dtype)
    return map_factors(_inverse_of_one, group, side, shift, sharding)


def _inverse_of_one(rows: Array, shift: Array, axes: tuple[str, ...]) -> Array:
    """This device's rows of (A + ε)⁻¹ from those of A, which mesh axes may divide."""
    size = rows.shape[1]
    square = jax.lax.all_gather(rows, axes, tiled=True)[:size] if axes else rows
    identity = jnp.eye(size, dtype=square.dtype)
    # LAPACK is column-major: transposing a symmetric matrix saves a copy.
    damped = (square + shift * identity).T
    root = jax.lax.linalg.cholesky(damped, symmetrize_input=False)
    solve = functools.partial(
        jax.lax.linalg.triangular_solve, root, left_side=True, lower=True
    )
    if not axes:
        half = solve(identity)
        return _matmul(half.T, half)
    # Columns of I; rows beyond those of A give columns of zeros.
    places = jax.lax.axis_index(axes) * len(rows) + jnp.arange(len(rows))
    columns = (jnp.arange(size)[:, None] == places[None]).astype(square.dtype)
    return solve(solve(columns), transpose_a=True).T


def _multiply(inverse: Any, values: Array, axis: int) -> Array:
    """Symmetric inverses `[K, n, n]` times matrices, along their `axis`, 1 or 2."""
    if isinstance(inverse, BlockRoots):
        return multiply(inverse, values, axis)
    if not isinstance(inverse, LongInverse):
        if axis == 1:
            return _matmul(inverse, values)
        # Multiplied from the right: transposing twice would make two copies.
        is_whole = inverse.shape[1] == inverse.shape[2]
        return _matmul(values, inverse if is_whole else jnp.swapaxes(inverse, 1, 2))
    diagonal, downdate = (jnp.expand_dims(x, 3 - axis) for x in inverse)
    along = jnp.sum(downdate * values, axis=axis, keepdims=True)
    return diagonal * values - downdate * along


def inverse_matvec(
    fisher: Any,
    groups: list[Group],
    sharding: NamedSharding | None,
    state: KroneckerState,
    damping: Scalar,
    weights: list[Array] | None,
) -> MatVec:
    """The map v -> M⁻¹ v; I before the first batch."""
    scales = None if fisher.scales is None else tree.widen(fisher.scales)
    is_seen, diagonals = state.num_batches > 0, {}
    for place, group in enumerate(groups):
        if group.is_used and not group.is_matrices:
            diagonal = _diagonals(group, state.averages[place], damping, weights)
            diagonals[place] = jnp.where(is_seen, diagonal, 1)

    def matvec(vector: PyTree) -> PyTree:
        given = vector = tree.widen(vector)
        if scales is not None:
            vector = jax.tree.map(jnp.divide, vector, scales)
        leaves, structure = jax.tree.flatten(tree.replicate(vector))
        results = list(leaves)
        for place, group in enumerate(groups):
            if not group.is_used:
                continue
            solved = _bordered(group, leaves)
            if group.is_matrices:
                if group.is_by_rows:
                    solved = placement.place(solved, sharding)
                else:
                    solved = divide(group, solved, sharding)
                for axis, inverse in enumerate(state.inverses[place], 1):
                    solved = _multiply(inverse, solved, axis)
                    if group.is_by_rows:
                        stop = group.shape[axis - 1] + 1
                        solved = placement.place(solved, sharding)
                        solved = jax.lax.slice_in_dim(solved, 0, stop, axis=axis)
                solved = placement.place(solved, sharding)
            else:
                solved = solved / diagonals[place]
            _spread(group, solved, results)
        solved = tree.placed_like(jax.tree.unflatten(structure, results), given)
        if scales is not None:
            solved = jax.tree.map(jnp.divide, solved, scales)
        return solved

    return matvec


def _bordered(group: Group, leaves: list[Array]) -> Array:
    """`[K, rows + 1, columns + 1]`: matrices, with a bias next to its inputs.

    Of vectors `[K, size]`. Zeros for members without a block.
    """

    def some(member: Member, block: Block | None) -> Array:
        count = member.num_layers
        if block is None:
            return jnp.zeros((count, *shape), dtype)
        values = member.layers_of(leaves[block.weight])
        values = values.reshape(count, *group.shape)
        if block.bias is not None:
            axis = 2 if block.is_turned else 1
            bias = member.layers_of(leaves[block.bias]).reshape(count, -1)
            values = jnp.concatenate([values, jnp.expand_dims(bias, axis)], axis)
        return padded(values, (count, *shape))

    shape = [size + group.is_matrices for size in group.shape]
    dtype = next(leaves[x.weight].dtype for x in group.blocks if x is not None)
    return jnp.concatenate(list(map(some, group.members, group.blocks)))


def _spread(group: Group, solved: Array, results: list[Array]) -> None:
    """Inverse of `_bordered`, written into the leaves."""
    start = 0
    for member, block in zip(group.members, group.blocks, strict=True):
        first, start = start, start + member.num_layers
        if block is None:
            continue
        values = jax.lax.slice_in_dim(solved, first, start)
        weight = values[:, :-1, :-1] if group.is_matrices else values
        _write(member, block.weight, weight, results)
        if block.bias is not None:
            bias = values[:, :-1, -1] if block.is_turned else values[:, -1, :-1]
            _write(member, block.bias, bias, results)


def _write(member: Member, leaf: int, values: Array, results: list[Array]) -> None:
    """Writes the layers of a leaf that are a member."""
    old = results[leaf]
    if member.room.is_stack and member.num_layers < len(old):
        values = values.reshape(member.num_layers, *old.shape[1:])
        results[leaf] = jax.lax.dynamic_update_slice_in_dim(
            old, values, member.first, axis=0
        )
    else:
        results[leaf] = values.reshape(old.shape)


def _diagonals(
    group: Group, averages: Array, damping: Scalar, weights: list[Array] | None
) -> Array:
    """The diagonal of F + λI, kept positive whatever single samples say."""
    mean = jnp.mean(averages, 1, keepdims=True)
    damped = jnp.maximum(averages, _SMALLEST_SHARE * mean)
    if weights is not None:
        damping = damping * _bordered(group, weights)
    damped += damping.astype(averages.dtype)
    return jnp.where(damped > 0, damped, 1)
