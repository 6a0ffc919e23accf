"""The public face: names, documentation, and what importing it costs."""

import doctest
import inspect
import json
import subprocess
import sys

import pytest

import ngd_jax as ngd


def imported_by(statement):
    """The top-level modules in a fresh interpreter after `statement`."""
    program = f"""
import json, sys
{statement}
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"},
    )
    return set(json.loads(result.stdout))


def test_importing_the_library_imports_no_optional_package():
    plain = imported_by("import jax, optax")
    added = imported_by("import ngd_jax") - plain
    optional = {
        "beartype",
        "distrax",
        "experiments",
        "flax",
        "hydra",
        "lineax",
        "matplotlib",
        "orbax",
        "scipy",
        "sklearn",
        "tensorboardX",
    }
    assert "ngd_jax" in added
    assert not added & optional


def test_public_names_exist_once_and_are_sorted():
    constants = [name for name in ngd.__all__ if name.isupper()]
    classes = [n for n in ngd.__all__ if n[0].isupper() and not n.isupper()]
    functions = [name for name in ngd.__all__ if name[0].islower()]
    assert ngd.__all__ == sorted(constants) + sorted(classes) + sorted(functions)
    assert len(set(ngd.__all__)) == len(ngd.__all__)
    for name in ngd.__all__:
        assert getattr(ngd, name) is not None


def test_everything_of_ours_at_the_top_is_declared():
    ours = {
        name
        for name, value in vars(ngd).items()
        if getattr(value, "__module__", "").startswith("ngd_jax")
        and not name.startswith("_")
    }
    assert ours == set(ngd.__all__) - {"STATIC_ARGS"}


def test_version_is_a_version():
    assert all(part.isdigit() for part in ngd.__version__.split(".")[:2])


# What a user reads and never builds: reports, states and protocols.
READ_ONLY = {
    "Fisher",
    "NaturalGradientInfo",
    "NaturalGradientState",
    "Preconditioner",
    "RightHandSide",
    "STATIC_ARGS",
    "Solution",
    "SolverInfo",
    "TrustRegionResult",
    # For authors of solvers: the example of `Solver` shows them.
    "check_solution",
    "solve_scaled",
}


@pytest.mark.parametrize("name", sorted(set(ngd.__all__) - READ_ONLY))
def test_public_callables_have_an_example_that_runs(name):
    # The doctests show that it runs; this test shows that there is one.
    docstring = inspect.getdoc(getattr(ngd, name))
    assert "Example:" in docstring
    examples = doctest.DocTestParser().get_examples(docstring)
    assert examples


@pytest.mark.parametrize("name", sorted(set(ngd.__all__) - {"STATIC_ARGS"}))
def test_public_names_are_documented(name):
    value = getattr(ngd, name)
    first_line, *rest = inspect.getdoc(value).splitlines()
    assert first_line.endswith((".", "`.", ":")) or not rest
    if inspect.isclass(value):
        for attribute, method in inspect.getmembers(value, inspect.isfunction):
            if not attribute.startswith("_") and method.__module__.startswith("ngd"):
                assert inspect.getdoc(method), f"{name}.{attribute}"


CONTRACT = {
    *("Bernoulli", "Categorical", "DiagonalGaussian", "FromDistribution", "FromKL"),
    *("Gaussian", "Likelihood", "LogAmplitude", "LogDensity", "Poisson", "Product"),
    *("Fisher", "dense_fisher", "fisher_diagonal", "fisher_vector_product"),
    *("linearize_fisher", "mean_kl", "Metric", "take_examples"),
    *("CG", "LSMR", "Cholesky", "SampleSpace", "KFAC", "Kronecker", "Auto"),
    *("Solver", "Solution", "SolverInfo", "SolverStatus", "RightHandSide"),
    *("conjugate_gradient", "lsmr", "CovariantDamping", "LevenbergMarquardt"),
    *("RelativeDamping", "SufficientDecrease", "natural_gradient"),
    *("scale_by_natural_gradient", "NaturalGradientState", "NaturalGradientInfo"),
    *("StepStatus", "STATIC_ARGS", "describe"),
}


def test_the_contract_is_public():
    assert set(ngd.__all__) >= CONTRACT


def test_contrib_and_flax_are_reached_from_the_top_and_not_imported_before():
    assert set(ngd.contrib.__all__) >= {"SVD", "DampingSearch", "Nystrom", "Jacobi"}
    program = "import ngd_jax as n, sys; assert not {x} & set(sys.modules); n.flax"
    names = '{"ngd_jax.flax", "ngd_jax.contrib", "flax", "lineax"}'
    subprocess.run(
        [sys.executable, "-c", program.replace("{x}", names)],
        check=True,
        env={"PYTHONPATH": ":".join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"},
    )


def test_static_args_are_arguments_of_the_transformation():
    parameters = inspect.signature(ngd.natural_gradient).parameters
    assert set(ngd.STATIC_ARGS) <= set(parameters)
    # The rest are numbers or schedules, which `optax.inject_hyperparams` may trace.
    numbers = set(parameters) - set(ngd.STATIC_ARGS)
    assert numbers == {"learning_rate", "max_kl", "damping", "momentum"}
