"""The diagonal of F from rows of its square root, one example at a time.

    diag(F)ᵢ = Σₙ μₙ Σₖ (Bₙᵀ Jₙ)ₖᵢ²,    Hₙ = Bₙ Bₙᵀ

A row is the pullback of Bₙ eₖ through the model on example n alone, which is a row of
the full Jacobian only where outputs are separable over examples. `separable` says
whether they are, by comparing the outputs of single examples with those of the batch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ngd_jax import tree
from ngd_jax.fisher import average
from ngd_jax.fisher.linearization import (
    Chunks,
    linearize,
    map_microbatches,
    sum_microbatches,
)
from ngd_jax.types import Array, PyTree

if TYPE_CHECKING:
    from ngd_jax.fisher.operator import Fisher

__all__ = ["DiagonalFromRows", "diagonal_from_rows"]

# Examples whose rows are held at once: each needs a parameter-sized vector.
_CHUNK = 16


class DiagonalFromRows(NamedTuple):
    """How to get the diagonal from rows, and whether that is right for this model.

    Attributes:
      separable: boolean scalar, False where the model mixes its examples.
      diagonal: () -> diag(F), `[P]`, true where `separable`.
    """

    separable: Array
    diagonal: Callable[[], Array]


def diagonal_from_rows(fisher: "Fisher") -> DiagonalFromRows | None:
    """None where the model cannot be run on single examples, or F is a covariance."""
    leading = average.leading_size(fisher.likelihood, fisher.outputs)
    if leading is None:
        return None
    chunks = Chunks(leading, min(_CHUNK, leading))
    cut = jax.tree.map(chunks.cuts, fisher.batch)
    if not any(jax.tree.leaves(cut)):
        return None
    if any(term.centered for term, _ in average.terms(fisher.likelihood)):
        return None
    axes = jax.tree.map(lambda is_cut: 0 if is_cut else None, cut)

    def alone(example: PyTree) -> PyTree:
        return jax.tree.map(lambda x, is_cut: x[None] if is_cut else x, example, cut)

    def outputs_alone(part: PyTree) -> PyTree:
        model = jax.vmap(
            lambda example: fisher.model_fn(fisher.params, alone(example)),
            in_axes=(axes,),
        )
        return jax.tree.map(lambda x: x[:, 0], model(part))

    def squares(example: PyTree, measure: PyTree, targets: PyTree) -> Array:
        linearization = linearize(fisher.model_fn, fisher.params, alone(example))
        measure, targets = jax.tree.map(lambda x: x[None], (measure, targets))
        units, factor = _square_root(
            fisher, linearization.outputs, jax.tree.map(jnp.sqrt, measure), targets
        )
        flat, unravel = ravel_pytree(units)

        def add(total: Array, unit: Array) -> tuple[Array, None]:
            row, _ = ravel_pytree(linearization.pull(factor(unravel(unit))))
            return total + jnp.real(row * jnp.conj(row)), None

        total = jnp.zeros(
            tree.size(fisher.params), tree.accumulator_dtype(fisher.params)
        )
        return jax.lax.scan(add, total, jnp.eye(flat.size, dtype=flat.dtype))[0]

    def diagonal() -> Array:
        batched = jax.vmap(squares, in_axes=(axes, 0, 0))
        data = (fisher.batch, fisher.measure, fisher.targets)
        return sum_microbatches(lambda part: batched(*part).sum(0), data, chunks)

    outputs = map_microbatches(outputs_alone, fisher.batch, chunks)
    return DiagonalFromRows(_agree(outputs, fisher.outputs), diagonal)


def _square_root(
    fisher: "Fisher", outputs: PyTree, root_measure: PyTree, targets: PyTree
) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """The space of coefficients u, and u -> √μ B u."""
    parts = average.split(fisher.likelihood, outputs)
    if fisher.kind == "exact":

        def factor(units: PyTree) -> PyTree:
            products = [
                average.weigh(root, term.sqrt_fisher_vp(out, unit))
                for (term, _), out, unit, root in zip(
                    average.terms(fisher.likelihood),
                    parts,
                    average.split(fisher.likelihood, units),
                    root_measure,
                    strict=True,
                )
            ]
            return average.join(fisher.likelihood, products)

        return jax.tree.map(jnp.zeros_like, outputs), factor

    scores = average.split(
        fisher.likelihood, average.score_terms(fisher.likelihood, outputs, targets)
    )

    def factor_of_scores(units: PyTree) -> PyTree:
        products = [
            average.weigh(root * unit, score)
            for root, unit, score in zip(root_measure, units, scores, strict=True)
        ]
        return average.join(fisher.likelihood, products)

    return jax.tree.map(jnp.zeros_like, root_measure), factor_of_scores


def _agree(alone: PyTree, together: PyTree) -> Array:
    """Whether outputs are the same to the round-off of their narrowest dtype."""
    agree = jnp.asarray(True)
    for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        if x.shape != y.shape:
            return jnp.asarray(False)
        tolerance = jnp.sqrt(jnp.finfo(y.dtype).eps)
        difference = jnp.max(jnp.abs(x - y), initial=0.0)
        agree &= difference <= tolerance * jnp.max(jnp.abs(y), initial=0.0)
    return agree
