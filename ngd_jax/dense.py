"""Dense forms of the Fisher: its root A, F = Aᵀ A, and its diagonal.

    A = [√μₙ Bₙᵀ Jₙ]ₙ,    F = Aᵀ A,    diag F = Σ (rows of A)²

Built from the rows of single examples where these are rows of A: results from rows are
checked against `fisher.sqrt_matvec`, which is right for every model, and if they
differ, columns and products are used instead. All in real coordinates. Sits above
`Fisher`, and knows nothing of solvers.
"""

from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from ngd_jax import metric, per_example, tree
from ngd_jax.coordinates import random_signs, ravel_real, real_size
from ngd_jax.fisher import Fisher, FisherOptions, linearize_fisher
from ngd_jax.likelihoods import Likelihood
from ngd_jax.per_example import precision
from ngd_jax.types import Array, Batch, Float, ModelFn, Params, PyTree

__all__ = [
    "dense",
    "dense_fisher",
    "dense_root",
    "diagonal",
    "fisher_diagonal",
    "precision",
    "sketched_root",
]

# Parameters whose columns are made at once: the activations of as many copies of the
# batch are in memory.
_BASIS = 32
# Rows of an example up to which F is made from rows. N examples of K rows take 2NKP²
# operations, and the columns of F, each a product, about 8NP² in a dense network.
_FEW_ROWS = 4


def dense_root(fisher: Fisher) -> Float[Array, "M P"]:
    """A, the matrix of `fisher.sqrt_matvec`: F = Aᵀ A.

    The condition number of A is the square root of that of F, so solutions with A keep
    the digits that F has lost. Built from rows, one backward pass for each coefficient
    of an example; for a model that mixes its examples, from columns, one `jvp` for each
    parameter.
    """

    def put(matrix: Array, rows: Array, place: Array, *_: Any) -> Array:
        rows = per_example.flat_rows(rows)
        return jax.lax.dynamic_update_slice(matrix, rows, (place, 0))

    dtype, num_params = per_example.working_dtype(fisher), real_size(fisher.params)
    num_rows = real_size(per_example.coefficient_shapes(fisher))
    return _from_rows(
        fisher,
        _all_rows,
        put,
        jnp.zeros((num_rows, num_params), dtype),
        otherwise=lambda: _map_basis(fisher, fisher.sqrt_matvec).T,
        finish=per_example.permuted,
    )


def sketched_root(
    fisher: Fisher, buckets: Array, signs: Array, num_rows: int
) -> Float[Array, "R P"]:
    """S A for the sparse sketch (S c)ᵢ = Σ signsⱼ cⱼ over all j with bucketsⱼ = i.

    With independent random signs, E[Sᵀ S] = I: the sketch is right on average. A itself
    is never in memory.

    Args:
      fisher: the Fisher.
      buckets: `[M]`, for each of the coefficients of `ravel_real(A v)` the row of S A
        that its row of A is added to.
      signs: `[M]`, ±1.
      num_rows: R.
    """

    def add(
        matrix: Array, rows: Array, place: Array, is_new: Array, order: np.ndarray
    ) -> Array:
        rows = per_example.flat_rows(jnp.where(is_new[:, None, None], rows, 0))
        # Rows come by group and block, coefficients in the order of the outputs.
        own = jax.lax.dynamic_slice(np.argsort(order), (place,), (len(rows),))
        rows = signs[own][:, None] * tree.replicate(rows)
        return matrix.at[buckets[own]].add(rows)

    def from_columns() -> Array:
        columns = _map_basis(fisher, fisher.sqrt_matvec)
        return jnp.zeros_like(total).at[buckets].add(signs[:, None] * columns.T)

    dtype, num_params = per_example.working_dtype(fisher), real_size(fisher.params)
    signs = signs.astype(dtype)
    total = jnp.zeros((num_rows, num_params), dtype)
    return _from_rows(fisher, _all_rows, add, total, otherwise=from_columns)


def dense(fisher: Fisher) -> Float[Array, "P P"]:
    """F as a matrix, in real coordinates of the parameters (see `ravel_real`).

    Built from rows, one block of examples at a time, if an example has at most four;
    otherwise, and for a model that mixes its examples, from one product for each
    parameter.
    """

    def from_products() -> Array:
        matrix = _map_basis(fisher, fisher.matvec)
        return (matrix + matrix.T) / 2

    def add(matrix: Array, rows: Array, _: Array, is_new: Array, *__: Any) -> Array:
        rows = per_example.flat_rows(jnp.where(is_new[:, None, None], rows, 0))
        return matrix + tree.contract(rows, rows, (0,), (0,)).astype(dtype)

    dtype, num_params = per_example.working_dtype(fisher), real_size(fisher.params)
    return _from_rows(
        fisher,
        _all_rows,
        add,
        jnp.zeros((num_params, num_params), dtype),
        otherwise=from_products,
        most=_FEW_ROWS,
    )


def diagonal(fisher: Fisher) -> Float[Array, " P"]:
    """The diagonal of F, in real coordinates of the parameters (see `ravel_real`).

    Built from rows, with one row for each of a few examples in memory; for a model that
    mixes its examples, from one `jvp` for each parameter.
    """

    def squares(
        row: per_example.Row, units: Array, probe: Array
    ) -> tuple[Array, Array]:
        def step(total: Array, unit: Array) -> tuple[Array, Array]:
            vector = ravel_real(row(unit))[0].astype(dtype)
            return total + vector**2, vector @ probe

        return jax.lax.scan(step, jnp.zeros(probe.size, dtype), units)

    def add(total: Array, block: Array, _: Array, is_new: Array, *__: Any) -> Array:
        return total + jnp.sum(jnp.where(is_new[:, None], block, 0), axis=0)

    dtype = per_example.working_dtype(fisher)
    return _from_rows(
        fisher,
        squares,
        add,
        jnp.zeros(real_size(fisher.params), dtype),
        otherwise=lambda: _map_basis(fisher, fisher.quadratic)[:, 0],
        count=16,
    )


def dense_fisher(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    likelihood: Likelihood,
    **options: Unpack[FisherOptions],
) -> Float[Array, "P P"]:
    """F as a matrix, in the order of `jax.flatten_util.ravel_pytree(params)`.

    Costs a backward pass for each output of an example and the product AᵀA, or one
    product with F for each parameter.

    Args:
      model_fn, params, batch, likelihood: as for `linearize_fisher`.
      **options: `kind`, `key`, `targets`, `weights`, `microbatch_size`, likewise.

    Returns:
      `[P, P]`, float32 or wider. Complex parameters count twice, each leaf by all its
      real parts and then all its imaginary parts: F is linear over the reals only.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> matrix = dense_fisher(lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian())
      >>> matrix.round(5)
      Array([[ 5.,  7.],
             [ 7., 10.]], dtype=float32)
    """
    return dense(linearize_fisher(model_fn, params, batch, likelihood, **options))


def fisher_diagonal(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    likelihood: Likelihood,
    **options: Unpack[FisherOptions],
) -> Float[Array, " P"]:
    """diag(F), exact, in the order of `jax.flatten_util.ravel_pytree(params)`.

    Costs a backward pass for each output of an example, or a forward pass for each
    parameter of a model that mixes its examples. Arguments and order as in
    `dense_fisher`.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> diagonal = fisher_diagonal(
      ...     lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
      ... )
      >>> diagonal.round(4)
      Array([ 5., 10.], dtype=float32)
    """
    return diagonal(linearize_fisher(model_fn, params, batch, likelihood, **options))


def _map_basis(fisher: Fisher, fn: Callable[[PyTree], PyTree]) -> Float[Array, "P _"]:
    """fn(eⱼ), raveled, for every real coordinate of the parameters."""
    zero, unravel = ravel_real(tree.zeros_like_wide(fisher.params))
    dtype = per_example.working_dtype(fisher)

    @jax.vmap
    def on_many(index: Array) -> Array:
        return ravel_real(fn(unravel(zero.at[index].set(1))))[0].astype(dtype)

    if zero.size <= _BASIS:
        return on_many(jnp.arange(zero.size))
    # The last ones wrap around, so that there is one loop body to compile.
    count = -(-zero.size // _BASIS)
    indices = jnp.arange(count * _BASIS) % zero.size
    blocks = jax.lax.map(on_many, indices.reshape(count, _BASIS))
    return blocks.reshape(-1, *blocks.shape[2:])[: zero.size]


# --- From rows, verified.


def _all_rows(row: per_example.Row, units: Array, probe: Array) -> tuple[Array, Array]:
    rows = jax.vmap(lambda unit: ravel_real(row(unit))[0].astype(units.dtype))(units)
    return rows, rows @ probe


def _from_rows(
    fisher: Fisher,
    fn: Callable[[per_example.Row, Array, Array], tuple[PyTree, Array]],
    add: Callable[..., Array],
    total: Array,
    *,
    otherwise: Callable[[], Array],
    finish: Callable[[Array, np.ndarray], Array] = lambda total, _: total,
    count: int | None = None,
    most: int | None = None,
) -> Array:
    """A sum over the rows of all examples, if these rows are right.

    Rows are right if they give the same A v as `fisher.sqrt_matvec`, to round-off, for
    a v with random signs. The values of outputs are not compared: a model that mixes
    its examples can give the same ones for one example alone.

    Args:
      fisher: the Fisher.
      fn: `fn(row, units, probe)` for one example: some result, and its rows times
        `probe`, `[K]`.
      add: `add(total, results, place, is_new, order)` with the results of a block of
        examples, the place of its first row among all rows, which of its examples were
        in no block before, and the `order_of` all rows.
      total: where to start.
      otherwise: the same without rows, for any model.
      finish: what to do with the sum, and that order.
      count: examples in a block; None for `BLOCK_ROWS` rows.
      most: the most rows of an example for which this is worthwhile; None for any
        number.
    """
    try:
        groups = per_example.groups_of(fisher)
    except per_example.NoRowsError:
        return otherwise()
    if most is not None and any(group.rows_per_example > most for group in groups):
        return otherwise()
    probe = _probe(fisher)
    truth, unravel = ravel_real(fisher.sqrt_matvec(probe))
    vector, truth = (x.astype(total.dtype) for x in (ravel_real(probe)[0], truth))
    sizes = [group.blocks(count)[0] for group in groups]
    order = per_example.order_of(fisher, groups, sizes)
    carry = total, jnp.zeros_like(truth)

    def add_group(
        group: per_example.Group, carry: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        size, num_blocks = group.blocks(count)

        def step(block: Array | int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            total, pushed = carry
            place, is_new, (results, part) = group.map(
                lambda row, units: fn(row, units, vector), block, size
            )
            part = tree.replicate(per_example.flat_rows(part))
            pushed = jax.lax.dynamic_update_slice(pushed, part, (place,))
            return add(total, results, place, is_new, order), pushed

        return per_example.loop(num_blocks, step, carry)

    for group in groups:
        carry = add_group(group, carry)
    total, pushed = carry
    error = per_example.permuted(pushed, order) - truth
    is_right = _is_small(fisher, unravel(error), unravel(truth))
    return jax.lax.cond(is_right, lambda: finish(total, order), otherwise)


def _probe(fisher: Fisher) -> PyTree:
    """A vector v with random signs, to multiply A by.

    Rows may be wrong for some parameters only, as for those before a normalisation, and
    these must not be hidden by others to which the outputs are more sensitive. So the
    entries of v are, leaf by leaf, the inverse of the sensitivity of A to the leaf:
    E (Aᵀu)ⱼ² = Fⱼⱼ for random signs u.
    """
    signs = random_signs(per_example.coefficient_shapes(fisher))
    pulled = fisher.sqrt_rmatvec(signs)
    dtype = per_example.working_dtype(fisher)
    sizes = jax.tree.map(
        lambda x: tree.norm(x).astype(dtype) / max(1, x.size) ** 0.5, pulled
    )
    largest = tree.max_abs(sizes)
    largest = jnp.where(largest > 0, largest, 1)
    # A leaf whose sensitivity is round-off, or zero, must not outweigh all others.
    least = float(jnp.finfo(dtype).eps) ** 0.25
    return jax.tree.map(
        lambda size, signs: tree.scale(1 / jnp.maximum(size / largest, least), signs),
        sizes,
        random_signs(pulled),
    )


def _is_small(fisher: Fisher, error: PyTree, truth: PyTree) -> Array:
    """Whether an error in A v is round-off, in every term."""
    eps = precision(fisher)
    if jax.default_backend() != "cpu" and eps > jnp.finfo(jnp.float64).eps:
        # Accelerators round the factors of float32 products to TensorFloat-32 or
        # bfloat16, and not in the same way for one example as for many.
        eps = max(eps, float(jnp.finfo(jnp.bfloat16).eps))
    is_right = jnp.asarray(True)
    parts = (metric.split(fisher.likelihood, values) for values in (error, truth))
    for term_error, term_truth in zip(*parts, strict=True):
        size = tree.norm(term_truth)
        # Rows that are not finite although the truth is are wrong as well.
        is_right &= (tree.norm(term_error) <= eps**0.5 * size) | ~jnp.isfinite(size)
    return is_right
