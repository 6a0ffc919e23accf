"""What all tests share: types checked at run time, hypothesis, and 64-bit mode."""

import inspect

import jaxtyping

# Before the first import of the library: annotations are checked in every call. Not
# those of the likelihoods, whose shape checks take `jax.ShapeDtypeStruct` for arrays.
jaxtyping.install_import_hook(
    [
        "ngd_jax.damping",
        "ngd_jax.fisher",
        "ngd_jax.preconditioners",
        "ngd_jax.solvers",
        "ngd_jax.tree",
        "ngd_jax.trust_region",
    ],
    "beartype.beartype",
)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# Compiling dominates, so few examples; the same ones in every run.
hypothesis.settings.register_profile(
    "quick",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile(
    "thorough", parent=hypothesis.settings.get_profile("quick"), max_examples=1000
)
hypothesis.settings.load_profile("quick")


@pytest.fixture
def x64():
    """Runs the test in 64-bit mode: arrays made inside of it are float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Runs the test once in each precision, in 64-bit mode where it is needed."""
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


@pytest.fixture
def strict_ranks():
    """Broadcasting between arrays of different rank raises."""
    with jax.numpy_rank_promotion("raise"):
        yield


def unchecked(function):
    """`function` without the run-time types, so that its own errors can be seen."""
    return inspect.unwrap(function)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
