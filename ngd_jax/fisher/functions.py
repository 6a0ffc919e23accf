"""The Fisher in one call: products, matrix, diagonal, trace, and the KL it measures."""

from collections.abc import Callable
from typing import Unpack

import jax

from ngd_jax import tree
from ngd_jax.fisher import average
from ngd_jax.fisher.build import FisherOptions, chunks_of, linearize_fisher
from ngd_jax.fisher.linearization import forward
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

__all__ = [
    "dense_fisher",
    "fisher_diagonal",
    "fisher_trace",
    "fisher_vector_product",
    "mean_kl",
    "model_on",
]


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


def dense_fisher(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    likelihood: Likelihood,
    **options: Unpack[FisherOptions],
) -> Array:
    """F as a matrix, in the order of `jax.flatten_util.ravel_pytree(params)`.

    Costs what `Fisher.dense` does; arguments as for `linearize_fisher`.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> matrix = dense_fisher(lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian())
      >>> matrix.round(5)
      Array([[ 5.,  7.],
             [ 7., 10.]], dtype=float32)

    Note:
      With complex parameters the matrix is that of a holomorphic model.
    """
    return linearize_fisher(model_fn, params, batch, likelihood, **options).dense()


def fisher_diagonal(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    likelihood: Likelihood,
    **options: Unpack[FisherOptions],
) -> Float[Array, " P"]:
    """diag(F), in the order of `jax.flatten_util.ravel_pytree(params)`.

    Exact. Costs a backward pass for each output of an example, or a forward pass for
    each parameter where the model mixes examples; see `Fisher.diagonal`. Arguments as
    for `linearize_fisher`.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> diagonal = fisher_diagonal(
      ...     lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
      ... )
      >>> diagonal.round(4)
      Array([ 5., 10.], dtype=float32)
    """
    return linearize_fisher(model_fn, params, batch, likelihood, **options).diagonal()


def fisher_trace(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    likelihood: Likelihood,
    **options: Unpack[FisherOptions],
) -> Scalar:
    """tr(F), exact, at the cost of `fisher_diagonal`; arguments as there.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> trace = fisher_trace(lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian())
      >>> trace.round(4)
      Array(15., dtype=float32)
    """
    return linearize_fisher(model_fn, params, batch, likelihood, **options).trace()


def model_on(
    model_fn: ModelFn,
    likelihood: Likelihood,
    batch: Batch,
    microbatch_size: int | None,
) -> Callable[[Params], Outputs]:
    """Params -> model_fn(params, batch), by microbatches."""

    def outputs_at(params: Params) -> Outputs:
        shapes = jax.eval_shape(model_fn, params, batch)
        chunks = chunks_of(likelihood, shapes, batch, microbatch_size)
        return forward(model_fn, params, batch, chunks)

    return outputs_at


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
    outputs, new_outputs = outputs_at(params), outputs_at(new_params)
    measure = average.example_measure(likelihood, outputs, weights)
    return average.average_kl(likelihood, outputs, new_outputs, measure)
