"""Rows of the root A of the Fisher, F = Aᵀ A, one example at a time.

    row of A for the coefficient e of example n:    Jₙᵀ (√μₙ Bₙ e)

minus √μₙ J̄ᵀ e where F is a covariance. A row is a backward pass through the model on
example n alone, which is a row of A only if the model does not mix its examples; so
everything built from rows has to be verified. All in real coordinates, in which real,
complex and mixed trees are one case. Sits above `Fisher`, and knows no matrices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ngd_jax import placement, tree
from ngd_jax.coordinates import real_size, unravel_real
from ngd_jax.fisher import Fisher
from ngd_jax.jacobian import linearize
from ngd_jax.metric import OutputMetric, join, split, terms
from ngd_jax.microbatches import Chunks, part_of
from ngd_jax.types import Array, Batch, Outputs, Params, PyTree

__all__ = [
    "BLOCK_ROWS",
    "Group",
    "NoRowsError",
    "Row",
    "Term",
    "coefficient_shapes",
    "flat_rows",
    "groups_of",
    "loop",
    "order_of",
    "permuted",
    "precision",
    "working_dtype",
]

# Rows in a block: wide enough for matrix products at full speed, narrow enough that the
# symmetry of the Gram matrix saves most of half the work.
BLOCK_ROWS = 256
_ADVICE = "Use a solver on products, such as CG, which needs no rows."


def working_dtype(fisher: Fisher) -> jnp.dtype:
    """The dtype of rows and dense forms: float32 or wider."""
    return tree.accumulator_dtype((fisher.params, fisher.outputs))


def coefficient_shapes(fisher: Fisher) -> PyTree:
    """The shapes and dtypes of what `fisher.sqrt_matvec` returns."""
    return jax.eval_shape(fisher.metric.sqrt_matvec, fisher.outputs)


def precision(fisher: Any) -> float:
    """ε of the narrowest dtype of parameters and outputs."""
    leaves = jax.tree.leaves((fisher.params, fisher.outputs))
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)


# --- Rows of single examples.


class NoRowsError(ValueError):
    """The model cannot be run on single examples."""


class Term(NamedTuple):
    """One term of the likelihood.

    Attributes:
      place: its index among all terms.
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

    def cotangents(self, data: Any, unit: PyTree) -> PyTree:
        """√μ B u for the same u in every example of `data`, the mean not subtracted."""
        out, mu, scores = data
        shape = mu.shape[:1]
        unit = jax.tree.map(lambda x: jnp.broadcast_to(x, shape + x.shape[1:]), unit)
        if self.likelihood.centered:
            return (jnp.sqrt(mu) * unit).astype(out.dtype)
        return OutputMetric(self.likelihood, out, (mu,), scores).sqrt_rmatvec(unit)


# From the real coefficients of one example to its row, as a tree like the parameters.
Row = Callable[[Array], Params]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Terms with equally many examples, and the way to the rows of each example.

    To run the model on example n, all leaves of the batch whose leading axis has that
    length are cut to it, and all others stay whole. So blocks of a `Product` may have
    their own batches.

    Attributes:
      fisher: the Fisher.
      size: the number of examples.
      first: the place of its first row among those of all groups.
      terms: the terms that have these examples.
      num_parts: how many equal parts of the examples are on devices of their own, by
        the placement of the arrays.
    """

    fisher: Fisher
    size: int
    first: int
    terms: tuple[Term, ...]
    num_parts: int = 1

    @functools.cached_property
    def cut(self) -> PyTree:
        """For every leaf of the batch, whether it is cut."""
        return jax.tree.map(Chunks(self.size, 1).cuts, self.fisher.batch)

    @property
    def rows_per_example(self) -> int:
        """Real coefficients of an example."""
        return real_size([term.unit for term in self.terms])

    def units(self) -> Array:
        """All unit vectors of the coefficients of an example."""
        return jnp.eye(self.rows_per_example, dtype=working_dtype(self.fisher))

    def blocks(self, count: int | None, num_rows: int = BLOCK_ROWS) -> tuple[int, int]:
        """The number of examples in every block, at most `count`, and of blocks.

        Up to twice as many blocks as are needed, if they are then of one size. If not,
        the last one overlaps its neighbour, so that there is one loop body to compile.

        Args:
          count: None for as many as have `num_rows` rows. Of divided examples, a block
            has at least one from each part.
          num_rows: see `count`.
        """
        count = count or max(1, num_rows // max(1, self.rows_per_example))
        length = self.size // self.num_parts
        least = -(-length // max(1, count // self.num_parts))
        # Of parts, every block has equally many examples, whatever the number of them.
        most = 2 * least if self.num_parts == 1 else length
        even = (n for n in range(least, most + 1) if length % n == 0)
        num_blocks = next(even, least)
        return self.num_parts * -(-length // num_blocks), num_blocks

    def examples(self, size: int) -> np.ndarray:
        """The examples in the order of the rows of blocks of that size.

        Even blocks take one example from each of `size` equal parts of the batch. So
        every device that has a part of it works on every block.
        """
        order = np.arange(self.size)
        return order if self.size % size else order.reshape(size, -1).T.ravel()

    def map(
        self, fn: Callable[[Row, Array], PyTree], block: Array | int, size: int
    ) -> tuple[Array, Array, PyTree]:
        """`fn(row, units)` for all examples of a block, under `vmap`.

        Returns:
          The place of its first row among those of all groups; which of its examples
          were in no block before; the results.
        """
        start = jnp.minimum(block * size, self.size - size)

        def take(leaf: Any) -> Array:
            if self.size % size:
                return jax.lax.dynamic_slice_in_dim(leaf, start, size)
            return part_of(leaf, size, block)

        def on_example(batch: Batch, data: PyTree) -> PyTree:
            alone = jax.tree.map(lambda x, c: x[None] if c else x, batch, self.cut)
            data = jax.tree.map(lambda x: x[None], data)
            pull = linearize(self.outputs_of, self.fisher.params, alone).pull
            return fn(lambda unit: self._row(pull, data, unit), self.units())

        whole = self.fisher.batch
        batch = jax.tree.map(lambda x, c: take(x) if c else x, whole, self.cut)
        data = jax.tree.map(take, [term.data for term in self.terms])
        axes = jax.tree.map(lambda is_cut: 0 if is_cut else None, self.cut)
        results = jax.vmap(on_example, in_axes=(axes, 0))(batch, data)
        is_new = start + jnp.arange(size) >= block * size
        return self.first + start * self.rows_per_example, is_new, results

    def outputs_of(self, params: Params, batch: Batch) -> list[Outputs]:
        """The outputs of the terms."""
        outputs = self.fisher.model_fn(params, batch)
        parts = split(self.fisher.likelihood, outputs)
        return [parts[term.place] for term in self.terms]

    def cotangents(self, data: Sequence[Any], unit: Array) -> list[PyTree]:
        """`Term.cotangents` of each term; u in real coordinates."""
        parts = unravel_real(unit, [term.unit for term in self.terms])
        parts = zip(self.terms, data, parts, strict=True)
        return [term.cotangents(one, part) for term, one, part in parts]

    def _row(self, pull: Callable, data: Sequence[Any], unit: Array) -> Params:
        cotangents = self.cotangents(data, unit)
        row = pull(cotangents)
        # Row by row: subtracting the mean from a product of rows would be a difference
        # of large numbers.
        for term, cotangent in zip(self.terms, cotangents, strict=True):
            if term.means:
                total = jnp.sum(tree.widen(cotangent))
                shares = (jnp.real(total), jnp.imag(total))
                for share, mean in zip(shares, term.means, strict=False):
                    row = tree.axpy(-share, mean, row)
        return row


def groups_of(fisher: Fisher, sharding: NamedSharding | None = None) -> list[Group]:
    """The terms by their number of examples, with all that their rows depend on.

    Args:
      fisher: the Fisher.
      sharding: mesh axes that divide the examples of a block. None leaves it to XLA; on
        explicit mesh axes, those that divide the outputs.

    Raises:
      NoRowsError: at trace time, where the model cannot be run on single examples.
      ValueError: at trace time, for examples that `sharding` does not divide.
    """
    shapes = split(fisher.likelihood, coefficient_shapes(fisher))
    by_size: dict[int, list[Term]] = {}
    for place, (kind, _) in enumerate(terms(fisher.likelihood)):
        _, mu, _ = data = fisher.metric.data[place]
        if mu.ndim == 0:
            raise NoRowsError(
                f"Rows of single examples need outputs with a leading axis of "
                f"examples: {kind!r} got outputs of one example without it. {_ADVICE}"
            )
        unit = jax.tree.map(_first, shapes[place])
        means = _mean_rows(fisher, place) if kind.centered else ()
        term = Term(place, kind, data, unit, means)
        by_size.setdefault(len(mu), []).append(term)
    fisher = dataclasses.replace(fisher, params=tree.replicate(fisher.params))
    groups, first = [], 0
    for size, found in by_size.items():
        group = _placed(Group(fisher, size, first, tuple(found)), sharding)
        groups.append(group)
        first += size * group.rows_per_example
    return groups


def _placed(group: Group, sharding: NamedSharding | None) -> Group:
    """The group with its examples divided over devices, or taken one by one."""

    def with_parts(where: NamedSharding | None) -> Group:
        def put(leaf: Any, is_cut: bool) -> Any:
            if where is None or not is_cut:
                return tree.replicate(leaf)
            return placement.place(leaf, where, placement.axes_of(where))

        batch = jax.tree.map(put, group.fisher.batch, group.cut)
        found = [
            term._replace(data=jax.tree.map(lambda x: put(x, True), term.data))
            for term in group.terms
        ]
        return dataclasses.replace(
            group,
            fisher=dataclasses.replace(group.fisher, batch=batch),
            terms=tuple(found),
            num_parts=placement.num_parts(where),
        )

    alone = with_parts(None)
    _check_group(alone)
    if sharding is not None:
        if group.size % placement.num_parts(sharding):
            raise ValueError(
                f"`sharding` must divide the examples into equal parts, got "
                f"{group.size} examples for {placement.num_parts(sharding)} devices."
            )
        return with_parts(sharding)
    sharding = tree.first_axis_sharding(group.terms[0].data[0])
    if sharding is None:
        return alone
    divided = with_parts(sharding)
    try:
        jax.eval_shape(
            lambda: divided.map(lambda row, units: jax.vmap(row)(units), 0, group.size)
        )
    except Exception:  # noqa: BLE001  # JAX's error about shardings is not public
        # A model that names the placement of its arrays may not run on single examples
        # of several devices. Then every device computes all of them.
        return alone
    return divided


def _first(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of the first example."""
    return jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)


def _check_group(group: Group) -> None:
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
    batch = group.fisher.batch
    alone = jax.tree.map(lambda x, c: _first(x) if c else x, batch, group.cut)
    try:
        got = jax.eval_shape(group.outputs_of, group.fisher.params, alone)
    except (TypeError, ValueError) as error:
        raise NoRowsError(
            f"`model_fn` fails on a batch of one example of {size} (every leaf with a "
            f"leading axis of length {size} cut to length 1). {_ADVICE}"
        ) from error
    expected = jax.tree.map(_first, [term.data[0] for term in group.terms])
    shapes = [[x.shape for x in jax.tree.leaves(tree)] for tree in (got, expected)]
    if shapes[0] != shapes[1]:
        raise NoRowsError(
            f"`model_fn` must map a batch of one example to outputs of one example: "
            f"with every leaf of leading axis {size} cut to length 1, {of_whom} got "
            f"outputs of shapes {shapes[0]}, expected {shapes[1]}. {_ADVICE}"
        )


def _mean_rows(fisher: Fisher, place: int) -> tuple[Params, ...]:
    """J̄ᵀ 1, and J̄ᵀ i for complex outputs: a backward pass over the batch for each."""
    parts = split(fisher.likelihood, fisher.outputs)
    measure = fisher.measure[place]

    def mean_row(unit: Any) -> Params:
        cotangents = [jax.tree.map(jnp.zeros_like, part) for part in parts]
        cotangents[place] = (unit * measure).astype(parts[place].dtype)
        row = fisher.pullback(join(fisher.likelihood, cotangents))
        return tree.replicate(tree.divide(row, jnp.sum(measure)))

    is_complex = jnp.iscomplexobj(parts[place])
    return (mean_row(1.0), mean_row(1.0j)) if is_complex else (mean_row(1.0),)


# --- Many rows.


def loop(count: Array | int, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`carry = step(i, carry)` for i below `count`."""
    if isinstance(count, int) and count == 1:  # one turn needs no loop to be compiled
        return step(0, carry)
    return jax.lax.fori_loop(0, count, step, carry)


def flat_rows(rows: Array) -> Array:
    """One axis for examples and their rows; -1 fails where there are no entries."""
    return rows.reshape(math.prod(rows.shape[:2]), *rows.shape[2:])


def order_of(fisher: Fisher, groups: list[Group], sizes: list[int]) -> np.ndarray:
    """Where each entry of `ravel_real(A v)` is among rows by group and block.

    Args:
      fisher: the Fisher.
      groups: its groups.
      sizes: the number of examples in the blocks of each.
    """
    start = 0

    def number(leaf: Any) -> np.ndarray:
        nonlocal start
        first, start = start, start + real_size(leaf)
        return np.arange(first, start).reshape(-1, *leaf.shape)

    numbers = jax.tree.map(number, coefficient_shapes(fisher))
    parts = split(fisher.likelihood, numbers)
    places = []
    for group, size in zip(groups, sizes, strict=True):
        # `[p, N, ...]`, where p counts the real and the imaginary part of a leaf.
        leaves = jax.tree.leaves([parts[term.place] for term in group.terms])
        by_example = [np.moveaxis(x, 0, 1).reshape(group.size, -1) for x in leaves]
        by_example = np.concatenate(by_example, axis=1)
        places.append(by_example[group.examples(size)].ravel())
    return np.argsort(np.concatenate(places))


def permuted(matrix: Array, *orders: np.ndarray) -> Array:
    """The matrix with its first axes in these orders."""
    for axis, order in enumerate(orders):
        if np.any(order != np.arange(len(order))):
            matrix = jnp.take(matrix, order, axis)
    return matrix
