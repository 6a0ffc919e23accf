"""Output distributions: log-probability, KL, Fisher information and samples.

    H(z) = E[∂ log p(y|z) ∂ log p(y|z)ᵀ] = ∂²/∂z'² KL(p_z ‖ p_z') at z' = z

A likelihood is a function of the outputs z of a model and of nothing else. Its
methods return one value per example, in nats, and leave the mean over the batch to the
caller.
`Likelihood` shows how to write your own in ten lines.
"""

from ngd_jax.likelihoods.base import Likelihood
from ngd_jax.likelihoods.bernoulli import Bernoulli
from ngd_jax.likelihoods.categorical import Categorical
from ngd_jax.likelihoods.derived import FromDistribution, FromKL
from ngd_jax.likelihoods.gaussian import DiagonalGaussian, Gaussian
from ngd_jax.likelihoods.poisson import Poisson
from ngd_jax.likelihoods.product import Product
from ngd_jax.likelihoods.unnormalized import LogAmplitude, LogDensity

__all__ = [
    "Bernoulli",
    "Categorical",
    "DiagonalGaussian",
    "FromDistribution",
    "FromKL",
    "Gaussian",
    "Likelihood",
    "LogAmplitude",
    "LogDensity",
    "Poisson",
    "Product",
]
