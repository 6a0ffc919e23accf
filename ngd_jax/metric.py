"""The metric of a batch of outputs: weighted over examples, term by term.

    Σₙ μₙ Hₙ,    μₙ = wₙ / Σ w,    H = B Bᵀ,    A = √μ Bᵀ J,    F = Aᵀ A

A likelihood is a list of terms: one, unless it is a `Product`. Each term has its own
examples, and so its own weights μ, which include the weight of its block. Everything
downstream is then a plain sum over terms and examples. Owns the products with H and its
root, and the mean KL; knows nothing of models or parameters.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.likelihoods import Likelihood, Product
from ngd_jax.likelihoods.numerics import log_mean_exp
from ngd_jax.types import Array, Batch, KeyArray, Outputs, PyTree, Scalar

__all__ = [
    "Kind",
    "Metric",
    "OutputMetric",
    "check_count",
    "join",
    "leading_size",
    "output_metric",
    "split",
    "take_examples",
    "terms",
]

Kind = Literal["exact", "sampled", "empirical"]


def check_count(name: str, value: Any) -> None:
    """Raises unless `value` is a positive int, static under jit.

    Raises:
      TypeError: for anything but a Python int.
      ValueError: for a number below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"`{name}` must be a Python int (static under jit), got "
            f"{type(value).__name__}."
        )
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Metric:
    """The kind of Fisher of a step, and its data; the defaults suit most uses.

    Attributes:
      kind: "exact", "sampled" (needs `key`) or "empirical" (needs `targets_fn`); see
        `linearize_fisher`.
      key: for kind "sampled", a typed key; step n draws with `fold_in(key, n)`.
      targets_fn: for kind "empirical", batch -> targets as `likelihood.log_prob` takes
        them.
      weights_fn: batch -> weights (masks, importance weights) that broadcast against
        the examples; an example of weight 0 is left out.
      batch_fn: batch -> the batch of the metric: a part of it, as
        `lambda batch: ngd.take_examples(batch, 256)`, or another one. The metric needs
        no labels. The KL of the step is measured on that batch too, and `targets_fn`
        and `weights_fn` are called with it.
      microbatch_size: examples in memory at once, for the metric and for the KL.

    Raises:
      ValueError, TypeError: if the kind needs an argument that is missing, or does not
        use one that is given.

    Example:
      >>> import ngd_jax as ngd
      >>> metric = ngd.Metric(batch_fn=lambda batch: ngd.take_examples(batch, 256))
      >>> metric.kind
      'exact'
    """

    kind: Kind = "exact"
    key: KeyArray | None = None
    targets_fn: Callable[[Batch], PyTree] | None = None
    weights_fn: Callable[[Batch], PyTree] | None = None
    batch_fn: Callable[[Batch], Batch] | None = None
    microbatch_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"`kind` must be one of {get_args(Kind)}, got {self.kind!r}."
            )
        for kind, name in (("sampled", "key"), ("empirical", "targets_fn")):
            is_given = getattr(self, name) is not None
            if self.kind == kind and not is_given:
                raise ValueError(f"`{name}` is needed for kind={kind!r}, got None.")
            if self.kind != kind and is_given:
                raise ValueError(
                    f"`{name}` is for kind={kind!r} only, got kind={self.kind!r}."
                )
        for name in ("targets_fn", "weights_fn", "batch_fn"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"`{name}` must be a function of the batch.")
        if self.microbatch_size is not None:
            check_count("microbatch_size", self.microbatch_size)


def take_examples(batch: Batch, count: int, size: int | None = None) -> Batch:
    """The first `count` examples of a batch; scalars and keys stay as they are.

    Args:
      batch: any tree. Leaves whose leading axis counts the examples are cut; all others
        stay whole.
      count: how many examples to take; all if there are no more.
      size: the number of examples in `batch`. None if the first axis of every leaf that
        has one counts the examples.

    Raises:
      ValueError: if `size` is not given and the leaves disagree on the number of
        examples (as with running statistics in the batch), naming them; or if no leaf
        has a leading axis of `size`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> batch = {"x": jnp.ones((8, 3)), "rngs": {"dropout": jax.random.key(0)}}
      >>> take_examples(batch, 2)["x"].shape
      (2, 3)
    """
    check_count("count", count)
    shapes = {
        jax.tree_util.keystr(path) or "the root": jnp.shape(leaf)
        for path, leaf in jax.tree.leaves_with_path(batch)
        if jnp.ndim(leaf)
    }
    sizes = {shape[0] for shape in shapes.values()}
    if size is None and len(sizes) != 1:
        raise ValueError(
            f"`take_examples` cannot tell which leaves of `batch` hold examples: "
            f"their shapes are {shapes}. Pass the number of examples as `size`."
        )
    size = next(iter(sizes)) if size is None else size
    if size not in sizes:
        raise ValueError(
            f"`batch` has no leaf with a leading axis of `size` = {size}: the shapes "
            f"are {shapes}."
        )
    return jax.tree.map(
        lambda leaf: leaf[:count] if jnp.shape(leaf)[:1] == (size,) else leaf, batch
    )


# --- The terms of a likelihood.


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


def join(likelihood: Likelihood, parts: Iterable[PyTree]) -> PyTree:
    """Inverse of `split`."""
    parts = iter(parts)  # one iterator for all levels
    if not isinstance(likelihood, Product):
        return next(parts)
    return {name: join(block, parts) for name, block in likelihood.blocks.items()}


def leading_size(likelihood: Likelihood, outputs: Outputs) -> int | None:
    """The length of the leading axis that all examples share; None without one."""
    likelihood.batch_shape(outputs)  # raises where the outputs do not fit
    parts = zip(terms(likelihood), split(likelihood, outputs), strict=True)
    shapes = [tuple(term.batch_shape(out)) for (term, _), out in parts]
    sizes = {shape[0] if shape else None for shape in shapes}
    return sizes.pop() if len(sizes) == 1 else None


# --- The metric.


@dataclasses.dataclass(frozen=True, eq=False)
class OutputMetric:
    """The metric μ H of all outputs of a batch, its root, and the mean KL.

    Attributes:
      likelihood: what the outputs mean.
      outputs: the outputs at which the metric is taken.
      measure: for each term the weight μₙ of every example; they add up to one (to the
        weight of its block in a `Product`).
      scores: None for H in closed form; else ∂ log p(targets) / ∂ outputs, shaped like
        the outputs, for H = s sᵀ.
    """

    likelihood: Likelihood
    outputs: Outputs
    measure: tuple[Array, ...]
    scores: PyTree | None = None

    @property
    def data(self) -> list[tuple[PyTree, Array, PyTree]]:
        """The outputs, the weights μ and the scores (or None) of each term."""
        outputs = split(self.likelihood, self.outputs)
        scores = _spread(self.likelihood, self.scores)
        return list(zip(outputs, self.measure, scores, strict=True))

    def matvec(self, tangents: PyTree) -> PyTree:
        """μₙ Hₙ tₙ, or μₙ (tₙ - t̄) where the metric is a covariance over examples."""

        def product(term: Any, out: PyTree, mu: Array, score: PyTree, t: PyTree) -> Any:
            if score is not None:
                return _weigh(mu * _inner(score, t, mu), score)
            if term.centered:
                return _weigh(mu, _without(jnp.ones_like(mu), mu, t).astype(t.dtype))
            return _weigh(mu, term.fisher_vp(out, t))

        return self._map(product, tangents)

    def sqrt_matvec(self, tangents: PyTree) -> PyTree:
        """The coefficients √μ Bᵀ t; with scores √μ ⟨s, t⟩. Float32 or wider."""

        def product(term: Any, out: PyTree, mu: Array, score: PyTree, t: PyTree) -> Any:
            root = jnp.sqrt(mu)
            if score is not None:
                return root * _inner(score, t, mu)
            if term.centered:
                return _weigh(root, _without(jnp.ones_like(mu), mu, t))
            return _weigh(root, term.sqrt_fisher_tvp(out, t))

        return self._map(product, tree.widen(tangents))

    def sqrt_rmatvec(self, coefficients: PyTree) -> PyTree:
        """√μ B u in the dtypes of the outputs; the adjoint of `sqrt_matvec`."""

        def product(term: Any, out: PyTree, mu: Array, score: PyTree, u: PyTree) -> Any:
            root = jnp.sqrt(mu)
            if score is not None:
                cotangents = _weigh(root * u, tree.widen(score))
            elif term.centered:
                cotangents = _without(mu, jnp.ones_like(mu), root * u)
            else:
                cotangents = _weigh(root, term.sqrt_fisher_vp(out, u))
            return optax.tree.cast_like(cotangents, out)

        return self._map(product, coefficients)

    def sqrt_solve(self, cotangents: PyTree) -> PyTree:
        """The u of least norm with √μ B u = c, as far as c is in the range of √μ B."""

        def product(term: Any, out: PyTree, mu: Array, score: PyTree, c: PyTree) -> Any:
            is_used = mu > 0
            inverse_root = jnp.where(is_used, jnp.where(is_used, mu, 1) ** -0.5, 0)
            if score is not None:
                square = _inner(score, score, mu)
                quotient = _inner(score, c, mu) / jnp.where(square > 0, square, 1)
                return jnp.where(square > 0, inverse_root * quotient, 0)
            if term.centered:
                root = jnp.sqrt(mu)
                return _without(root, root, inverse_root * c)
            return _weigh(inverse_root, term.sqrt_fisher_solve(out, c))

        return self._map(product, tree.widen(cotangents))

    def kl(self, new_outputs: Outputs) -> Scalar:
        """Σ μₙ KL(pₙ ‖ p'ₙ) in nats; an example of weight 0 is ignored, even if NaN."""
        total = jnp.zeros((), tree.accumulator_dtype((self.outputs, self.measure)))
        new = split(self.likelihood, new_outputs)
        for (term, _), (p, mu, _), q in zip(
            terms(self.likelihood), self.data, new, strict=True
        ):
            if term.centered:
                log_normaliser_ratio = log_mean_exp(term.log_ratio(p, q), mu)
                kl = term.kl_from_normaliser(p, q, log_normaliser_ratio)
            else:
                kl = term.kl(p, q)
            total += jnp.sum(mu * jnp.where(mu == 0, 0.0, kl), dtype=total.dtype)
        return total

    def _map(self, product: Callable[..., PyTree], values: PyTree) -> PyTree:
        """`product(term, outputs, μ, scores, values)` of every term, joined."""
        parts = split(self.likelihood, values)
        every = zip(terms(self.likelihood), self.data, parts, strict=True)
        return join(
            self.likelihood, (product(t, *data, v) for (t, _), data, v in every)
        )


def output_metric(
    likelihood: Likelihood,
    outputs: Outputs,
    *,
    weights: PyTree | None = None,
    targets: PyTree | None = None,
) -> OutputMetric:
    """The metric of a batch of outputs.

    Args:
      likelihood: what the outputs mean.
      outputs: the model's outputs on the batch.
      weights: None, an array that broadcasts against the shape of the examples, or for
        a `Product` also a dict with an entry (array or None) for each block.
      targets: None for H in closed form, else the targets of the scores in H = s sᵀ.

    Raises:
      ValueError: for an empty batch, or weights that do not fit.
    """
    likelihood.batch_shape(outputs)  # raises where the outputs do not fit
    by_term = split(likelihood, outputs), _spread(likelihood, weights)
    measure = tuple(map(_normalise, terms(likelihood), *by_term))
    if targets is None:
        return OutputMetric(likelihood, outputs, measure)

    def log_prob(outputs: Outputs) -> Any:
        parts = zip(
            terms(likelihood),
            split(likelihood, outputs),
            split(likelihood, targets),
            strict=True,
        )
        return sum(term.log_prob(out, y).sum() for (term, _), out, y in parts)

    return OutputMetric(likelihood, outputs, measure, jax.grad(log_prob)(outputs))


def _spread(likelihood: Likelihood, values: PyTree | None) -> list[Any]:
    """The weights of each term: those of its block, or those that all share."""
    if not isinstance(likelihood, Product):
        return [values]
    if not isinstance(values, dict):
        values = dict.fromkeys(likelihood.blocks, values)
    if set(values) != set(likelihood.blocks):
        raise ValueError(
            f"`weights` must have an entry for each block of the likelihood: got "
            f"{sorted(values)}, expected {sorted(likelihood.blocks)}."
        )
    return [
        part
        for name, block in likelihood.blocks.items()
        for part in _spread(block, values[name])
    ]


def _normalise(term: tuple[Any, float], outputs: Outputs, weights: Any) -> Array:
    likelihood, factor = term
    shape = tuple(likelihood.batch_shape(outputs))
    dtype, count = tree.accumulator_dtype(outputs), math.prod(shape)
    if count == 0:
        raise ValueError(
            f"`batch` must hold at least one example: {likelihood!r} got outputs with "
            f"examples of shape {shape}."
        )
    if weights is None:
        return jnp.full(shape, factor / count, dtype)
    weights = jnp.asarray(weights).astype(dtype)
    try:
        weights = jnp.broadcast_to(weights, shape)
    except ValueError as error:
        raise ValueError(
            f"`weights` must broadcast against the examples: got shape "
            f"{weights.shape}, expected one that broadcasts to {shape}."
        ) from error
    return factor * weights / jnp.sum(weights)


def _without(along: Array, weights: Array, values: Array) -> Array:
    """Subtracts a mean: values - along ⟨weights, values⟩ / ⟨weights, along⟩.

    Done twice: if the mean is large, the first pass leaves its round-off.
    """
    for _ in range(2):
        mean = jnp.sum(weights * values) / jnp.sum(weights * along)
        values = values - along * mean
    return values


def _weigh(mu: Array, values: PyTree) -> PyTree:
    """Multiplies example n of every leaf by μₙ, in the dtype of the leaf."""

    def multiply(leaf: Array) -> Array:
        factors = jnp.expand_dims(mu, tuple(range(mu.ndim, leaf.ndim)))
        return (factors * leaf).astype(leaf.dtype)

    return jax.tree.map(multiply, values)


def _inner(a: PyTree, b: PyTree, like: Array) -> Array:
    """⟨aₙ, bₙ⟩ over all entries of example n, in the shape and dtype of `like`."""
    total = jnp.zeros(like.shape, like.dtype)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        event_axes = tuple(range(like.ndim, x.ndim))
        total += jnp.sum(x.astype(like.dtype) * y.astype(like.dtype), event_axes)
    return total
