"""The Fisher of a model as a linear operator.

    F = Σₙ μₙ Jₙᵀ Hₙ Jₙ,    F v = Jᵀ (μ H (J v)),    vᵀ F v = Σₙ μₙ ⟨Jₙ v, Hₙ Jₙ v⟩

J is the Jacobian of the outputs with respect to the parameters, H the Fisher of the
output distribution with respect to the outputs. A product costs one `jvp` and one `vjp`
of the linearised model, 4/3 of a gradient; the quadratic form needs the `jvp` only.
`Fisher.matvec` is the definition that every shortcut in this library is checked
against. Knows models and likelihoods, and nothing of solvers, steps or Optax.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import TypedDict, Unpack, cast, get_args

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.jacobian import Linearization, adjoint, linearize
from ngd_jax.likelihoods import Categorical, Likelihood
from ngd_jax.metric import Kind, OutputMetric, output_metric, terms
from ngd_jax.microbatches import (
    Chunks,
    chunks_of,
    map_microbatches,
    model_on,
    sum_microbatches,
)
from ngd_jax.types import (
    Array,
    Batch,
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
    "fisher_vector_product",
    "linearize_fisher",
    "mean_kl",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Fisher:
    """The Fisher of a model at `params` on `batch`; made by `linearize_fisher`.

    Lives inside one trace: it holds closures, so it is neither an argument nor a result
    of a jitted function.

    Attributes:
      model_fn: the model.
      params: where it was linearised.
      batch: the batch it was linearised on.
      likelihood: what the outputs mean.
      metric: the metric μ H of the outputs.
      kind: "exact", "sampled" or "empirical".
      linearization: J and Jᵀ, kept between products; None with microbatches, which
        recompute them in each product.
      chunks: the microbatches, or None.
      scales: those of a `CovariantDamping` that has one for every parameter, in its
        coordinates; else None.
      origin: the Fisher before its coordinates were changed; None if they were not.
    """

    model_fn: ModelFn
    params: Params
    batch: Batch
    likelihood: Likelihood
    metric: OutputMetric
    kind: Kind
    linearization: Linearization | None
    chunks: Chunks | None
    scales: PyTree | None = None
    origin: "Fisher | None" = None

    @property
    def outputs(self) -> Outputs:
        """The outputs of the model at `params`."""
        return self.metric.outputs

    @property
    def measure(self) -> tuple[Array, ...]:
        """The weights μ of the examples, an array for each term of the likelihood."""
        return self.metric.measure

    @property
    def base(self) -> "Fisher":
        """The Fisher in the coordinates of the model itself."""
        return self if self.origin is None else self.origin.base

    def matvec(self, vector: PyTree) -> PyTree:
        """F v, in the structure and the dtypes of `vector`.

        Args:
          vector: a tree of the structure and the shapes of `params`, of any floating
            dtypes; computed in float32 or wider.

        Raises:
          ValueError: at trace time, where `vector` does not fit `params`.
        """
        return self.matvec_and_push(vector)[0]

    def matvec_and_push(self, vector: PyTree) -> tuple[PyTree, PyTree]:
        """F v, as from `matvec`, and J v, as from `pushforward`, at the cost of F v."""
        pushed = self.pushforward(vector)
        product = self.pullback(self.metric.matvec(pushed))
        product = tree.placed_like(product, vector)
        return optax.tree.cast_like(product, vector), pushed

    def pushforward(self, vector: PyTree) -> PyTree:
        """J v, the tangents of the outputs, in their dtypes.

        Raises:
          ValueError: at trace time, where `vector` does not fit `params`.
        """
        tree.check_like(vector, self.params, name="vector", like_name="params")
        vector = tree.placed_like(vector, self.params)
        vector = optax.tree.cast_like(vector, tree.widen(self.params))
        if self.linearization is not None:
            return self.linearization.push(vector)

        def push(batch: Batch) -> PyTree:
            return linearize(self.model_fn, self.params, batch).push(vector)

        return map_microbatches(push, self.batch, self.chunks)

    def pullback(self, output_cotangents: PyTree) -> PyTree:
        """Jᵀ c, float32 or wider: a sum over the batch, neither averaged nor weighted.

        With c = ∂loss/∂outputs this is the gradient of the loss.
        """
        cotangents = tree.placed_like(output_cotangents, self.outputs)
        if self.linearization is not None:
            return self.linearization.pull(cotangents)

        def pull(data: PyTree) -> PyTree:
            batch, part = data
            return linearize(self.model_fn, self.params, batch).pull(part)

        return sum_microbatches(pull, (self.batch, cotangents), self.chunks)

    def inner(self, tangents: PyTree, other: PyTree) -> Scalar:
        """Σₙ μₙ ⟨tₙ, Hₙ t'ₙ⟩: with J v for both this is vᵀ F v."""
        return tree.vdot(tangents, self.metric.matvec(other))

    def quadratic(self, vector: PyTree) -> Scalar:
        """vᵀ F v, with one `jvp` and no `vjp`."""
        pushed = self.pushforward(vector)
        # F is positive semi-definite, so anything below zero is round-off.
        return jnp.maximum(self.inner(pushed, pushed), 0.0)

    def kl(self, new_params: Params) -> Scalar:
        """Measured mean KL(params ‖ new_params) on the batch, in nats per example."""
        return self.metric.kl(self.outputs_at(new_params))

    def outputs_at(self, new_params: Params) -> Outputs:
        """The outputs of the model at other parameters, on the same batch."""
        return map_microbatches(
            lambda part: self.model_fn(new_params, part), self.batch, self.chunks
        )

    def sqrt_matvec(self, vector: PyTree) -> PyTree:
        """A v with F = Aᵀ A: the coefficients √μ Bᵀ J v, float32 or wider.

        Shaped like the outputs for kind "exact", else one number for each example.
        With real inner products ⟨a, b⟩ = Re Σ conj(a) b, |A v|² = vᵀ F v.

        Raises:
          ValueError: at trace time, where `vector` does not fit `params`.
        """
        return self.metric.sqrt_matvec(self.pushforward(vector))

    def sqrt_rmatvec(self, coefficients: PyTree) -> PyTree:
        """Aᵀ u, the adjoint of `sqrt_matvec`: shaped like `params`, float32 or wider.

        Args:
          coefficients: u, shaped like what `sqrt_matvec` returns.
        """
        return self.pullback(self.sqrt_cotangents(coefficients))

    def sqrt_cotangents(self, coefficients: PyTree) -> PyTree:
        """√μ B u: the cotangents of the outputs whose pullback is Aᵀ u.

        For independent u of mean zero and variance one their covariance is μ H, the
        part of F that does not belong to the model.

        Args:
          coefficients: u, shaped like what `sqrt_matvec` returns.
        """
        return self.metric.sqrt_rmatvec(coefficients)

    def sqrt_solve(self, output_cotangents: PyTree) -> PyTree:
        """The coefficients u of least norm with Jᵀ c = Aᵀ u: a gradient, factored.

        With c = ∂loss/∂outputs this is the gradient Jᵀ c in the space where solvers on
        the square root of F work without squaring its condition number. Any part of c
        outside the range of the output metric is left out, so that
        Jᵀ c = Aᵀ u + Jᵀ rest; the rest is zero for a loss that is the negative
        log-likelihood, or any other function of the output distribution alone.

        Args:
          output_cotangents: c, shaped like the outputs.
        """
        return self.metric.sqrt_solve(output_cotangents)

    def in_coordinates(
        self, params_from: Callable[[PyTree], Params], scales: PyTree | None = None
    ) -> "Fisher":
        """Sᵀ F S: the same model in coordinates φ, at parameters θ + S φ with φ = 0.

        A solver that damps by λI there damps by λ S⁻ᵀ S⁻¹ here: with the coordinates,
        the metric of the damping is a choice, and works with any solver.

        Args:
          params_from: S, a linear map from trees of the structure and shapes of
            `params`, float32 or wider, to such trees.
          scales: the factors, if S multiplies every parameter by a positive number.
        """
        if scales is not None and self.origin is not None:
            # Scales of scales multiply; other coordinates have none.
            if self.scales is not None:
                scales = jax.tree.map(jnp.multiply, self.scales, scales)
            else:
                scales = None
        origin, wide_params = tree.zeros_like_wide(self.params), tree.widen(self.params)
        transpose = adjoint(params_from, origin)

        def model_fn(coordinates: PyTree, batch: Batch) -> Outputs:
            moved = tree.axpy(1.0, params_from(coordinates), wide_params)
            return self.model_fn(optax.tree.cast_like(moved, self.params), batch)

        linearization = self.linearization
        if linearization is not None:
            push, pull = linearization.push, linearization.pull
            linearization = linearization._replace(
                push=lambda vector: push(params_from(vector)),
                pull=lambda cotangents: transpose(pull(cotangents)),
            )
        return dataclasses.replace(
            self,
            model_fn=model_fn,
            params=origin,
            linearization=linearization,
            scales=scales,
            origin=self,
        )


class FisherOptions(TypedDict, total=False):
    """The keyword arguments of `linearize_fisher`."""

    kind: Kind
    key: KeyArray | None
    targets: PyTree | None
    weights: PyTree | None
    microbatch_size: int | None


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
      with the residuals, so the step grows where the fit is good, and it can point away
      from the natural direction (Kunstner et al. 2019). For comparison only.

    Args:
      model_fn: a pure function (params, batch) -> outputs.
      params: any tree of floating point or complex arrays. F acts on the real and the
        imaginary parts of complex ones: it is linear over the real numbers.
      batch: any tree, passed to `model_fn` unchanged. With `microbatch_size` its leaves
        whose leading axis is as long as the outputs' are split along it.
      likelihood: what the outputs mean.
      kind: see above.
      key: for kind "sampled", a typed JAX key.
      targets: for kind "empirical", the targets as `likelihood.log_prob` takes them.
      weights: broadcast against the shape of the examples; means become Σ w x / Σ w.
        An example of weight 0 is left out. For a `Product` also a dict by block.
      microbatch_size: examples in memory at once. The result is the same to round-off,
        provided that the model does not mix examples; the model runs twice more in each
        product.

    Returns:
      The operator; see `Fisher`.

    Raises:
      ValueError: where outputs do not fit the likelihood, for an empty batch, an
        unknown kind, a missing `key` or `targets`, an unusable `microbatch_size`.
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
    if kind != "exact" and any(term.centered for term, _ in terms(likelihood)):
        raise ValueError(
            f'`kind` must be "exact" for {likelihood!r}, got {kind!r}: its examples '
            f"are already draws from the model."
        )
    tree.check_parameters(params)

    linearization, chunks = None, None
    if microbatch_size is not None:
        shapes = jax.eval_shape(model_fn, params, batch)
        chunks = chunks_of(likelihood, shapes, batch, microbatch_size)
    if chunks is None:
        linearization = linearize(model_fn, params, batch)
        outputs = linearization.outputs
    else:
        outputs = map_microbatches(lambda b: model_fn(params, b), batch, chunks)
    if kind == "sampled":
        targets = likelihood.sample(cast("KeyArray", key), outputs)
    fisher = Fisher(
        model_fn=model_fn,
        params=params,
        batch=batch,
        likelihood=likelihood,
        metric=output_metric(
            likelihood,
            outputs,
            weights=weights,
            targets=None if kind == "exact" else targets,
        ),
        kind=kind,
        linearization=linearization,
        chunks=chunks,
    )
    _warn_of_one_example(fisher)
    return fisher


def _warn_of_one_example(fisher: Fisher) -> None:
    """Outputs `[N]` of one example are legal, but rarely what is meant."""
    sizes = {jnp.shape(leaf) for leaf in jax.tree.leaves(fisher.outputs)}
    is_one = all(mu.shape == () for mu in fisher.measure) and len(sizes) == 1
    (size,) = sizes if is_one else ((),)
    leaves = jax.tree.leaves(fisher.batch)
    if len(size) == 1 and size[0] > 1 and any(jnp.shape(x)[:1] == size for x in leaves):
        remedy = (
            f"If they are {size[0]} examples of one number each, give it event_ndims=0."
        )
        if isinstance(fisher.likelihood, Categorical):
            remedy = (
                "A Categorical needs logits [N, K]; two classes with one logit per "
                "example are a Bernoulli(event_ndims=0)."
            )
        warnings.warn(
            f"Outputs of shape {size} are one example of {size[0]} numbers for "
            f"{fisher.likelihood!r}. {remedy}",
            stacklevel=4,
        )


def fisher_vector_product(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    likelihood: Likelihood,
    vector: PyTree,
    **options: Unpack[FisherOptions],
) -> PyTree:
    """F v, in the structure and the dtypes of `vector`, at 5/3 of a gradient.

    For several products at the same parameters use `linearize_fisher`: its products
    cost 4/3, because the model runs once.

    Args:
      model_fn, params, batch, likelihood: as for `linearize_fisher`.
      vector: a tree of the structure and the shapes of `params`.
      **options: `kind`, `key`, `targets`, `weights`, `microbatch_size`, likewise.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> model_fn = lambda params, x: x * params
      >>> params, x = jnp.array([0.0, 0.0]), jnp.ones((4, 1))
      >>> fisher_vector_product(
      ...     model_fn, params, x, ngd.Categorical(), jnp.array([1.0, 0.0])
      ... )
      Array([ 0.25, -0.25], dtype=float32)
    """
    fisher = linearize_fisher(model_fn, params, batch, likelihood, **options)
    return fisher.matvec(vector)


def mean_kl(
    model_fn: ModelFn,
    params: Params,
    new_params: Params,
    batch: Batch,
    likelihood: Likelihood,
    *,
    weights: PyTree | None = None,
    microbatch_size: int | None = None,
) -> Scalar:
    """Σ μₙ KL(p(·|xₙ, params) ‖ p(·|xₙ, new_params)), in nats per example.

    Exactly 0.0 where both parameters are the same. The converse is false: permuting
    hidden units changes the parameters and not the outputs.

    Args:
      model_fn, params, batch, likelihood, weights, microbatch_size: as for
        `linearize_fisher`.
      new_params: a tree of the structure and the shapes of `params`.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.ones((4, 1))
      >>> mean_kl(lambda w, x: x * w, jnp.zeros(1), jnp.ones(1), x, ngd.Gaussian())
      Array(0.5, dtype=float32)
    """
    tree.check_like(new_params, params, name="new_params", like_name="params")
    outputs_at = model_on(model_fn, likelihood, batch, microbatch_size)
    metric = output_metric(likelihood, outputs_at(params), weights=weights)
    return metric.kl(outputs_at(new_params))
