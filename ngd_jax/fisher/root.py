"""The square root of the Fisher: A with F = Aᵀ A, at the level of outputs.

    A = √μ Bᵀ J,    A v = √μ Bᵀ (J v),    Aᵀ u = Jᵀ (√μ B u),    H = B Bᵀ

A maps tangents of the parameters to coefficients: numbers shaped like the outputs for
the exact Fisher, one for each example (⟨sₙ, Jₙ v⟩) for the sampled and the empirical
one. Where the metric is a covariance, A also subtracts the weighted mean. Here are the
parts without J; all of them are linear, and float32 or wider.
"""

import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.fisher import average
from ngd_jax.fisher.average import Measure, join, split, terms, weigh
from ngd_jax.likelihoods import Likelihood
from ngd_jax.types import Outputs, PyTree

__all__ = [
    "coefficients_from_tangents",
    "cotangents_from_coefficients",
    "solve_for_coefficients",
]


def coefficients_from_tangents(
    likelihood: Likelihood,
    outputs: Outputs,
    tangents: PyTree,
    measure: Measure,
    scores: PyTree | None,
) -> PyTree:
    """√μ Bᵀ t; with `scores` s of the examples √μ ⟨s, t⟩."""
    tangents = tree.widen(tangents)
    if scores is not None:
        products = average.score_products(likelihood, scores, tangents, measure)
        parts = [
            jnp.sqrt(mu) * product
            for mu, product in zip(measure, products, strict=True)
        ]
        return join(likelihood, parts)
    means = average.centers(likelihood, tangents, measure)
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
            part = tangent - mean
        else:
            part = term.sqrt_fisher_tvp(out, tangent)
        parts.append(weigh(jnp.sqrt(mu), part))
    return join(likelihood, parts)


def cotangents_from_coefficients(
    likelihood: Likelihood,
    outputs: Outputs,
    coefficients: PyTree,
    measure: Measure,
    scores: PyTree | None,
) -> PyTree:
    """√μ B u in the dtypes of the outputs; the adjoint of the above."""
    parts = []
    for (term, _), out, part, mu, score in zip(
        terms(likelihood),
        split(likelihood, outputs),
        split(likelihood, coefficients),
        measure,
        _split_scores(likelihood, scores),
        strict=True,
    ):
        root = jnp.sqrt(mu)
        if score is not None:
            cotangents = weigh(root * part, tree.widen(score))
        elif term.centered:
            total = jnp.sum(root * part) / jnp.sum(mu)
            cotangents = root * part - mu * total
        else:
            cotangents = weigh(root, term.sqrt_fisher_vp(out, part))
        parts.append(optax.tree.cast_like(cotangents, out))
    return join(likelihood, parts)


def solve_for_coefficients(
    likelihood: Likelihood,
    outputs: Outputs,
    cotangents: PyTree,
    measure: Measure,
    scores: PyTree | None,
) -> PyTree:
    """The u of least norm with √μ B u = c, as far as c is in the range of √μ B."""
    cotangents = tree.widen(cotangents)
    parts = []
    for (term, _), out, part, mu, score in zip(
        terms(likelihood),
        split(likelihood, outputs),
        split(likelihood, cotangents),
        measure,
        _split_scores(likelihood, scores),
        strict=True,
    ):
        is_used = mu > 0
        inverse_root = jnp.where(is_used, jnp.where(is_used, mu, 1) ** -0.5, 0)
        if score is not None:
            product = average.inner_product(score, part, mu)
            square = average.inner_product(score, score, mu)
            is_used &= square > 0
            coefficients = jnp.where(
                is_used, inverse_root * product / jnp.where(is_used, square, 1), 0
            )
        elif term.centered:
            root = jnp.sqrt(mu)
            scaled = inverse_root * part
            coefficients = scaled - root * (jnp.sum(root * scaled) / jnp.sum(mu))
        else:
            solved = term.sqrt_fisher_solve(out, part)
            coefficients = weigh(inverse_root, solved)
        parts.append(coefficients)
    return join(likelihood, parts)


def _split_scores(likelihood: Likelihood, scores: PyTree | None) -> list[PyTree | None]:
    if scores is None:
        return [None] * len(terms(likelihood))
    return split(likelihood, scores)
