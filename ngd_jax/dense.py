"""Dense forms of the Fisher: its root A, F = Aᵀ A, its diagonal, the Gram matrix A Aᵀ.

    row of A for the coefficient e of example n:    Jₙᵀ (√μₙ Bₙ e)

less √μₙ J̄ᵀ e where F is a covariance. A row is a backward pass through the model on
example n alone, which is a row of A only if the model does not mix its examples. So
whatever is made of rows is held against `fisher.sqrt_matvec`, which is right for every
model, and where it differs, columns and products take its place. All in real
coordinates. Sits above `Fisher`, and knows nothing of solvers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from ngd_jax import metric, tree
from ngd_jax.fisher import Chunks, Fisher, FisherOptions, linearize, linearize_fisher
from ngd_jax.layers import Layer, backward_pass
from ngd_jax.likelihoods import Likelihood
from ngd_jax.types import Array, Batch, Float, ModelFn, Outputs, Params, PyTree, Scalar

__all__ = [
    "NoRowsError",
    "dense",
    "dense_fisher",
    "dense_root",
    "diagonal",
    "fisher_diagonal",
    "gram",
    "ravel_real",
    "real_parts",
    "real_size",
    "trace",
    "unravel_real",
]

# What rows may take in memory where nobody says how many to hold, in bytes.
_MEMORY = 512 * 2**20
# Rows in a block: wide enough for matrix products at full speed, narrow enough that the
# symmetry of the Gram matrix saves most of half the work.
_BLOCK_ROWS = 256
# Parameters whose columns are made at once: the activations of as many copies of the
# batch are in memory.
_BASIS = 32
# Rows of an example up to which F is made from rows. N examples of K rows take 2NKP²
# operations, and the columns of F, each a product, about 8NP² in a dense network.
_FEW_ROWS = 4
# Weights as small as this are cheaper as ordinary rows: M² entries of a product cost
# another pass over the Gram matrix, which is worth as many operations on each entry.
_PASS = 64


# --- Real coordinates.


def ravel_real(values: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """A tree as one real vector, and the way back.

        ⟨a, b⟩ = Re Σ conj(a) b

    Leaf by leaf as in `jax.flatten_util.ravel_pytree`; a complex leaf is all its real
    parts, then all its imaginary parts. With this inner product real, complex and mixed
    trees are one case.

    Returns:
      The vector, float32 or wider, and a function from such vectors to trees of the
      structure of `values`, likewise float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> vector, unravel = ravel_real({"a": jnp.array([1 + 2j]), "b": jnp.ones(1)})
      >>> vector
      Array([1., 2., 1.], dtype=float32)
    """
    wide = tree.replicate(tree.widen(values))
    like = jax.eval_shape(lambda: wide)
    dtype = tree.accumulator_dtype(wide)
    parts = [
        jnp.ravel(part).astype(dtype)
        for leaf in jax.tree.leaves(wide)
        for part in real_parts(leaf)
    ]
    vector = jnp.concatenate(parts) if parts else jnp.zeros(0, dtype)
    return vector, lambda vector: unravel_real(vector, like)


def unravel_real(vector: Array, like: PyTree) -> PyTree:
    """The inverse of `ravel_real`, for a tree of the shapes and dtypes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    values, start = [], 0
    for leaf in leaves:
        count = math.prod(leaf.shape)
        is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        parts = []
        for _ in range(1 + is_complex):
            part = vector[start : start + count].reshape(leaf.shape)
            parts.append(part.astype(jnp.finfo(leaf.dtype).dtype))
            start += count
        values.append(jax.lax.complex(*parts) if is_complex else parts[0])
    return jax.tree.unflatten(structure, values)


def real_parts(leaf: Array) -> tuple[Array, ...]:
    """A real leaf, or the real and the imaginary part of a complex one."""
    return (jnp.real(leaf), jnp.imag(leaf)) if jnp.iscomplexobj(leaf) else (leaf,)


def real_size(like: PyTree) -> int:
    """The length of the vector that `ravel_real` makes of such a tree."""
    return sum(
        math.prod(leaf.shape) * (1 + jnp.issubdtype(leaf.dtype, jnp.complexfloating))
        for leaf in jax.tree.leaves(like)
    )


# --- The dense forms.


def dense_root(fisher: Fisher) -> Float[Array, "M P"]:
    """A, what `fisher.sqrt_matvec` multiplies by: F = Aᵀ A.

    The condition number of A is the square root of that of F, so that what is solved
    with A keeps the digits that F has lost. Made of rows, one backward pass for each
    coefficient of an example; for a model that mixes its examples, of columns, one
    `jvp` for each parameter.
    """

    def column(unit: PyTree) -> Array:
        return ravel_real(fisher.sqrt_matvec(unit))[0].astype(dtype)

    def put(matrix: Array, rows: Array, place: Array, _is_new: Array) -> Array:
        rows = _flat_rows(rows)
        return jax.lax.dynamic_update_slice(matrix, rows, (place, 0))

    dtype, num_params = _dtype(fisher), real_size(fisher.params)
    num_rows = real_size(jax.eval_shape(fisher.sqrt_matvec, fisher.params))
    return _from_rows(
        fisher,
        _all_rows,
        put,
        jnp.zeros((num_rows, num_params), dtype),
        otherwise=lambda: _map_basis(column, fisher.params).T,
        finish=lambda matrix, groups: _permuted(matrix, _order(fisher, groups)),
    )


def dense(fisher: Fisher) -> Float[Array, "P P"]:
    """F as a matrix, in real coordinates of the parameters (see `ravel_real`).

    Made of rows, block by block of examples, where an example has at most four; else,
    and for a model that mixes its examples, of one product for each parameter.
    """

    def column(unit: PyTree) -> Array:
        return ravel_real(fisher.matvec(unit))[0].astype(dtype)

    def from_products() -> Array:
        matrix = _map_basis(column, fisher.params)
        return (matrix + matrix.T) / 2

    def add(matrix: Array, rows: Array, _place: Array, is_new: Array) -> Array:
        rows = _flat_rows(jnp.where(is_new[:, None, None], rows, 0))
        return matrix + tree.contract(rows, rows, (0,), (0,)).astype(dtype)

    dtype, num_params = _dtype(fisher), real_size(fisher.params)
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

    Made of rows, of which one for each of a few examples is in memory; for a model that
    mixes its examples, of one `jvp` for each parameter.
    """

    def squares(row: "_Row", units: Array, probe: Array) -> tuple[Array, Array]:
        def step(total: Array, unit: Array) -> tuple[Array, Array]:
            vector = ravel_real(row(unit))[0].astype(dtype)
            return total + vector**2, vector @ probe

        return jax.lax.scan(step, jnp.zeros(probe.size, dtype), units)

    def add(total: Array, block: Array, _place: Array, is_new: Array) -> Array:
        return total + jnp.sum(jnp.where(is_new[:, None], block, 0), axis=0)

    def entry(unit: PyTree) -> Array:
        return fisher.quadratic(unit).astype(dtype)

    dtype = _dtype(fisher)
    return _from_rows(
        fisher,
        squares,
        add,
        jnp.zeros(real_size(fisher.params), dtype),
        otherwise=lambda: _map_basis(entry, fisher.params),
        count=16,
    )


def trace(fisher: Fisher) -> Scalar:
    """The trace of F, at the price of its diagonal."""
    return jnp.sum(diagonal(fisher))


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
    parameter of a model that mixes its examples. Arguments and order as of
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


def gram(fisher: Fisher, block_size: int | None = None) -> Float[Array, "M M"]:
    """A Aᵀ, symmetric, in real coordinates of what `fisher.sqrt_matvec` returns.

    2M²P operations, or 2M²(m + n) for a dense layer of m inputs and n outputs that is
    used once in an example. Two blocks of rows are in memory, and never all of A.

    Args:
      fisher: the Fisher of a model that does not mix its examples. This is not
        verified: whoever solves with the matrix verifies the solution.
      block_size: examples in a block. None takes the rows of dense layers as outer
        products, of all examples at once, if they fit into half a GiB.

    Raises:
      NoRowsError: at trace time, where the model cannot be run on single examples.
    """
    dtype = _dtype(fisher)
    if block_size is not None:
        metric.check_count("block_size", block_size)
    elif (found := _gram_by_layers(fisher, dtype)) is not None:
        return found
    groups = _row_groups(fisher)
    order = _order(fisher, groups)
    return _permuted(_gram_by_blocks(groups, block_size, dtype), order, order)


def _map_basis(fn: Callable[[PyTree], Array], params: Params) -> Array:
    """fn(eⱼ) for every real coordinate of the parameters, stacked."""
    zero, unravel = ravel_real(tree.zeros_like_wide(params))
    on_many = jax.vmap(lambda index: fn(unravel(zero.at[index].set(1))))
    if zero.size <= _BASIS:
        return on_many(jnp.arange(zero.size))
    # The last ones wrap around, so that there is one loop body to compile.
    count = -(-zero.size // _BASIS)
    indices = jnp.arange(count * _BASIS) % zero.size
    blocks = jax.lax.map(on_many, indices.reshape(count, _BASIS))
    return blocks.reshape(-1, *blocks.shape[2:])[: zero.size]


def _dtype(fisher: Fisher) -> jnp.dtype:
    return tree.accumulator_dtype((fisher.params, fisher.outputs))


# --- Rows of single examples.


class NoRowsError(ValueError):
    """The model cannot be run on single examples."""


class _Term(NamedTuple):
    """One term of the likelihood.

    Attributes:
      place: its place among all terms.
      likelihood: its likelihood.
      data: the outputs, weights μ and scores (or None) of all its examples.
      unit: shapes and dtypes of the coefficients of one example, with leading axis 1.
      means: where F is a covariance, the mean rows to subtract: one for the real
        coefficients and, if there are any, one for the imaginary ones; else empty.
    """

    place: int
    likelihood: Any
    data: tuple[Outputs, Array, PyTree | None]
    unit: PyTree
    means: tuple[Params, ...]


# From the real coefficients of one example to its row, as a tree like the parameters.
_Row = Callable[[Array], Params]


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """Terms whose examples are equally many, and the way to the rows of each example.

    To run the model on example n, all leaves of the batch whose leading axis counts as
    many are cut to it, and all others stay whole. So blocks of a `Product` may have
    batches of their own.

    Attributes:
      fisher: the Fisher.
      size: the number of examples.
      terms: the terms that have these examples.
      batch: the batch of all examples.
      cut: for every leaf of the batch, whether it is cut.
    """

    fisher: Fisher
    size: int
    terms: tuple[_Term, ...]
    batch: Batch
    cut: PyTree

    @property
    def rows_per_example(self) -> int:
        """Real coefficients of an example."""
        return real_size([term.unit for term in self.terms])

    def units(self) -> Array:
        """All unit vectors of the coefficients of an example."""
        return jnp.eye(self.rows_per_example, dtype=_dtype(self.fisher))

    def map(
        self, fn: Callable[[_Row, Array], PyTree], start: Array | int, count: int
    ) -> PyTree:
        """`fn(row, units)` for `count` examples from `start` on, under `vmap`."""

        def take(leaf: Any) -> Array:
            return jax.lax.dynamic_slice_in_dim(leaf, start, count)

        def on_example(batch: Batch, data: PyTree) -> PyTree:
            alone = jax.tree.map(lambda x, c: x[None] if c else x, batch, self.cut)
            data = jax.tree.map(lambda x: x[None], data)
            pull = linearize(self.outputs_of, self.fisher.params, alone).pull
            return fn(lambda unit: self._row(pull, data, unit), self.units())

        batch = jax.tree.map(lambda x, c: take(x) if c else x, self.batch, self.cut)
        data = jax.tree.map(take, [term.data for term in self.terms])
        axes = jax.tree.map(lambda is_cut: 0 if is_cut else None, self.cut)
        return jax.vmap(on_example, in_axes=(axes, 0))(batch, data)

    def outputs_of(self, params: Params, batch: Batch) -> list[Outputs]:
        """The outputs of the terms."""
        outputs = self.fisher.model_fn(params, batch)
        parts = metric.split(self.fisher.likelihood, outputs)
        return [parts[term.place] for term in self.terms]

    def cotangents(self, data: Sequence[Any], unit: Array) -> list[PyTree]:
        """√μ B u for the same u in every example of `data`, the mean not subtracted."""
        parts = unravel_real(unit, [term.unit for term in self.terms])
        cotangents = []
        for term, (out, mu, scores), part in zip(self.terms, data, parts, strict=True):
            part = jax.tree.map(functools.partial(_repeat, len(mu)), part)
            if term.likelihood.centered:
                cotangents.append((jnp.sqrt(mu) * part).astype(out.dtype))
                continue
            alone = metric.OutputMetric(term.likelihood, out, (mu,), scores)
            cotangents.append(alone.sqrt_rmatvec(part))
        return cotangents

    def _row(self, pull: Callable, data: Sequence[Any], unit: Array) -> Params:
        cotangents = self.cotangents(data, unit)
        row = pull(cotangents)
        # Row by row: from a product of rows the mean would come off as a difference of
        # large numbers.
        for term, cotangent in zip(self.terms, cotangents, strict=True):
            if term.means:
                total = jnp.sum(tree.widen(cotangent))
                shares = (jnp.real(total), jnp.imag(total))
                for share, mean in zip(shares, term.means, strict=False):
                    row = tree.axpy(-share, mean, row)
        return row


def _repeat(count: int, leaf: Array) -> Array:
    return jnp.broadcast_to(leaf, (count, *leaf.shape[1:]))


def _row_groups(fisher: Fisher, *, with_means: bool = True) -> list[_Group]:
    """The examples by their number, with all that their rows depend on.

    Args:
      fisher: the Fisher.
      with_means: whether the mean is subtracted where F is a covariance.

    Raises:
      NoRowsError: at trace time, where the model cannot be run on single examples.
    """
    # Examples are taken one by one, so none may lie on a device of its own.
    params, batch, all_data = tree.replicate(
        (fisher.params, fisher.batch, _data_of_terms(fisher))
    )
    by_size: dict[int, list[_Term]] = {}
    for place, (kind, _) in enumerate(metric.terms(fisher.likelihood)):
        out, mu, _ = data = all_data[place]
        if mu.ndim == 0:
            raise NoRowsError(
                f"Rows of single examples need outputs with a leading axis of "
                f"examples: {kind!r} got outputs of one example without it. {_ADVICE}"
            )
        of_all = jax.eval_shape(tree.widen, out if fisher.kind == "exact" else mu)
        unit = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), of_all
        )
        means = _mean_rows(fisher, place) if kind.centered and with_means else ()
        by_size.setdefault(len(mu), []).append(_Term(place, kind, data, unit, means))
    fisher = dataclasses.replace(fisher, params=params)
    groups = [
        _Group(fisher, n, tuple(found), batch, jax.tree.map(Chunks(n, 1).cuts, batch))
        for n, found in by_size.items()
    ]
    for group in groups:
        _check_group(group)
    return groups


_ADVICE = "Use a solver on products, such as CG, which needs no rows."


def _data_of_terms(fisher: Fisher) -> list[tuple[Outputs, Array, PyTree | None]]:
    outputs = metric.split(fisher.likelihood, fisher.outputs)
    scores = [None] * len(outputs)
    if fisher.metric.scores is not None:
        scores = metric.split(fisher.likelihood, fisher.metric.scores)
    return list(zip(outputs, fisher.measure, scores, strict=True))


def _check_group(group: _Group) -> None:
    """Raises where the model cannot be run on one example of the group.

    Raises:
      NoRowsError: with the reason and what to do.
    """
    size, of_whom = group.size, [term.likelihood for term in group.terms]
    # A group of one example is the batch itself, whatever its leaves look like.
    if size > 1 and not any(jax.tree.leaves(group.cut)):
        raise NoRowsError(
            f"Rows of single examples need a leaf of `batch` to cut: none has a "
            f"leading axis of length {size}, the number of examples in the outputs of "
            f"{of_whom}. {_ADVICE}"
        )

    def first(leaf: Any, is_cut: bool = True) -> Any:
        shape = (1, *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype) if is_cut else leaf

    alone = jax.tree.map(first, group.batch, group.cut)
    try:
        got = jax.eval_shape(group.outputs_of, group.fisher.params, alone)
    except (TypeError, ValueError) as error:
        raise NoRowsError(
            f"`model_fn` fails on a batch of one example of {size} (every leaf with a "
            f"leading axis of length {size} cut to length 1). {_ADVICE}"
        ) from error
    expected = jax.tree.map(first, [term.data[0] for term in group.terms])
    shapes = [[x.shape for x in jax.tree.leaves(tree)] for tree in (got, expected)]
    if shapes[0] != shapes[1]:
        raise NoRowsError(
            f"`model_fn` must map a batch of one example to outputs of one example: "
            f"with every leaf of leading axis {size} cut to length 1, {of_whom} got "
            f"outputs of shapes {shapes[0]}, expected {shapes[1]}. {_ADVICE}"
        )


def _mean_rows(fisher: Fisher, place: int) -> tuple[Params, ...]:
    """J̄ᵀ 1, and J̄ᵀ i for complex outputs: a backward pass over the batch for each."""
    parts = metric.split(fisher.likelihood, fisher.outputs)
    measure = fisher.measure[place]

    def mean_row(unit: Any) -> Params:
        cotangents = [jax.tree.map(jnp.zeros_like, part) for part in parts]
        cotangents[place] = (unit * measure).astype(parts[place].dtype)
        row = fisher.pullback(metric.join(fisher.likelihood, cotangents))
        return tree.replicate(tree.divide(row, jnp.sum(measure)))

    is_complex = jnp.iscomplexobj(parts[place])
    return (mean_row(1.0), mean_row(1.0j)) if is_complex else (mean_row(1.0),)


def _by_example(group: _Group, parts: list[PyTree]) -> Any:
    """Real coefficients as `[N, K]`, in the order of the rows of an example.

    Args:
      group: the examples.
      parts: for each term of the likelihood a tree of real arrays `[p, N, ...]`, whose
        first axis counts the real and the imaginary part of a complex leaf.
    """
    leaves = jax.tree.leaves([parts[term.place] for term in group.terms])
    library = np if isinstance(leaves[0], np.ndarray) else jnp
    flat = [library.moveaxis(x, 0, 1).reshape(group.size, -1) for x in leaves]
    return library.concatenate(flat, axis=1)


def _order(fisher: Fisher, groups: list[_Group]) -> np.ndarray:
    """Where each entry of `ravel_real(A v)` is among rows by group and example."""
    start = 0

    def number(leaf: Array) -> np.ndarray:
        nonlocal start
        first, start = start, start + real_size(leaf)
        return np.arange(first, start).reshape(-1, *leaf.shape)

    coefficients = fisher.outputs
    if fisher.kind != "exact":
        coefficients = metric.join(fisher.likelihood, list(fisher.measure))
    parts = metric.split(fisher.likelihood, jax.tree.map(number, coefficients))
    places = [_by_example(group, parts).ravel() for group in groups]
    return np.argsort(np.concatenate(places))


def _permuted(matrix: Array, *orders: np.ndarray) -> Array:
    """The matrix with its first axes in these orders."""
    for axis, order in enumerate(orders):
        if np.any(order != np.arange(len(order))):
            matrix = jnp.take(matrix, order, axis)
    return matrix


# --- Rows block by block, verified.


def _flat_rows(rows: Array) -> Array:
    """One axis for examples and their rows; -1 fails where there are no entries."""
    return rows.reshape(math.prod(rows.shape[:2]), *rows.shape[2:])


def _all_rows(row: _Row, units: Array, probe: Array) -> tuple[Array, Array]:
    rows = jax.vmap(lambda unit: ravel_real(row(unit))[0].astype(units.dtype))(units)
    return rows, rows @ probe


def _from_rows(
    fisher: Fisher,
    fn: Callable[[_Row, Array, Array], tuple[PyTree, Array]],
    add: Callable[[Array, PyTree, Array, Array], Array],
    total: Array,
    *,
    otherwise: Callable[[], Array],
    finish: Callable[[Array, list[_Group]], Array] = lambda total, _: total,
    count: int | None = None,
    most: int | None = None,
) -> Array:
    """A sum over the rows of all examples where there are any that are right.

    Rows are right if A v is the same from them as from `fisher.sqrt_matvec`, to
    round-off, for a v with random signs. Nothing is asked of the values of outputs:
    those of a model that mixes its examples can be the same for one example alone.

    Args:
      fisher: the Fisher.
      fn: `fn(row, units, probe)` for one example: some result, and its rows times
        `probe`, `[K]`.
      add: `add(total, results, place, is_new)` with the results of a block of examples,
        the place of its first row among all rows, and which of its examples were in no
        block before.
      total: where to start.
      otherwise: the same without rows, for any model.
      finish: what to do with the sum.
      count: examples in a block; None for `_BLOCK_ROWS` rows.
      most: rows of an example with which it is still worth it; None for any.
    """
    try:
        groups = _row_groups(fisher)
    except NoRowsError:
        return otherwise()
    if most is not None and any(group.rows_per_example > most for group in groups):
        return otherwise()
    probe, truth = _probe(fisher)
    is_right, first = jnp.asarray(True), 0
    for group in groups:
        num_rows = group.rows_per_example
        size = _even_block(group, count or _BLOCK_ROWS // max(1, num_rows))

        def step(
            carry: tuple[Array, Array],
            block: Array | int,
            group: _Group = group,
            size: int = size,
            first: int = first,
        ) -> tuple[tuple[Array, Array], None]:
            total, pushed = carry
            start = jnp.minimum(block * size, group.size - size)
            results, part = group.map(
                lambda row, units: fn(row, units, probe), start, size
            )
            pushed = jax.lax.dynamic_update_slice(pushed, part, (start, 0))
            is_new = start + jnp.arange(size) >= block * size
            place = first + start * group.rows_per_example
            return (add(total, results, place, is_new), pushed), None

        carry = (total, jnp.zeros((group.size, num_rows), probe.dtype))
        if size == group.size:
            carry, _ = step(carry, 0)
        else:
            carry, _ = jax.lax.scan(step, carry, jnp.arange(-(-group.size // size)))
        total, pushed = carry
        is_right &= _agrees(fisher, group, pushed, truth)
        first += group.size * num_rows
    total = finish(total, groups)
    return jax.lax.cond(is_right, lambda: total, otherwise)


def _even_block(group: _Group, count: int) -> int:
    """Examples in a block: at most `count`, and as many in each block.

    The last one overlaps its neighbour, so that there is one loop body to compile.
    """
    num_blocks = -(-group.size // max(1, count))
    return -(-group.size // num_blocks)


def _probe(fisher: Fisher) -> tuple[Array, list[PyTree]]:
    """A vector v with random signs; and A v for every term, from the whole batch.

    Rows may be wrong for some parameters only, as for those before a normalisation, and
    these must not be hidden by others to which the outputs are more sensitive. So the
    entries of v are, leaf by leaf, the inverse of the sensitivity of A to the leaf:
    E (Aᵀu)ⱼ² = Fⱼⱼ for random signs u.
    """
    dtype = _dtype(fisher)
    shapes = jax.eval_shape(fisher.sqrt_matvec, fisher.params)
    signs = unravel_real(_signs(real_size(shapes), dtype), shapes)
    leaves, structure = jax.tree.flatten(fisher.sqrt_rmatvec(signs))
    norms = [
        tree.norm(leaf).astype(dtype) / max(1, leaf.size) ** 0.5 for leaf in leaves
    ]
    sizes = jnp.stack([jnp.zeros((), dtype), *norms])
    largest = jnp.max(sizes)
    largest = jnp.where(largest > 0, largest, 1)
    # One that is round-off, or zero, may not outweigh all others.
    least = float(jnp.finfo(dtype).eps) ** 0.25
    scales = 1 / jnp.maximum(sizes / largest, least)
    signs = unravel_real(_signs(real_size(leaves), dtype), leaves)
    scaled = [tree.scale(scales[1 + i], leaf) for i, leaf in enumerate(signs)]
    vector = jax.tree.unflatten(structure, scaled)
    truth = tree.replicate(fisher.sqrt_matvec(vector))
    truth = jax.tree.map(lambda leaf: jnp.stack(real_parts(leaf)), truth)
    return ravel_real(scaled)[0].astype(dtype), metric.split(fisher.likelihood, truth)


def _signs(count: int, dtype: Any) -> Array:
    """Always the same pseudorandom signs: an integer hash costs no loop to compile."""
    bits = jnp.arange(count, dtype=jnp.uint32)
    for multiplier in (0x7FEB352D, 0x846CA68B):
        bits = (bits ^ (bits >> 16)) * jnp.uint32(multiplier)
    return 1 - 2 * (bits >> 31).astype(dtype)


def _agrees(fisher: Fisher, group: _Group, pushed: Array, truth: list[PyTree]) -> Array:
    """Whether A v from the rows, `[N, K]`, is the true one, for every term."""
    leaves = (*jax.tree.leaves(fisher.params), *jax.tree.leaves(fisher.outputs))
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)
    if jax.default_backend() != "cpu" and eps > jnp.finfo(jnp.float64).eps:
        # Accelerators round the factors of float32 products to TensorFloat-32 or
        # bfloat16, and not in the same way for one example as for many.
        eps = max(eps, float(jnp.finfo(jnp.bfloat16).eps))
    expected = _by_example(group, truth).astype(pushed.dtype)
    is_right, start = jnp.asarray(True), 0
    for term in group.terms:
        stop = start + real_size(term.unit)
        error = jnp.linalg.norm((pushed - expected)[:, start:stop])
        size = jnp.linalg.norm(expected[:, start:stop])
        # Rows that are not finite although the truth is are wrong as well.
        is_right &= (error <= eps**0.5 * size) | ~jnp.isfinite(size)
        start = stop
    return is_right


# --- The Gram matrix from rows.


def _gram_by_blocks(groups: list[_Group], count: int | None, dtype: Any) -> Array:
    """A Aᵀ by pairs of blocks of examples, in the order of the groups.

    The rows of the second block are made again for every first one: with m rows in a
    block that costs about 4mP against the 2m²P of the product.
    """
    row_bytes = real_size(groups[0].fisher.params) * dtype.itemsize
    num_rows = min(_BLOCK_ROWS, _MEMORY // max(1, 2 * row_bytes))
    counts = [group.rows_per_example for group in groups]
    sizes = [
        _even_block(group, count or num_rows // max(1, each))
        for group, each in zip(groups, counts, strict=True)
    ]
    num_blocks = [-(-g.size // size) for g, size in zip(groups, sizes, strict=True)]
    totals = [g.size * each for g, each in zip(groups, counts, strict=True)]
    ends = np.cumsum(totals).tolist()

    def rows_of(i: int, block: Array | int) -> tuple[Params, Array]:
        """The rows of a block, and the place of its first one."""
        group = groups[i]
        start = jnp.minimum(block * sizes[i], group.size - sizes[i])
        rows = group.map(lambda row, units: jax.vmap(row)(units), start, sizes[i])
        return jax.tree.map(_flat_rows, rows), ends[i] - (group.size - start) * counts[
            i
        ]

    def against(i: int, j: int, matrix: Array) -> Array:
        """Fills in the products of two groups."""

        def add_row(block: Array | int, matrix: Array) -> Array:
            left, here = rows_of(i, block)

            def add_pair(other: Array | int, matrix: Array) -> Array:
                is_one = i == j and num_blocks[i] == 1
                right, there = (left, here) if is_one else rows_of(j, other)
                product = _products(left, right, dtype)
                matrix = jax.lax.dynamic_update_slice(matrix, product, (here, there))
                transposed = product.T
                return jax.lax.dynamic_update_slice(matrix, transposed, (there, here))

            if num_blocks[j] == 1:
                return add_pair(0, matrix)
            stop = block + 1 if i == j else num_blocks[j]
            return jax.lax.fori_loop(0, stop, add_pair, matrix)

        if num_blocks[i] == 1:  # one turn needs no loop to be compiled
            return add_row(0, matrix)
        return jax.lax.fori_loop(0, num_blocks[i], add_row, matrix)

    matrix = jnp.zeros((ends[-1], ends[-1]), dtype)
    for i in range(len(groups)):
        for j in range(i + 1):
            matrix = against(i, j, matrix)
    return matrix


def _products(left: Params, right: Params, dtype: Any) -> Array:
    """Re ⟨rowᵢ, rowⱼ⟩ for all rows of both."""
    total: Any = 0
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    for x_leaf, y_leaf in pairs:
        for x, y in zip(real_parts(x_leaf), real_parts(y_leaf), strict=True):
            # Over all axes of the parameter: flattened, a sharded one would move.
            axes = range(1, x.ndim)
            total += tree.contract(x, y, axes, axes).astype(dtype)
    return total


# --- The Gram matrix from the outer products of dense layers.


def _gram_by_layers(fisher: Fisher, dtype: Any) -> Array | None:
    """A Aᵀ without the rows of dense layers, which are outer products.

        ⟨a ⊗ δ, a' ⊗ δ'⟩ = ⟨a, a'⟩ ⟨δ, δ'⟩

    Returns:
      None where rows are no such products, or do not fit into memory.
    """
    values = (fisher.params, fisher.outputs)
    if fisher.chunks is not None or any(map(jnp.iscomplexobj, jax.tree.leaves(values))):
        return None
    # A square matrix has the fewest inputs and outputs for as many entries.
    if not any(
        leaf.ndim > 1 and leaf.size > 4 * math.isqrt(leaf.size) + _PASS
        for leaf in jax.tree.leaves(fisher.params)
    ):
        return None
    groups = _row_groups(fisher, with_means=False)
    group = groups[0]
    measures = [term.data[1] for term in group.terms if term.likelihood.centered]
    if len(groups) > 1 or (measures and len(group.terms) > 1):
        return None
    layers: list[Layer] = []

    def rows_fn() -> tuple[list[tuple[Array, Array]], Array]:
        return _factored_rows(fisher, group, layers, dtype)

    shapes = jax.tree.leaves(jax.eval_shape(rows_fn))
    num_bytes = sum(x.size * x.dtype.itemsize for x in shapes)
    if not layers or num_bytes > _MEMORY:
        return None
    root = jnp.sqrt(measures[0]).astype(dtype).ravel() if measures else None
    order = _order(fisher, groups)
    return _permuted(_factored_gram(*rows_fn(), root), order, order)


def _is_large(m: int, n: int) -> bool:
    """Whether outer products are cheaper than the rows of an m times n weight."""
    return m * n > 2 * (m + n) + _PASS


def _factored_rows(
    fisher: Fisher, group: _Group, layers: list[Layer], dtype: Any
) -> tuple[list[tuple[Array, Array]], Array]:
    """The rows of all examples, those of dense layers as outer products.

    Args:
      fisher: the Fisher.
      group: its only group.
      layers: takes the layers that are found.
      dtype: of the rows.

    Returns:
      For each layer its inputs a `[N, m]`, with a one in front where it has a bias, and
      δ `[N, K, n]`; and all other entries of the rows, `[N·K, rest]`.
    """
    data = _data_of_terms(fisher)

    def on_unit(unit: Array) -> tuple[list[Array], list[Array]]:
        cotangents = metric.join(fisher.likelihood, group.cotangents(data, unit))
        found, values, _ = backward_pass(fisher.pullback, cotangents, fisher.params)
        # A layer that is used at several places of an example is a sum of products.
        used = [
            (layer, one)
            for layer, one in zip(found, values, strict=True)
            if len(one.inputs) == group.size
            and _is_large(layer.num_inputs, layer.num_outputs)
        ]
        layers[:] = [layer for layer, _ in used]
        return [one.inputs for _, one in used], [one.cotangents for _, one in used]

    # The inputs are the same for all coefficients.
    inputs, deltas = jax.vmap(on_unit, out_axes=(None, 1))(group.units())
    outer = []
    for layer, a, delta in zip(layers, *tree.replicate((inputs, deltas)), strict=True):
        ones = [] if layer.bias is None else [jnp.ones((len(a), 1), a.dtype)]
        a = jnp.concatenate([*ones, a], axis=1)
        outer.append((a.astype(dtype), delta.astype(dtype)))
    claimed = {place for layer in layers for place in (layer.weight, layer.bias)}

    def rest_of(row: _Row, units: Array) -> Array:
        rows = jax.tree.leaves(jax.vmap(row)(units))
        rest = [x for place, x in enumerate(rows) if place not in claimed]
        parts = [x.reshape(len(units), -1).astype(dtype) for x in rest]
        return jnp.concatenate([jnp.zeros((len(units), 0), dtype), *parts], axis=1)

    rest = group.map(rest_of, 0, group.size)
    return outer, _flat_rows(rest)


def _factored_gram(
    outer: list[tuple[Array, Array]], rest: Array, root: Array | None
) -> Array:
    """A Aᵀ, `[N·K, N·K]`, of the rows that `_factored_rows` returns.

    Args:
      outer, rest: the rows of A itself, or of √μ J where F is a covariance: less their
        mean they are the rows of A, aᵢ = rowᵢ - √μᵢ Σⱼ √μⱼ rowⱼ / Σ μ.
      root: √μ, `[N·K]`, where F is a covariance; else None.
    """
    if root is None:
        gram = _inner(rest)
        for a, delta in outer:
            count, units, _ = delta.shape
            of_delta = _inner(delta.reshape(count * units, -1))
            of_delta = of_delta.reshape(count, units, count, units)
            gram += (_inner(a)[:, None, :, None] * of_delta).reshape(gram.shape)
        return gram
    total = root @ root
    gram = _inner(rest - jnp.outer(root, root @ rest / total))
    products = jnp.zeros_like(gram)
    for a, delta in outer:
        a = jnp.repeat(a, delta.shape[1], axis=0)
        products += _centred_products(a, delta.reshape(len(a), -1), root)
    # These are of rows less √μ c for some c near the mean. With s = √μ, X for them and
    # y = X s / Σμ - s (sᵀ X s) / (2 (Σμ)²), what is left of the mean comes off by
    # (I - s sᵀ/Σμ) X (I - s sᵀ/Σμ) = X - s yᵀ - y sᵀ, where little is left to cancel.
    mean = products @ root / total
    correction = mean - root * (root @ mean) / (2 * total)
    return gram + products - jnp.outer(root, correction) - jnp.outer(correction, root)


def _centred_products(a: Array, delta: Array, root: Array) -> Array:
    """⟨rowᵢ - √μᵢ c, rowⱼ - √μⱼ c⟩ of rows aᵢ ⊗ δᵢ, `[M, M]`, for a certain c.

    The mean row may be far longer than what the rows have beside it, and subtracted
    from their products it would cost digits. c = ā ⊗ δ̄ is most of it, with the weighted
    means ā = Σ μ a / Σ μ and δ̄ = Σ √μ δ / Σ μ. With x = a - ā and y = δ - √μ δ̄,

        a ⊗ δ - √μ ā ⊗ δ̄ = x ⊗ δ + ā ⊗ y,

    where no large terms cancel; and likewise in its products

        ⟨x, x'⟩⟨δ, δ'⟩ + ⟨x, ā⟩⟨δ, y'⟩ + ⟨ā, x'⟩⟨y, δ'⟩ + ⟨ā, ā⟩⟨y, y'⟩.

    Those with δ follow from ⟨y, y'⟩ and q = ⟨y, δ̄⟩ by δ = y + √μ δ̄.
    """
    total = root @ root
    a_mean, delta_mean = root**2 @ a / total, root @ delta / total
    x, y = a - a_mean[None], delta - jnp.outer(root, delta_mean)
    q = y @ delta_mean
    yy = _inner(y)
    delta_y = yy + jnp.outer(root, q)
    square = delta_mean @ delta_mean
    delta_delta = delta_y + jnp.outer(q, root) + square * jnp.outer(root, root)
    cross = (x @ a_mean)[:, None] * delta_y
    return _inner(x) * delta_delta + cross + cross.T + (a_mean @ a_mean) * yy


def _inner(rows: Array) -> Array:
    return tree.contract(rows, rows, (1,), (1,))
