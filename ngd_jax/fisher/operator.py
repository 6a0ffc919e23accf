"""The Fisher as a linear operator, and what can be read off it.

    F = Σₙ μₙ Jₙᵀ Hₙ Jₙ,    F v = Jᵀ (μ · H (J v)),    vᵀ F v = Σₙ μₙ ⟨Jₙ v, Hₙ Jₙ v⟩

with μₙ = wₙ / Σ w. A product costs one `jvp` and one `vjp` of the linearised model,
4/3 of a gradient; the quadratic form needs the `jvp` only.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypedDict, cast, get_args

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ngd_jax import tree
from ngd_jax.fisher import average
from ngd_jax.fisher.linearization import (
    Chunks,
    Linearization,
    linearize,
    map_microbatches,
    sum_microbatches,
)
from ngd_jax.fisher.rows import diagonal_from_rows
from ngd_jax.likelihoods import Likelihood
from ngd_jax.types import (
    Array,
    Batch,
    Float,
    KeyArray,
    ModelFn,
    Outputs,
    Params,
    PyTree,
    Scalar,
)

__all__ = [
    "Fisher",
    "FisherOptions",
    "Kind",
    "chunks_of",
    "forward",
    "linearize_fisher",
]

Kind = Literal["exact", "sampled", "empirical"]

# Basis vectors pushed through the model at once: wide enough for matrix products,
# narrow enough that the activations of as many copies of the batch fit in memory.
_BASIS_CHUNK = 32


class FisherOptions(TypedDict, total=False):
    """The keyword arguments of `linearize_fisher`."""

    kind: Kind
    key: KeyArray | None
    targets: PyTree | None
    weights: PyTree | None
    microbatch_size: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Fisher:
    """The Fisher of a model at `params` on `batch`; made by `linearize_fisher`.

    Lives inside of one trace: it holds closures, so it is neither an argument nor a
    result of a jitted function.

    Attributes:
      model_fn: the model.
      params: where it was linearised.
      batch: on what.
      likelihood: what the outputs mean.
      outputs: model_fn(params, batch).
      measure: for each term of the likelihood, the weight μₙ of every example; they
        add up to one (to the weight of its block in a `Product`).
      kind: "exact", "sampled" or "empirical".
      targets: the targets of the sampled and the empirical kind, else None.
      linearization: J and Jᵀ of the whole batch, or the microbatches from which they
        are made anew in each product.
    """

    model_fn: ModelFn
    params: Params
    batch: Batch
    likelihood: Likelihood
    outputs: Outputs
    measure: average.Measure
    kind: Kind
    targets: PyTree | None
    linearization: Linearization | Chunks

    def matvec(self, vector: PyTree) -> PyTree:
        """F v, in the structure and the dtypes of `vector`.

        Args:
          vector: a tree of the structure and the shapes of `params`, of any floating
            dtypes; computed in float32 or wider.

        Raises:
          ValueError: at trace time, where `vector` does not fit `params`.
        """
        wide = self._widen_vector(vector)

        def product(part: _Part) -> PyTree:
            tangents = part.linearization.push(wide)
            return part.linearization.pull(self._cotangents(part, tangents))

        return optax.tree.cast_like(self._sum(product, wide), vector)

    def quadratic(self, vector: PyTree) -> Scalar:
        """vᵀ F v, with one `jvp` and no `vjp`."""
        wide = self._widen_vector(vector)

        def form(part: _Part) -> Scalar:
            tangents = part.linearization.push(wide)
            return tree.vdot(tangents, self._cotangents(part, tangents))

        # F is positive semi-definite, so anything below zero is round-off.
        return jnp.maximum(self._sum(form, wide), 0.0)

    def kl(self, new_params: Params) -> Scalar:
        """Measured mean KL(params ‖ new_params) on the batch, in nats per example."""
        new_outputs = self.outputs_at(new_params)
        return average.average_kl(
            self.likelihood, self.outputs, new_outputs, self.measure
        )

    def outputs_at(self, new_params: Params) -> Outputs:
        """The outputs of the model at other parameters, on the same batch."""
        chunks = self.linearization if isinstance(self.linearization, Chunks) else None
        return forward(self.model_fn, new_params, self.batch, chunks)

    def pullback(self, output_cotangents: PyTree) -> PyTree:
        """Jᵀ c, float32 or wider: a sum over the batch, neither averaged nor weighted.

        With c = ∂loss/∂outputs this is the gradient of the loss.
        """

        def pull(data: PyTree) -> PyTree:
            batch, cotangents = data
            return linearize(self.model_fn, self.params, batch).pull(cotangents)

        if isinstance(self.linearization, Linearization):
            return self.linearization.pull(output_cotangents)
        data = (self.batch, output_cotangents)
        return sum_microbatches(pull, data, self.linearization)

    def dense(self) -> Array:
        """F as a matrix, in the order of `jax.flatten_util.ravel_pytree(params)`."""
        flat, unravel = ravel_pytree(tree.widen(self.params))
        rows = jax.lax.map(
            lambda v: ravel_pytree(self.matvec(unravel(v)))[0].astype(v.dtype),
            jnp.eye(flat.size, dtype=flat.dtype),
            batch_size=_BASIS_CHUNK,
        )
        # Row i is F eᵢ, a column of F: the same thing but for round-off.
        return (rows.T + jnp.conj(rows)) / 2

    def diagonal(self) -> Float[Array, " P"]:
        """The diagonal of F, in the order of `jax.flatten_util.ravel_pytree(params)`.

        From per-example rows of the Jacobian, as many backward passes as an example has
        outputs. A model that mixes its examples, like batch normalisation in training,
        has no such rows: there it takes one `jvp` for each parameter.
        """
        flat, unravel = ravel_pytree(tree.widen(self.params))

        def from_basis() -> Array:
            return jax.lax.map(
                lambda v: self.quadratic(unravel(v)).astype(v.real.dtype),
                jnp.eye(flat.size, dtype=flat.dtype),
                batch_size=_BASIS_CHUNK,
            )

        rows = diagonal_from_rows(self)
        if rows is None:
            return from_basis()
        return jax.lax.cond(rows.separable, rows.diagonal, from_basis)

    def trace(self) -> Scalar:
        """The trace of F; costs what `diagonal` costs."""
        return jnp.sum(self.diagonal())

    def _widen_vector(self, vector: PyTree) -> PyTree:
        tree.check_like(vector, self.params, name="vector", like_name="params")
        wide = tree.widen(self.params)
        return jax.tree.map(lambda v, p: jnp.asarray(v).astype(p.dtype), vector, wide)

    def _cotangents(self, part: "_Part", tangents: PyTree) -> PyTree:
        """μ H t for the examples of `part`."""
        outputs = part.linearization.outputs
        if self.kind == "exact":
            return average.exact_cotangents(
                self.likelihood, outputs, tangents, part.measure, part.centers
            )
        scores = average.score_terms(self.likelihood, outputs, part.targets)
        return average.rank_one_cotangents(
            self.likelihood, scores, tangents, part.measure
        )

    def _sum(self, fn: Callable[["_Part"], PyTree], vector: PyTree) -> PyTree:
        """`fn` of the whole batch, or its sum over microbatches."""
        if isinstance(self.linearization, Linearization):
            return fn(_Part(self.linearization, self.measure, self.targets, None))
        chunks = self.linearization
        data = (self.batch, self.measure, self.targets)

        def tangents(data: PyTree) -> PyTree:
            return linearize(self.model_fn, self.params, data[0]).push(vector)

        centers = None
        if any(term.centered for term, _ in average.terms(self.likelihood)):
            # A covariance needs the mean over the whole batch before any part of it.
            all_tangents = map_microbatches(tangents, data, chunks)
            centers = average.centers(self.likelihood, all_tangents, self.measure)

        def on_microbatch(data: PyTree) -> PyTree:
            batch, measure, targets = data
            linearization = linearize(self.model_fn, self.params, batch)
            return fn(_Part(linearization, measure, targets, centers))

        return sum_microbatches(on_microbatch, data, chunks)


class _Part(NamedTuple):
    """What a product needs of a batch or of one microbatch."""

    linearization: Linearization
    measure: average.Measure
    targets: PyTree | None
    centers: tuple[Array | None, ...] | None


def linearize_fisher(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    likelihood: Likelihood,
    *,
    kind: Kind = "exact",
    key: KeyArray | None = None,
    targets: PyTree | None = None,
    weights: PyTree | None = None,
    microbatch_size: int | None = None,
) -> Fisher:
    """The Fisher F = Σₙ μₙ Jₙᵀ Hₙ Jₙ at `params`; runs the model once.

    The three kinds differ in H, the metric of the outputs of one example:

    * "exact": the Fisher of the output distribution in closed form, the expectation
      over all targets that the model could draw. Costs no more than the others.
    * "sampled": s sᵀ with s = ∂ log p(y) / ∂ outputs for one y drawn from the model;
      unbiased, with a relative error above 1 in a product at one draw.
    * "empirical": s sᵀ at the data's own targets. This is not the Fisher: it shrinks
      with the residuals, so that the step grows where the fit is good, and it can point
      away from the natural direction (Kunstner et al. 2019). For comparison only.

    Args:
      model_fn: a pure function (params, batch) -> outputs.
      params: any tree of floating point or complex arrays.
      batch: any tree, handed to `model_fn` untouched. With `microbatch_size` its leaves
        whose leading axis is as long as the outputs' are split along it.
      likelihood: what the outputs mean.
      kind: see above.
      key: for kind "sampled", a typed JAX key.
      targets: for kind "empirical", the targets as `likelihood.log_prob` takes them.
      weights: broadcast against the shape of the examples; means become Σ w x / Σ w.
        An example of weight 0 is left out. For a `Product` also a dict by block.
      microbatch_size: examples in memory at once. The result is the same to round-off,
        provided that the model does not mix examples; the model runs once more in each
        product.

    Returns:
      The operator; see `Fisher`.

    Raises:
      ValueError: where outputs do not fit the likelihood, on an empty batch, an unknown
        kind, a missing `key` or `targets`, a `microbatch_size` that cannot be used.
      TypeError: where `params` holds integers or keys.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> model_fn = lambda params, x: x @ params["w"]
      >>> params, x = {"w": jnp.ones((2, 1))}, jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> fisher = ngd.linearize_fisher(model_fn, params, x, ngd.Gaussian())
      >>> fisher.matvec({"w": jnp.array([[1.0], [0.0]])})["w"].ravel()  # XᵀX e₁ / 2
      Array([5., 7.], dtype=float32)

    References:
      Amari, Natural gradient works efficiently in learning, 1998; Schraudolph, Fast
      curvature matrix-vector products, 2002, section 3; Kunstner, Balles and Hennig,
      Limitations of the empirical Fisher approximation, 2019, equation 3.

    Note:
      F is a mean over examples, not a sum, and carries no factor ½: KL ≈ ½ dᵀ F d.
      The model needs forward-mode derivatives: a `custom_vjp` inside must become a
      `custom_jvp`.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"`kind` must be one of {get_args(Kind)}, got {kind!r}.")
    if kind == "sampled" and key is None:
        raise ValueError('`key` is needed for kind="sampled", got None.')
    if kind == "empirical" and targets is None:
        raise ValueError('`targets` are needed for kind="empirical", got None.')
    if kind != "exact" and any(t.centered for t, _ in average.terms(likelihood)):
        raise ValueError(
            f'`kind` must be "exact" for {likelihood!r}, got {kind!r}: its examples '
            f"are already draws from the model."
        )
    tree.check_parameters(params)

    shapes = jax.eval_shape(model_fn, params, batch)
    chunks = chunks_of(likelihood, shapes, batch, microbatch_size)
    if chunks is None:
        linearization = linearize(model_fn, params, batch)
        outputs = linearization.outputs
    else:
        linearization = chunks
        outputs = forward(model_fn, params, batch, chunks)
    if kind == "sampled":
        targets = likelihood.sample(cast("KeyArray", key), outputs)
    return Fisher(
        model_fn=model_fn,
        params=params,
        batch=batch,
        likelihood=likelihood,
        outputs=outputs,
        measure=average.example_measure(likelihood, outputs, weights),
        kind=kind,
        targets=None if kind == "exact" else targets,
        linearization=linearization,
    )


def chunks_of(
    likelihood: Likelihood,
    outputs: Outputs,
    batch: Batch,
    microbatch_size: Any,
) -> Chunks | None:
    """How to cut `batch`; None where one microbatch holds it.

    Args:
      likelihood: says which axis of the outputs counts the examples.
      outputs: the outputs, or their shapes and dtypes.
      batch: what is to be cut.
      microbatch_size: examples in a microbatch, or None.

    Raises:
      ValueError, TypeError: where `microbatch_size` cannot be used.
    """
    leading = average.leading_size(likelihood, outputs)
    if microbatch_size is None:
        return None
    if isinstance(microbatch_size, bool) or not isinstance(microbatch_size, int):
        raise TypeError(
            f"`microbatch_size` must be a Python int (static under jit), got "
            f"{type(microbatch_size).__name__}."
        )
    if microbatch_size < 1:
        raise ValueError(
            f"`microbatch_size` must be at least 1, got {microbatch_size}."
        )
    if leading is None:
        raise ValueError(
            "`microbatch_size` needs outputs that share one leading axis of examples."
        )
    chunks = Chunks(leading, microbatch_size)
    if not any(chunks.cuts(leaf) for leaf in jax.tree.leaves(batch)):
        raise ValueError(
            f"`microbatch_size` needs a leaf of `batch` to split: none has a leading "
            f"axis of length {leading}, the number of examples in the outputs."
        )
    return chunks if microbatch_size < leading else None


def forward(
    model_fn: ModelFn, params: Params, batch: Batch, chunks: Chunks | None
) -> Outputs:
    """model_fn(params, batch), by microbatches where there are any."""
    if chunks is None:
        return model_fn(params, batch)
    return map_microbatches(lambda part: model_fn(params, part), batch, chunks)
