"""One case for each likelihood, and what the tests of them share."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngd_jax.likelihoods import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    FromKL,
    Gaussian,
    Likelihood,
    LogAmplitude,
    LogDensity,
    Poisson,
    Product,
)
from tests.marks import long_unless

BATCH = (4,)


@dataclasses.dataclass(frozen=True)
class Case:
    likelihood: Likelihood
    shapes: Any  # of the outputs, without the batch

    def outputs(self, rng, dtype="float32", batch=BATCH):
        def draw(shape):
            values = rng.normal(size=(*batch, *shape))
            if self.complex:
                values = values + 1j * rng.normal(size=values.shape)
            return jnp.asarray(values).astype(
                _complex(dtype) if self.complex else dtype
            )

        return jax.tree.map(draw, self.shapes, is_leaf=lambda x: isinstance(x, tuple))

    complex: bool = False


def _complex(dtype):
    return "complex128" if dtype == "float64" else "complex64"


def exponential_kl(log_rate_p, log_rate_q):
    d = log_rate_q - log_rate_p
    return jnp.sum(jnp.expm1(d) - d, axis=-1)


HEADS = Product(
    {"label": Categorical(), "box": DiagonalGaussian(), "count": Poisson()},
    weights={"label": 1.0, "box": 0.25, "count": 2.0},
)
CASES = {
    "categorical": Case(Categorical(), (3,)),
    "bernoulli": Case(Bernoulli(), (3,)),
    "bernoulli image": Case(Bernoulli(event_ndims=2), (2, 2)),
    "gaussian": Case(Gaussian(scale=0.7), (3,)),
    "gaussian scalar": Case(Gaussian(event_ndims=0), ()),
    "diagonal gaussian": Case(DiagonalGaussian(), {"mean": (2,), "log_scale": (2,)}),
    "poisson": Case(Poisson(), (3,)),
    "product": Case(
        HEADS,
        {"label": (3,), "box": {"mean": (2,), "log_scale": (2,)}, "count": (1,)},
    ),
    "log density": Case(LogDensity(), ()),
    "log amplitude": Case(LogAmplitude(), ()),
    "complex amplitude": Case(LogAmplitude(), (), complex=True),
    "from kl": Case(FromKL(exponential_kl), (3,)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
QUICK = ("categorical", "diagonal gaussian", "log density", "product")
some_cases_quick = pytest.mark.parametrize("case", long_unless(QUICK, CASES))
SEPARABLE = {name: c for name, c in CASES.items() if not c.likelihood.centered}
some_separable_cases_quick = pytest.mark.parametrize(
    "case", long_unless(QUICK, SEPARABLE)
)
WITH_LOG_PROB = {name: c for name, c in CASES.items() if name != "from kl"}
every_case_with_log_prob = pytest.mark.parametrize(
    "case", WITH_LOG_PROB.values(), ids=WITH_LOG_PROB
)
PRODUCTS = ("fisher_vp", "sqrt_fisher_vp", "sqrt_fisher_tvp")


@functools.cache
def jitted(likelihood, method):
    """A method, compiled once for all tests."""
    return jax.jit(getattr(likelihood, method))


def vdot(a, b):
    """Σ conj(a) b over all leaves, in float64 (complex128), by NumPy."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(np.vdot(to_numpy(x), to_numpy(y)) for x, y in pairs)


def to_numpy(x):
    x = jnp.asarray(x)
    return np.asarray(x, complex if jnp.iscomplexobj(x) else float)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(to_numpy(x), to_numpy(y), rtol=rtol, atol=atol)
