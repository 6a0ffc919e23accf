"""`linearize_fisher`: from a model and a batch to the operator, with all the checks."""

from typing import Any, TypedDict, cast, get_args

import jax

from ngd_jax import tree
from ngd_jax.arguments import check_count
from ngd_jax.fisher import average
from ngd_jax.fisher.linearization import Chunks, forward, linearize
from ngd_jax.fisher.operator import Fisher, Kind
from ngd_jax.likelihoods import Likelihood
from ngd_jax.types import Batch, KeyArray, ModelFn, Outputs, Params, PyTree

__all__ = ["FisherOptions", "chunks_of", "linearize_fisher"]


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
    check_count("microbatch_size", microbatch_size)
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
