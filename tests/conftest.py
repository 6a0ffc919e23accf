"""Shared by all tests: checked types, hypothesis, 64-bit mode, compiled programs."""

import functools
import gc
import inspect
import os
import shutil
import tempfile

# Programs that another worker has compiled are loaded with an error message about the
# very machine that compiled them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The threads of two workers would wait for each other in every small factorisation.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jaxlib.version

# Compiling is most of what the tests do. Left unoptimized, and with the fusion emitters
# that XLA had before, it takes a tenth. JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS=""
# runs the tests on programs as they come, as `.ci/run` does in part. Later versions of
# jaxlib may not know the flag, and end at it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if jaxlib.version.__version_info__ < (0, 11):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jaxtyping

# Before the first import of the library: annotations are checked in every call. Not
# those of the likelihoods, whose shape checks take `jax.ShapeDtypeStruct` for arrays.
jaxtyping.install_import_hook(
    [
        "ngd_jax.auto",
        "ngd_jax.contrib",
        "ngd_jax.damping",
        "ngd_jax.dense",
        "ngd_jax.fisher",
        "ngd_jax.jacobian",
        "ngd_jax.kfac",
        "ngd_jax.layers",
        "ngd_jax.microbatches",
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

# Tracing makes millions of small objects that live long: looking through all of them
# every few seconds took a tenth of the time.
gc.set_threshold(50_000, 20, 50)

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


_COMPILED = "NGD_JAX_TESTS_COMPILED"  # an environment variable: workers inherit it


def pytest_configure(config):
    """Compiles a program once for all workers; the programs of tests compile theirs."""
    is_worker = hasattr(config, "workerinput")
    if not is_worker:
        os.environ[_COMPILED] = tempfile.mkdtemp(prefix="ngd_jax-compiled-")
    jax.config.update("jax_compilation_cache_dir", os.environ[_COMPILED])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_unconfigure(config):
    """Removes what this run has compiled."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(_COMPILED), ignore_errors=True)


@functools.cache
def _compiles_float16():
    """Whether XLA can: it cannot for CPUs, or a choice of one, without F16C."""
    try:
        jax.jit(lambda x: x.astype(np.float32) + 1)(np.float16(1))
    except jax.errors.JaxRuntimeError:
        return False
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skips a test that compiles float16 where that cannot be."""
    try:
        return (yield)
    except jax.errors.JaxRuntimeError as error:
        if "Failed to materialize symbols" not in str(error) or _compiles_float16():
            raise
    pytest.skip("XLA compiles no float16 for this CPU")


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
def optimized():
    """Compiles programs as they come: two of the same steps then agree to the bit."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


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
