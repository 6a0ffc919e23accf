"""Exact natural gradient descent with a measured KL radius, for JAX, Optax and Flax.

    import ngd_jax as ngd
    tx = ngd.natural_gradient(1.0, model_fn, ngd.Categorical(), max_kl=1e-2)

`ngd_jax.flax` holds the adapters for Flax, and imports Flax when it is first used.
"""

import importlib
from typing import Any

from ngd_jax import presets as presets
from ngd_jax.acceptance import SufficientDecrease
from ngd_jax.damping import CovariantDamping, LevenbergMarquardt, RelativeDamping
from ngd_jax.fisher import (
    Fisher,
    dense_fisher,
    fisher_diagonal,
    fisher_trace,
    fisher_vector_product,
    linearize_fisher,
    mean_kl,
)
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
from ngd_jax.preconditioners import Jacobi, Kronecker, Nystrom, Preconditioner
from ngd_jax.quadratic_model import QuadraticModelRate
from ngd_jax.relative_radius import RelativeRadius
from ngd_jax.solvers import (
    CG,
    LSMR,
    SVD,
    ApproximateInverse,
    Auto,
    Cholesky,
    DampingSearch,
    Lineax,
    SampleSpace,
    Solver,
    SolverInfo,
    SolverStatus,
    StatefulSolver,
    conjugate_gradient,
    lsmr,
)
from ngd_jax.transform import (
    NaturalGradientInfo,
    NaturalGradientState,
    StepStatus,
    natural_gradient,
    scale_by_natural_gradient,
)
from ngd_jax.trust_region import (
    TrustRegionResult,
    quadratic_step_scale,
    search_kl_radius,
)

__version__ = "0.1.0"

__all__ = [
    "CG",
    "LSMR",
    "SVD",
    "ApproximateInverse",
    "Auto",
    "Bernoulli",
    "Categorical",
    "Cholesky",
    "CovariantDamping",
    "DampingSearch",
    "DiagonalGaussian",
    "Fisher",
    "FromDistribution",
    "FromKL",
    "Gaussian",
    "Jacobi",
    "Kronecker",
    "LevenbergMarquardt",
    "Likelihood",
    "Lineax",
    "LogAmplitude",
    "LogDensity",
    "NaturalGradientInfo",
    "NaturalGradientState",
    "Nystrom",
    "Poisson",
    "Preconditioner",
    "Product",
    "QuadraticModelRate",
    "RelativeDamping",
    "RelativeRadius",
    "SampleSpace",
    "Solver",
    "SolverInfo",
    "SolverStatus",
    "StatefulSolver",
    "StepStatus",
    "SufficientDecrease",
    "TrustRegionResult",
    "conjugate_gradient",
    "dense_fisher",
    "fisher_diagonal",
    "fisher_trace",
    "fisher_vector_product",
    "linearize_fisher",
    "lsmr",
    "mean_kl",
    "natural_gradient",
    "quadratic_step_scale",
    "scale_by_natural_gradient",
    "search_kl_radius",
]


def __getattr__(name: str) -> Any:
    if name == "flax":
        return importlib.import_module("ngd_jax.flax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
