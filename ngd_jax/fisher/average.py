"""The mean over a batch: Σₙ μₙ xₙ with μₙ = wₙ / Σ w.

μ is called the measure. A likelihood is a list of terms, one unless it is a `Product`;
each term has examples of its own and so a measure of its own, into which the weight of
its block is folded. Everything downstream is then a plain sum over terms and examples,
which is what lets microbatches add up to the whole batch exactly.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.likelihoods import Likelihood, Product
from ngd_jax.likelihoods.numerics import log_mean_exp
from ngd_jax.types import Array, Outputs, PyTree, Scalar

__all__ = [
    "Measure",
    "average_kl",
    "centers",
    "exact_cotangents",
    "example_measure",
    "inner_product",
    "join",
    "leading_size",
    "rank_one_cotangents",
    "score_products",
    "score_terms",
    "split",
    "terms",
    "weigh",
]

Measure = tuple[Array, ...]


def terms(likelihood: Likelihood) -> list[tuple[Any, float]]:
    """The likelihoods that `likelihood` is a weighted sum of, with their weights."""
    if not isinstance(likelihood, Product):
        return [(likelihood, 1.0)]
    return [
        (term, likelihood.weights[name] * weight)
        for name, block in likelihood.blocks.items()
        for term, weight in terms(block)
    ]


def split(likelihood: Likelihood, values: PyTree) -> list[PyTree]:
    """`values`, shaped like the outputs of `likelihood`, as one entry for each term."""
    if not isinstance(likelihood, Product):
        return [values]
    return [
        part
        for name, block in likelihood.blocks.items()
        for part in split(block, values[name])
    ]


def join(likelihood: Likelihood, parts: Sequence[PyTree]) -> PyTree:
    """Inverse of `split`."""
    return _join(likelihood, iter(parts))


def _join(likelihood: Likelihood, parts: Iterator[PyTree]) -> PyTree:
    if not isinstance(likelihood, Product):
        return next(parts)
    return {name: _join(block, parts) for name, block in likelihood.blocks.items()}


def example_measure(
    likelihood: Likelihood, outputs: Outputs, weights: PyTree | None
) -> Measure:
    """One array for each term, of the shape of its examples.

    Args:
      likelihood: what the outputs mean.
      outputs: the outputs, or their shapes and dtypes.
      weights: None, an array that broadcasts against the shape of the examples, or for
        a `Product` also a dict with an entry (array or None) for each block.

    Raises:
      ValueError: on an empty batch, or on weights that do not fit.
    """
    likelihood.batch_shape(outputs)  # raises where the outputs do not fit
    weight_parts = _spread(likelihood, weights)
    return tuple(
        _normalise(term, out, weight, factor)
        for (term, factor), out, weight in zip(
            terms(likelihood), split(likelihood, outputs), weight_parts, strict=True
        )
    )


def _spread(likelihood: Likelihood, weights: PyTree | None) -> list[Any]:
    if isinstance(likelihood, Product) and isinstance(weights, dict):
        if set(weights) != set(likelihood.blocks):
            raise ValueError(
                f"`weights` must have an entry for each block of the likelihood: got "
                f"{sorted(weights)}, expected {sorted(likelihood.blocks)}."
            )
        return [
            part
            for name, block in likelihood.blocks.items()
            for part in _spread(block, weights[name])
        ]
    return [weights] * len(terms(likelihood))


def _normalise(
    term: Likelihood, outputs: Outputs, weights: Any, factor: float
) -> Array:
    shape = tuple(term.batch_shape(outputs))
    dtype = tree.accumulator_dtype(outputs)
    count = 1
    for length in shape:
        count *= length
    if count == 0:
        raise ValueError(
            f"`batch` must hold at least one example: {term!r} got outputs with "
            f"examples of shape {shape}."
        )
    if weights is None:
        return jnp.full(shape, factor / count, dtype)
    weights = jnp.asarray(weights)
    try:
        broadcast = jnp.broadcast_shapes(weights.shape, shape)
    except ValueError:
        broadcast = None
    if broadcast != shape:
        raise ValueError(
            f"`weights` must broadcast against the examples: got shape "
            f"{weights.shape}, expected one that broadcasts to {shape}."
        )
    weights = jnp.broadcast_to(weights.astype(dtype), shape)
    return factor * weights / jnp.sum(weights)


def leading_size(likelihood: Likelihood, outputs: Outputs) -> int | None:
    """The length of the leading axis that all examples share; None without one."""
    likelihood.batch_shape(outputs)  # raises where the outputs do not fit
    shapes = [
        tuple(term.batch_shape(out))
        for (term, _), out in zip(
            terms(likelihood), split(likelihood, outputs), strict=True
        )
    ]
    sizes = {shape[0] if shape else None for shape in shapes}
    return sizes.pop() if len(sizes) == 1 else None


def average_kl(
    likelihood: Likelihood, outputs_p: Outputs, outputs_q: Outputs, measure: Measure
) -> Scalar:
    """Σ μₙ KL(pₙ‖qₙ) in nats; an example of weight zero does not count, even as NaN."""
    total = jnp.zeros((), tree.accumulator_dtype((outputs_p, measure)))
    for (term, _), p, q, mu in zip(
        terms(likelihood),
        split(likelihood, outputs_p),
        split(likelihood, outputs_q),
        measure,
        strict=True,
    ):
        if term.centered:
            log_normaliser_ratio = log_mean_exp(term.log_ratio(p, q), mu)
            kl = term.kl_from_normaliser(p, q, log_normaliser_ratio)
        else:
            kl = term.kl(p, q)
        total += jnp.sum(mu * jnp.where(mu == 0, 0.0, kl), dtype=total.dtype)
    return total


def centers(
    likelihood: Likelihood, tangents: PyTree, measure: Measure
) -> tuple[Array | None, ...]:
    """The mean tangent of each term whose metric is a covariance, else None."""
    return tuple(
        jnp.sum(mu * tangent) / jnp.sum(mu) if term.centered else None
        for (term, _), tangent, mu in zip(
            terms(likelihood), split(likelihood, tangents), measure, strict=True
        )
    )


def exact_cotangents(
    likelihood: Likelihood,
    outputs: Outputs,
    tangents: PyTree,
    measure: Measure,
    means: tuple[Array | None, ...] | None,
) -> PyTree:
    """μₙ Hₙ tₙ, or μₙ (tₙ - t̄) where the metric is a covariance over examples.

    `means` are the t̄ of the whole batch; None where `outputs` are the whole batch.
    """
    if means is None:
        means = centers(likelihood, tangents, measure)
    parts = []
    for (term, _), out, tangent, mu, mean in zip(
        terms(likelihood),
        split(likelihood, outputs),
        split(likelihood, tangents),
        measure,
        means,
        strict=True,
    ):
        if mean is not None:
            product = tangent - mean.astype(tangent.dtype)
        else:
            product = term.fisher_vp(out, tangent)
        parts.append(weigh(mu, product))
    return join(likelihood, parts)


def weigh(mu: Array, values: PyTree) -> PyTree:
    """Multiplies example n of every leaf by μₙ, in the dtype of the leaf."""

    def multiply(leaf: Array) -> Array:
        factors = jnp.expand_dims(mu, tuple(range(mu.ndim, leaf.ndim)))
        return (factors * leaf).astype(leaf.dtype)

    return jax.tree.map(multiply, values)


def score_terms(likelihood: Likelihood, outputs: Outputs, targets: PyTree) -> PyTree:
    """∂ log p(targets) / ∂ outputs of every example, shaped like the outputs."""
    parts = []
    for (term, _), out, target in zip(
        terms(likelihood),
        split(likelihood, outputs),
        split(likelihood, targets),
        strict=True,
    ):
        parts.append(jax.grad(lambda o, t=term, y=target: t.log_prob(o, y).sum())(out))
    return join(likelihood, parts)


def rank_one_cotangents(
    likelihood: Likelihood, scores: PyTree, tangents: PyTree, measure: Measure
) -> PyTree:
    """μₙ sₙ ⟨sₙ, tₙ⟩: the metric of one draw for each example."""
    products = score_products(likelihood, scores, tangents, measure)
    parts = [
        weigh(mu * product, score)
        for mu, product, score in zip(
            measure, products, split(likelihood, scores), strict=True
        )
    ]
    return join(likelihood, parts)


def score_products(
    likelihood: Likelihood, scores: PyTree, tangents: PyTree, measure: Measure
) -> list[Array]:
    """⟨sₙ, tₙ⟩ for every example, one array for each term."""
    return [
        inner_product(score, tangent, mu)
        for score, tangent, mu in zip(
            split(likelihood, scores), split(likelihood, tangents), measure, strict=True
        )
    ]


def inner_product(a: PyTree, b: PyTree, like: Array) -> Array:
    """⟨aₙ, bₙ⟩ over all that belongs to example n, of the shape and dtype of `like`."""
    total = jnp.zeros(like.shape, like.dtype)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        event_axes = tuple(range(like.ndim, x.ndim))
        total += jnp.sum(x.astype(like.dtype) * y.astype(like.dtype), event_axes)
    return total
