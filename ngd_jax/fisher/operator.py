"""The Fisher as a linear operator, and what can be read off it.

    F = Σₙ μₙ Jₙᵀ Hₙ Jₙ,    F v = Jᵀ (μ · H (J v)),    vᵀ F v = Σₙ μₙ ⟨Jₙ v, Hₙ Jₙ v⟩

with μₙ = wₙ / Σ w. A product costs one `jvp` and one `vjp` of the linearised model,
4/3 of a gradient; the quadratic form needs the `jvp` only.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ngd_jax import tree
from ngd_jax.fisher import average, root
from ngd_jax.fisher.dense_root import dense_root, sum_of_squares
from ngd_jax.fisher.gram import Gram, gram_matrix
from ngd_jax.fisher.linearization import (
    Chunks,
    Linearization,
    adjoint,
    forward,
    linearize,
    map_microbatches,
    sum_microbatches,
)
from ngd_jax.fisher.rows import NoRowsError, diagonal_from_rows
from ngd_jax.likelihoods import Likelihood
from ngd_jax.types import (
    Array,
    Batch,
    Float,
    ModelFn,
    Outputs,
    Params,
    PyTree,
    Scalar,
)

__all__ = ["Fisher", "Kind"]

Kind = Literal["exact", "sampled", "empirical"]

# Basis vectors pushed through the model at once: wide enough for matrix products,
# narrow enough that the activations of as many copies of the batch fit in memory.
_BASIS_CHUNK = 32


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

    @property
    def is_kept(self) -> bool:
        """Whether J is kept between products; made anew in each with microbatches."""
        return isinstance(self.linearization, Linearization)

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
            return part.linearization.pull(self._metric(tangents, part))

        return optax.tree.cast_like(self._sum(product, wide), vector)

    def matvec_with_image(self, vector: PyTree) -> tuple[PyTree, PyTree]:
        """F v, as of `matvec`, and J v, as of `pushforward`, at the price of F v.

        With microbatches, where nothing is kept between passes, of one `jvp` more.
        """
        image = self.pushforward(vector)
        if not isinstance(self.linearization, Linearization):
            return self.matvec(vector), image
        product = self.linearization.pull(self._metric(image))
        return optax.tree.cast_like(product, vector), image

    def pushforward(self, vector: PyTree) -> PyTree:
        """J v, the tangents of the outputs, in their dtypes.

        Raises:
          ValueError: at trace time, where `vector` does not fit `params`.
        """
        wide = self._widen_vector(vector)
        if isinstance(self.linearization, Linearization):
            return self.linearization.push(wide)

        def push(batch: Batch) -> PyTree:
            return linearize(self.model_fn, self.params, batch).push(wide)

        return map_microbatches(push, self.batch, self.linearization)

    def inner(self, tangents: PyTree, other: PyTree) -> Scalar:
        """Σₙ μₙ ⟨tₙ, Hₙ t'ₙ⟩: with J v for both this is vᵀ F v.

        Args:
          tangents, other: of the outputs, as of `pushforward`.
        """
        return tree.vdot(tangents, self._metric(other))

    def sqrt_matvec(self, vector: PyTree) -> PyTree:
        """A v with F = Aᵀ A: the coefficients √μ Bᵀ J v, float32 or wider.

        Shaped like the outputs for kind "exact", else one number for each example.
        With real inner products ⟨a, b⟩ = Re Σ conj(a) b, |A v|² = vᵀ F v.

        Raises:
          ValueError: at trace time, where `vector` does not fit `params`.
        """
        tangents = self.pushforward(vector)
        return root.coefficients_from_tangents(
            self.likelihood, self.outputs, tangents, self.measure, self._scores()
        )

    def sqrt_rmatvec(self, coefficients: PyTree) -> PyTree:
        """Aᵀ u, the adjoint of `sqrt_matvec`: shaped like `params`, float32 or wider.

        Args:
          coefficients: u, shaped like what `sqrt_matvec` returns.
        """
        return self.pullback(self.sqrt_cotangents(coefficients))

    def sqrt_cotangents(self, coefficients: PyTree) -> PyTree:
        """√μ B u: the cotangents of the outputs whose pullback is Aᵀ u.

        For independent u of mean zero and variance one, their covariance is that part
        of F which is not the model, μ H.

        Args:
          coefficients: u, shaped like what `sqrt_matvec` returns.
        """
        return root.cotangents_from_coefficients(
            self.likelihood, self.outputs, coefficients, self.measure, self._scores()
        )

    def sqrt_solve(self, output_cotangents: PyTree) -> PyTree:
        """The coefficients u of least norm with Jᵀ c = Aᵀ u: a gradient, factored.

        With c = ∂loss/∂outputs, this is the gradient Jᵀ c in the space where solvers on
        the square root of F work without squaring its condition number. What of c is
        outside of the range of the output metric is left out, so that
        Jᵀ c = Aᵀ u + Jᵀ rest; the rest is zero for a loss that is the negative
        log-likelihood, or any other function of the output distribution alone.

        Args:
          output_cotangents: c, shaped like the outputs.
        """
        return root.solve_for_coefficients(
            self.likelihood,
            self.outputs,
            output_cotangents,
            self.measure,
            self._scores(),
        )

    def quadratic(self, vector: PyTree) -> Scalar:
        """vᵀ F v, with one `jvp` and no `vjp`."""
        wide = self._widen_vector(vector)

        def form(part: _Part) -> Scalar:
            tangents = part.linearization.push(wide)
            return tree.vdot(tangents, self._metric(tangents, part))

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

    def in_coordinates(self, params_from: Callable[[PyTree], Params]) -> "Fisher":
        """Sᵀ F S: the same model in coordinates φ, at parameters θ + S φ with φ = 0.

        A solver that damps by λI there damps by λ S⁻ᵀ S⁻¹ here: with the coordinates,
        the metric of the damping is a choice, and any solver serves for it.

        Args:
          params_from: S, a linear map from trees of the structure and shapes of
            `params`, float32 or wider, to such trees.
        """
        origin, wide_params = tree.zeros_like_wide(self.params), tree.widen(self.params)
        transpose = adjoint(params_from, origin)

        def model_fn(coordinates: PyTree, batch: Batch) -> Outputs:
            moved = tree.axpy(1.0, params_from(coordinates), wide_params)
            return self.model_fn(optax.tree.cast_like(moved, self.params), batch)

        linearization = self.linearization
        if isinstance(linearization, Linearization):
            push, pull = linearization.push, linearization.pull
            linearization = linearization._replace(
                push=lambda vector: push(params_from(vector)),
                pull=lambda cotangents: transpose(pull(cotangents)),
            )
        return dataclasses.replace(
            self, model_fn=model_fn, params=origin, linearization=linearization
        )

    def dense(self) -> Array:
        """F as a matrix, in the order of `jax.flatten_util.ravel_pytree(params)`.

        From per-example rows of the Jacobian where an example has few outputs, else
        from one product for each parameter.
        """
        flat, unravel = ravel_pytree(tree.widen(self.params))

        def from_products() -> Array:
            rows = jax.lax.map(
                lambda v: ravel_pytree(self.matvec(unravel(v)))[0].astype(v.dtype),
                jnp.eye(flat.size, dtype=flat.dtype),
                batch_size=_BASIS_CHUNK,
            )
            # Row i is F eᵢ, a column of F: the same thing but for round-off.
            return (rows.T + jnp.conj(rows)) / 2

        try:
            found = sum_of_squares(self)
        except NoRowsError:
            found = None
        if found is None:
            return from_products()
        matrix, is_separable = found
        return jax.lax.cond(is_separable, lambda: matrix, from_products)

    def dense_root(self) -> Array:
        """A as a matrix, `[M, P]`, with F = Aᵀ A: what `sqrt_matvec` multiplies by.

        M real coefficients as in `gram`, P real parameters, both in the order of
        `ravel_pytree`; complex entries count as two, all real parts of a leaf before
        all imaginary ones. From per-example rows of the Jacobian; where a model mixes
        its examples, from one `jvp` for each parameter.
        """
        return dense_root(self)

    def diagonal(self) -> Float[Array, " P"]:
        """The diagonal of F, in the order of `jax.flatten_util.ravel_pytree(params)`.

        From per-example rows of the Jacobian, as many backward passes as an example has
        outputs. A model that mixes its examples, like batch normalisation in training,
        has no such rows: there it takes one `jvp` for each parameter.
        """
        flat, unravel = ravel_pytree(tree.widen(self.params))

        def from_basis() -> Array:
            def entry(index: Array) -> Array:
                vector = jnp.zeros_like(flat).at[index].set(1)
                return self.quadratic(unravel(vector)).astype(flat.real.dtype)

            # By index: a matrix of all basis vectors would be as large as F.
            indices = jnp.arange(flat.size)
            return jax.lax.map(entry, indices, batch_size=_BASIS_CHUNK)

        try:
            diagonal, is_separable = diagonal_from_rows(self)
        except NoRowsError:
            return from_basis()
        return jax.lax.cond(is_separable, lambda: diagonal, from_basis)

    def gram(self, block_size: int | None = None) -> Gram:
        """A Aᵀ, `[M, M]`, of the samples, with F = Aᵀ A.

        M is the number of real coefficients: N·K where each of N examples has K real
        outputs, twice that for complex ones, N for the sampled and the empirical kind.
        In the order of `ravel_real`, which is that of `ravel_pytree` for real outputs.

        Args:
          block_size: examples whose rows are in memory at once, twice over; None takes
            as many as fit into half a GiB, and the rows of dense layers as outer
            products, of all examples at once where these fit, which is far cheaper.

        Raises:
          ValueError: at trace time, where the model cannot be run on single examples.
        """
        return gram_matrix(self, block_size)

    def trace(self) -> Scalar:
        """The trace of F; costs what `diagonal` costs."""
        return jnp.sum(self.diagonal())

    def _widen_vector(self, vector: PyTree) -> PyTree:
        tree.check_like(vector, self.params, name="vector", like_name="params")
        wide = tree.widen(self.params)
        return jax.tree.map(lambda v, p: jnp.asarray(v).astype(p.dtype), vector, wide)

    def _scores(self) -> PyTree | None:
        if self.kind == "exact":
            return None
        return average.score_terms(self.likelihood, self.outputs, self.targets)

    def _metric(self, tangents: PyTree, part: "_Part | None" = None) -> PyTree:
        """μ H t for the examples of `part`, or for all of them."""
        outputs, measure, targets, centers = (
            (self.outputs, self.measure, self.targets, None)
            if part is None
            else (part.linearization.outputs, *part[1:])
        )
        if self.kind == "exact":
            return average.exact_cotangents(
                self.likelihood, outputs, tangents, measure, centers
            )
        scores = average.score_terms(self.likelihood, outputs, targets)
        return average.rank_one_cotangents(self.likelihood, scores, tangents, measure)

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
