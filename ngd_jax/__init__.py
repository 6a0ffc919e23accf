"""Exact natural gradient descent with a measured KL radius, for JAX, Optax and Flax.

    import ngd_jax as ngd
    tx = ngd.natural_gradient(1.0, model_fn, ngd.Categorical(), max_kl=0.1)

`ngd_jax.flax` holds the adapters for Flax, `ngd_jax.contrib` the optional parts; both
are imported on first use.
"""

import importlib
from typing import Any

from ngd_jax.auto import Auto
from ngd_jax.damping import CovariantDamping, LevenbergMarquardt, RelativeDamping
from ngd_jax.dense import dense_fisher, fisher_diagonal
from ngd_jax.describe import describe
from ngd_jax.fisher import Fisher, fisher_vector_product, linearize_fisher, mean_kl
from ngd_jax.kfac import KFAC, Kronecker
from ngd_jax.likelihoods import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    FromDistribution,
    FromKL,
    Gaussian,
    Likelihood,
    LogAmplitude,
    LogDensity,
    Poisson,
    Product,
)
from ngd_jax.metric import Metric, take_examples
from ngd_jax.solvers import (
    CG,
    LSMR,
    Cholesky,
    Preconditioner,
    RightHandSide,
    SampleSpace,
    Solution,
    Solver,
    SolverInfo,
    SolverStatus,
    check_solution,
    conjugate_gradient,
    lsmr,
    solve_scaled,
)
from ngd_jax.transform import (
    STATIC_ARGS,
    NaturalGradientInfo,
    NaturalGradientState,
    StepStatus,
    natural_gradient,
    scale_by_natural_gradient,
)
from ngd_jax.trust_region import (
    SufficientDecrease,
    TrustRegionResult,
    quadratic_step_scale,
    search_kl_radius,
)

__version__ = "0.2.0"

__all__ = [
    "CG",
    "KFAC",
    "LSMR",
    "STATIC_ARGS",
    "Auto",
    "Bernoulli",
    "Categorical",
    "Cholesky",
    "CovariantDamping",
    "DiagonalGaussian",
    "Fisher",
    "FromDistribution",
    "FromKL",
    "Gaussian",
    "Kronecker",
    "LevenbergMarquardt",
    "Likelihood",
    "LogAmplitude",
    "LogDensity",
    "Metric",
    "NaturalGradientInfo",
    "NaturalGradientState",
    "Poisson",
    "Preconditioner",
    "Product",
    "RelativeDamping",
    "RightHandSide",
    "SampleSpace",
    "Solution",
    "Solver",
    "SolverInfo",
    "SolverStatus",
    "StepStatus",
    "SufficientDecrease",
    "TrustRegionResult",
    "check_solution",
    "conjugate_gradient",
    "dense_fisher",
    "describe",
    "fisher_diagonal",
    "fisher_vector_product",
    "linearize_fisher",
    "lsmr",
    "mean_kl",
    "natural_gradient",
    "quadratic_step_scale",
    "scale_by_natural_gradient",
    "search_kl_radius",
    "solve_scaled",
    "take_examples",
]


def __getattr__(name: str) -> Any:
    if name in ("flax", "contrib"):
        return importlib.import_module(f"ngd_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
