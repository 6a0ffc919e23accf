"""Rows of the square root A of the Fisher, F = Aᵀ A, one example at a time.

    Aᵀ e = Jₙᵀ (√μₙ Bₙ e),    Hₙ = Bₙ Bₙᵀ,    less √μₙ J̄ᵀ e where F is a covariance

for every unit coefficient e of example n. A row is the pullback through the model on
example n alone, which is a row of the full A only where outputs are separable over
examples. Whether they are is seen by value: the outputs of single examples, which come
out of the same linearisation as their rows, are held against those of the batch.

Examples are counted by the leading axes of the outputs. Terms of the likelihood whose
examples are equally many form a group; to run the model on one example of a group, all
leaves of the batch whose leading axis is as long are cut to that example, and all
others stay whole. Blocks of a `Product` may so have batches of their own.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ngd_jax import tree
from ngd_jax.fisher import average, root
from ngd_jax.fisher.coefficients import real_size, unravel_real
from ngd_jax.fisher.linearization import Chunks, Linearization, linearize
from ngd_jax.types import Array, Batch, Outputs, Params, PyTree

if TYPE_CHECKING:
    from ngd_jax.fisher.operator import Fisher

__all__ = [
    "Group",
    "NoRowsError",
    "agreement",
    "coefficient_order",
    "diagonal_from_rows",
    "row_groups",
]

# Examples whose rows the diagonal holds at once: each needs a parameter-sized vector.
_CHUNK = 16


class NoRowsError(ValueError):
    """The model cannot be run on single examples."""


class TermData(NamedTuple):
    """What the rows of a term need to know of its examples, all with leading axis n."""

    outputs: Outputs
    measure: Array
    scores: PyTree | None


class Term(NamedTuple):
    """One term of the likelihood.

    Attributes:
      place: which it is among all terms.
      likelihood: its likelihood.
      data: what belongs to its examples.
      coefficients: the coefficients of its examples, as shapes and dtypes.
      means: where F is a covariance, the mean rows that are subtracted, for real and
        for imaginary coefficients, or none of them; None where it is not.
    """

    place: int
    likelihood: Any
    data: TermData
    coefficients: PyTree
    means: tuple[Params, ...] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The examples that one leading axis counts, and how to get their rows.

    Attributes:
      fisher: whose rows.
      size: the number of examples.
      terms: the terms of the likelihood that have these examples.
      cut: for every leaf of the batch, whether it is cut.
    """

    fisher: "Fisher"
    size: int
    terms: tuple[Term, ...]
    cut: PyTree

    @property
    def rows_per_example(self) -> int:
        """Real coefficients of an example; complex ones count twice."""
        total = sum(real_size(term.coefficients) for term in self.terms)
        return total // self.size

    @property
    def data(self) -> tuple[Batch, tuple[TermData, ...]]:
        """All examples, for `map` and `take`."""
        return self.fisher.batch, tuple(term.data for term in self.terms)

    def take(self, start: Array | int, count: int) -> PyTree:
        """The `data` of `count` examples from `start` on."""

        def cut(leaf: Any) -> Any:
            return jax.lax.dynamic_slice_in_dim(leaf, start, count)

        batch, terms = self.data
        batch = jax.tree.map(lambda x, c: cut(x) if c else x, batch, self.cut)
        return batch, jax.tree.map(cut, terms)

    def map(
        self,
        fn: Callable[[Callable[[Array], Params], Array], PyTree],
        data: PyTree,
    ) -> tuple[list[Array], PyTree]:
        """Calls `fn(row, units)` for every example in `data`, under `vmap`.

        Args:
          fn: gets `row`, from a real vector of coefficients u of one example to Aᵀ u,
            and all units as the rows of an identity matrix.
          data: from `take`.

        Returns:
          How far, at most, the outputs of single examples are from those of the batch,
          for every leaf; and the results of `fn` with a leading axis of examples.
        """
        axes = jax.tree.map(lambda is_cut: 0 if is_cut else None, self.cut)

        def on_example(batch: Batch, terms: tuple[TermData, ...]) -> PyTree:
            terms = jax.tree.map(lambda x: x[None], terms)
            linearization = self._linearize(batch)
            apart = jax.tree.map(
                lambda x, y: jnp.max(jnp.abs(x - y), initial=0),
                jax.tree.leaves(linearization.outputs),
                jax.tree.leaves([term.outputs for term in terms]),
            )
            result = fn(
                lambda unit: self._row(linearization, terms, unit),
                jnp.eye(self.rows_per_example, dtype=_dtype(self.fisher)),
            )
            return apart, result

        apart, result = jax.vmap(on_example, in_axes=(axes, 0))(*data)
        return [jnp.max(x) for x in apart], result

    def zero_apart(self) -> list[Array]:
        """What `map` says of no examples at all."""
        outputs = jax.tree.leaves([term.data.outputs for term in self.terms])
        return [jnp.zeros((), jnp.finfo(out.dtype).dtype) for out in outputs]

    def outputs_alone(self) -> PyTree:
        """Shapes of the outputs of one example, for each term."""
        batch = jax.tree.map(
            lambda x, c: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if c else x,
            self.fisher.batch,
            self.cut,
        )
        return jax.eval_shape(lambda batch: self._linearize(batch).outputs, batch)

    def _linearize(self, batch: Batch) -> Linearization:
        """The model on one example, its outputs those of the terms of this group."""
        fisher = self.fisher
        alone = jax.tree.map(lambda x, c: x[None] if c else x, batch, self.cut)

        def model_fn(params: Params, batch: Batch) -> list[Outputs]:
            parts = average.split(fisher.likelihood, fisher.model_fn(params, batch))
            return [parts[term.place] for term in self.terms]

        return linearize(model_fn, fisher.params, alone)

    def _row(
        self,
        linearization: Linearization,
        terms: Sequence[TermData],
        unit: Array,
    ) -> Params:
        """Aᵀ u for the coefficients u of one example, in a real vector."""
        like = [
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype),
                term.coefficients,
            )
            for term in self.terms
        ]
        parts = unravel_real(unit, like)
        cotangents, centres = [], []
        for term, data, part in zip(self.terms, terms, parts, strict=True):
            if term.means is None:
                cotangents.append(
                    root.cotangents_from_coefficients(
                        term.likelihood,
                        data.outputs,
                        part,
                        (data.measure,),
                        data.scores,
                    )
                )
                continue
            weighted = jnp.sqrt(data.measure) * part
            cotangents.append(weighted.astype(data.outputs.dtype))
            total = jnp.sum(weighted)
            shares = (jnp.real(total), jnp.imag(total))
            centres += list(zip(shares, term.means, strict=False))
        row = linearization.pull(cotangents)
        # Row by row: from the Gram matrix the mean would come off as a difference of
        # large numbers.
        for share, mean in centres:
            row = tree.axpy(-share, mean, row)
        return row


def row_groups(fisher: "Fisher", *, with_means: bool = False) -> list[Group]:
    """The examples of a Fisher by their number, with all that their rows need.

    Args:
      fisher: whose rows.
      with_means: where F is a covariance, whether rows keep their mean.

    Raises:
      NoRowsError: at trace time, where the model cannot be run on single examples,
        with what to do.
    """
    likelihood = fisher.likelihood
    outputs = average.split(likelihood, fisher.outputs)
    scores = [None] * len(outputs)
    if fisher.kind != "exact":
        scores = average.split(
            likelihood, average.score_terms(likelihood, fisher.outputs, fisher.targets)
        )
    by_size: dict[int, list[Term]] = {}
    for index, (kind, _) in enumerate(average.terms(likelihood)):
        data = TermData(outputs[index], fisher.measure[index], scores[index])
        if data.measure.ndim == 0:
            raise NoRowsError(
                f"Rows of single examples need outputs with a leading axis of "
                f"examples: {kind!r} got outputs of one example without it. {_ADVICE}"
            )
        coefficients = data.outputs if fisher.kind == "exact" else data.measure
        term = Term(
            place=index,
            likelihood=kind,
            data=data,
            coefficients=jax.eval_shape(tree.widen, coefficients),
            means=None,
        )
        if kind.centered:
            means = () if with_means else _mean_rows(fisher, index)
            term = term._replace(means=means)
        by_size.setdefault(data.measure.shape[0], []).append(term)
    return [_group(fisher, size, terms) for size, terms in by_size.items()]


_ADVICE = "Solvers on products, such as CG, have no need of rows."


def _group(fisher: "Fisher", size: int, terms: list[Term]) -> Group:
    chunks = Chunks(size, 1)
    cut = jax.tree.map(chunks.cuts, fisher.batch)
    # A group of one example is the batch itself, whatever its leaves look like.
    if size > 1 and not any(jax.tree.leaves(cut)):
        raise NoRowsError(
            f"Rows of single examples need a leaf of `batch` to cut: none has a "
            f"leading axis of length {size}, the number of examples in the outputs of "
            f"{terms[0].likelihood!r}. {_ADVICE}"
        )
    group = Group(fisher, size, tuple(terms), cut)
    try:
        alone = group.outputs_alone()
    except (TypeError, ValueError) as error:
        raise NoRowsError(
            f"`model_fn` fails on a batch of one example of {size} (every leaf with a "
            f"leading axis of length {size} cut to length 1). {_ADVICE}"
        ) from error
    for term, out in zip(terms, alone, strict=True):
        expected = [(1, *x.shape[1:]) for x in jax.tree.leaves(term.data.outputs)]
        got = [x.shape for x in jax.tree.leaves(out)]
        if got != expected:
            raise NoRowsError(
                f"`model_fn` must map a batch of one example to outputs of one "
                f"example: with every leaf of leading axis {size} cut to length 1, "
                f"{term.likelihood!r} got outputs of shapes {got}, expected "
                f"{expected}. {_ADVICE}"
            )
    return group


def _mean_rows(fisher: "Fisher", index: int) -> tuple[Params, ...]:
    """J̄ᵀ 1, and J̄ᵀ i for complex outputs: a backward pass over the batch for each."""
    parts = average.split(fisher.likelihood, fisher.outputs)
    measure = fisher.measure[index]

    def mean_row(unit: Any) -> Params:
        cotangents = [jax.tree.map(jnp.zeros_like, part) for part in parts]
        cotangents[index] = (unit * measure).astype(parts[index].dtype)
        row = fisher.pullback(average.join(fisher.likelihood, cotangents))
        return tree.divide(row, jnp.sum(measure))

    is_complex = jnp.iscomplexobj(parts[index])
    return (mean_row(1.0), mean_row(1.0j)) if is_complex else (mean_row(1.0),)


def agreement(groups: Sequence[Group], apart: Sequence[Sequence[Array]]) -> Array:
    """Whether outputs are the same alone and in the batch, to round-off.

    Args:
      groups: all groups of a Fisher.
      apart: for each group, what `Group.map` says of all its examples.
    """
    agree = jnp.asarray(True)
    for group, differences in zip(groups, apart, strict=True):
        outputs = jax.tree.leaves([term.data.outputs for term in group.terms])
        for out, difference in zip(outputs, differences, strict=True):
            leaves = (out, *jax.tree.leaves(group.fisher.params))
            narrow = max(_rounding(leaf.dtype) for leaf in leaves)
            largest = jnp.max(jnp.abs(out), initial=0)
            agree &= difference <= narrow**0.5 * largest
    return agree


def _rounding(dtype: Any) -> float:
    """The round-off of products in this dtype as JAX computes them by default."""
    eps = float(jnp.finfo(dtype).eps)
    if jax.default_backend() == "cpu" or eps < jnp.finfo(jnp.float32).eps:
        return eps
    # Accelerators round the factors of float32 products, to TensorFloat-32 or bfloat16,
    # and not in the same way for one example as for many.
    return max(eps, float(jnp.finfo(jnp.bfloat16).eps))


def diagonal_from_rows(fisher: "Fisher") -> tuple[Array, Array]:
    """diag(F), `[P]`, and whether the model is separable, so that it is right.

    Raises:
      NoRowsError: where there are no rows.
    """
    groups = row_groups(fisher)
    num_params, dtype = tree.size(fisher.params), tree.accumulator_dtype(fisher.params)

    def squares(row_of: Callable[[Array], Params], units: Array) -> Array:
        def add(total: Array, unit: Array) -> tuple[Array, None]:
            row, _ = ravel_pytree(row_of(unit))
            # ⟨eᵢ, Aᵀu⟩ with real inner products, whatever the parameters are.
            return total + jnp.real(row).astype(dtype) ** 2, None

        return jax.lax.scan(add, jnp.zeros(num_params, dtype), units)[0]

    total, apart = jnp.zeros(num_params, dtype), []
    for group in groups:
        size = min(_CHUNK, group.size)
        whole = group.size // size * size

        def add_block(
            carry: tuple[Array, list[Array]],
            start: Array | int,
            group: Group = group,
            size: int = size,
        ) -> tuple[tuple[Array, list[Array]], None]:
            total, largest = carry
            differences, squared = group.map(squares, group.take(start, size))
            largest = jax.tree.map(jnp.maximum, largest, differences)
            return (total + jnp.sum(squared, axis=0), largest), None

        carry = (total, group.zero_apart())
        carry, _ = jax.lax.scan(add_block, carry, jnp.arange(0, whole, size))
        if whole < group.size:
            carry, _ = add_block(carry, whole, size=group.size - whole)
        total, differences = carry
        apart.append(differences)
    return total, agreement(groups, apart)


def coefficient_order(groups: Sequence[Group], likelihood: Any) -> np.ndarray:
    """Where each entry of `ravel_real(A v)` is among rows by group and example."""
    parts: dict[int, PyTree] = {}
    offset = 0
    for group in groups:
        count, unit = group.rows_per_example, 0
        first = offset + count * np.arange(group.size)[:, None]
        for term in group.terms:
            leaves, structure = jax.tree.flatten(term.coefficients)
            places = []
            for leaf in leaves:
                # All real parts before all imaginary ones, as `ravel_real` has them.
                size = math.prod(leaf.shape[1:])
                num_parts = real_size(leaf) // math.prod(leaf.shape)
                starts = unit + size * np.arange(num_parts)
                places.append([first + start + np.arange(size) for start in starts])
                unit += size * num_parts
            parts[term.place] = jax.tree.unflatten(structure, places)
        offset += count * group.size
    joined = average.join(likelihood, [parts[index] for index in sorted(parts)])
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(joined)])


def _dtype(fisher: "Fisher") -> jnp.dtype:
    return tree.accumulator_dtype((fisher.params, fisher.outputs))
