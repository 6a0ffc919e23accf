"""Fisher-vector products: F v = (1/N) Σₙ Jₙᵀ Hₙ Jₙ v.

J is the Jacobian of `model_fn` with respect to the parameters, H the Fisher of the
output distribution with respect to the outputs. Knows likelihoods and models, and
nothing of solvers, steps or Optax.

* `average`: the mean over a batch, weighted, and block by block for a `Product`;
* `linearization`: J and Jᵀ, from one run of the model, whole or by microbatches;
* `root`: the square root A of F = Aᵀ A, between the outputs and the coefficients;
* `operator`: the `Fisher`, all products;
* `build`: `linearize_fisher`, which makes it;
* `functions`: the same in one call each, and the measured KL;
* `rows`: rows of A, one example at a time, and the diagonal from them;
* `gram`: A Aᵀ, block by block of examples;
* `coefficients`: coefficients of A as real vectors.
"""

from ngd_jax.fisher.build import linearize_fisher
from ngd_jax.fisher.functions import (
    dense_fisher,
    fisher_diagonal,
    fisher_trace,
    fisher_vector_product,
    mean_kl,
)
from ngd_jax.fisher.operator import Fisher, Kind

__all__ = [
    "Fisher",
    "Kind",
    "dense_fisher",
    "fisher_diagonal",
    "fisher_trace",
    "fisher_vector_product",
    "linearize_fisher",
    "mean_kl",
]
