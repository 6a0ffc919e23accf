"""curve_fit against SciPy, against NIST's certified values, and what it reports."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from experiments.benchmarks import nist
from ngd_jax.contrib import CurveFitStatus, curve_fit
from tests.conftest import unchecked

pytestmark = pytest.mark.usefixtures("strict_ranks")

X = np.linspace(0.1, 4, 30)
TRUTH = np.array([2.5, 1.3, 0.5])
START = np.array([1.0, 0.5, 0.0])


def decay(x, amplitude, rate, offset):
    return amplitude * jnp.exp(-rate * x) + offset


def decay_of_tree(x, tree, offset):
    return tree["amplitude"] * jnp.exp(-tree["rate"] * x) + offset


def make_data(seed, noise=0.05):
    rng = np.random.default_rng(seed)
    y = TRUTH[0] * np.exp(-TRUTH[1] * X) + TRUTH[2] + noise * rng.normal(size=X.size)
    return y, rng.uniform(0.5, 2, X.size)


def numpy_decay(x, amplitude, rate, offset):
    return amplitude * np.exp(-rate * x) + offset


def scipy_fit(y, sigma, absolute_sigma):
    return scipy.optimize.curve_fit(
        numpy_decay,
        X,
        y,
        START,
        sigma,
        absolute_sigma,
        ftol=1e-14,
        xtol=1e-14,
        gtol=1e-14,
    )


def status_of(fit):
    return CurveFitStatus(int(fit.status))


@hypothesis.given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["none", "scalar", "vector", "covariance"]),
    absolute_sigma=st.booleans(),
)
def test_parameters_and_covariance_are_those_of_scipy(seed, kind, absolute_sigma):
    with jax.enable_x64(True):
        y, deviations = make_data(seed)
        covariance = np.diag(deviations**2) + 0.2
        sigma = {
            "none": None,
            "scalar": 0.3,
            "vector": deviations,
            "covariance": covariance,
        }[kind]
        params, found, *rest = fit = curve_fit(
            decay, X, y, START, sigma, absolute_sigma=absolute_sigma
        )
        theirs = np.full(X.size, sigma) if kind == "scalar" else sigma
        expected, their_covariance = scipy_fit(y, theirs, absolute_sigma)
        np.testing.assert_allclose(params, expected, rtol=1e-6)
        # SciPy's derivatives are by differences.
        np.testing.assert_allclose(found, their_covariance, rtol=1e-4)
        np.testing.assert_allclose(
            fit.standard_errors, np.sqrt(np.diag(their_covariance)), rtol=1e-4
        )
        r = np.asarray(decay(X, *params)) - y
        weights = np.eye(X.size)
        if kind == "covariance":
            weights = np.linalg.inv(covariance)
        elif kind != "none":
            weights = np.diag(1 / np.broadcast_to(sigma, X.shape) ** 2)
        np.testing.assert_allclose(rest[0], r @ weights @ r, rtol=1e-9)
        assert status_of(fit) is CurveFitStatus.CONVERGED
        assert fit.relative_offset < 1e-8


def test_units_of_the_parameters_and_of_the_data_change_nothing(x64):
    y, _ = make_data(0)
    fit = curve_fit(decay, X, y, START + 0.1)
    units, unit = np.array([1e8, 1e-6, 1e-3]), 1e-30

    def scaled(x, *params):
        return unit * decay(x, *(p * u for p, u in zip(params, units, strict=True)))

    moved = curve_fit(scaled, X, unit * y, (START + 0.1) / units)
    np.testing.assert_allclose(np.asarray(moved.params) * units, fit.params, rtol=1e-9)
    errors = moved.standard_errors * units
    np.testing.assert_allclose(errors, fit.standard_errors, rtol=1e-7)
    assert status_of(moved) is CurveFitStatus.CONVERGED


def test_parameters_keep_the_structure_of_the_start(x64):
    y, _ = make_data(0)
    expected = curve_fit(decay, X, y, START).params
    assert expected.shape == (3,)
    start = ({"amplitude": jnp.ones((1,)), "rate": 0.5}, 0)
    fit = curve_fit(decay_of_tree, X, y, start)
    tree, offset = fit.params
    assert tree["amplitude"].shape == (1,)
    found = [tree["amplitude"][0], tree["rate"], offset]
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_data_of_any_shape_are_taken_entry_by_entry(x64):
    y, sigma = make_data(0)
    expected = curve_fit(decay, X, y, START, sigma)
    shape = (2, 15)
    fit = curve_fit(
        decay, X.reshape(shape), y.reshape(shape), START, sigma.reshape(shape)
    )
    np.testing.assert_allclose(fit.covariance, expected.covariance, rtol=1e-6)


def test_many_data_sets_at_once_are_fitted_as_one_by_one(x64):
    y = np.stack([make_data(seed)[0] for seed in range(3)])
    fits = jax.jit(jax.vmap(lambda y: curve_fit(decay, X, y, START)))(y)
    for i in range(3):
        alone = curve_fit(decay, X, y[i], START)
        np.testing.assert_allclose(fits.params[i], alone.params, rtol=1e-7)
        np.testing.assert_allclose(fits.covariance[i], alone.covariance, rtol=1e-5)
        assert fits.status[i] == CurveFitStatus.CONVERGED
    assert fits.standard_errors.shape == (3, 3)


def test_a_float32_fit_is_right_to_its_precision():
    y, sigma = make_data(0)
    fit = curve_fit(decay, X, y, START, sigma)
    assert fit.params.dtype == fit.covariance.dtype == jnp.float32
    expected, covariance = scipy_fit(y, sigma, False)
    errors = np.sqrt(np.diag(covariance))
    assert np.max(np.abs(fit.params - expected) / errors) < 1e-2
    np.testing.assert_allclose(fit.standard_errors, errors, rtol=1e-3)
    assert status_of(fit) is CurveFitStatus.CONVERGED


def test_a_curve_through_all_points_converges_to_round_off(x64):
    y = np.asarray(decay(X, *TRUTH))
    fit = curve_fit(decay, X, y, START)
    np.testing.assert_allclose(fit.params, TRUTH, rtol=1e-12)
    assert status_of(fit) is CurveFitStatus.CONVERGED


def test_a_start_at_the_solution_is_left_where_it_is(x64):
    y = np.asarray(decay(X, *TRUTH))
    fit = curve_fit(decay, X, y, TRUTH)
    np.testing.assert_allclose(fit.params, TRUTH, rtol=1e-14)
    assert status_of(fit) is CurveFitStatus.CONVERGED
    assert fit.num_steps == 1


def test_a_solution_at_zero_is_found_and_recognised(x64):
    y = np.asarray(decay(X, 2.5, 1.3, 0.0))
    fit = curve_fit(decay, X, y, [1.0, 0.5, 1.0])
    assert abs(fit.params[2]) < 1e-12
    assert status_of(fit) is CurveFitStatus.CONVERGED


def test_a_budget_that_is_used_up_is_reported(x64):
    y, _ = make_data(0)
    fit = curve_fit(decay, X, y, START, max_steps=2)
    assert status_of(fit) is CurveFitStatus.MAX_STEPS
    assert fit.num_steps == 2
    assert fit.relative_offset > 1e-6


def test_a_fit_that_round_off_keeps_from_settling_is_ended(x64):
    # Each step is of the size of the round-off in y, and none is below `rtol`.
    y, _ = make_data(0)
    fit = curve_fit(lambda x, a: 1e6 + a * x - 1e6, X, y, [1.0], rtol=0.0)
    assert status_of(fit) is CurveFitStatus.CONVERGED
    assert fit.num_steps < 100


def test_a_curve_that_no_step_improves_is_not_called_converged(x64):
    # Rounded to tenths, but with the derivative of the value before rounding.
    def steps(x, a):
        return a * x + jax.lax.stop_gradient(jnp.round(10 * a) / 10 - a) * x

    fit = curve_fit(steps, X, 1.23 * X, [1.2])
    assert status_of(fit) is CurveFitStatus.STALLED
    assert fit.relative_offset > 0.9


def test_parameters_that_the_data_do_not_determine_have_no_covariance(x64):
    y, _ = make_data(0)
    fit = curve_fit(lambda x, a, b: (a + b) * jnp.ones_like(x), X, y, [1.0, 2.0])
    np.testing.assert_allclose(fit.params[0] + fit.params[1], y.mean(), rtol=1e-6)
    assert status_of(fit) is CurveFitStatus.UNDETERMINED
    assert (fit.covariance == np.inf).all()


def test_as_many_points_as_parameters_leave_no_estimate_of_the_noise(x64):
    y, _ = make_data(0)
    points = slice(None, None, 12)
    for absolute_sigma in (False, True):
        fit = curve_fit(
            decay, X[points], y[points], START, absolute_sigma=absolute_sigma
        )
        assert status_of(fit) is CurveFitStatus.CONVERGED
        assert np.isfinite(fit.covariance).all() == absolute_sigma
        assert (fit.covariance == np.inf).all() != absolute_sigma


@pytest.mark.parametrize("where", ["ydata", "xdata", "p0", "sigma"])
def test_what_is_not_finite_is_reported_and_moves_nothing(where, x64):
    y, sigma = make_data(0)
    arguments = {"xdata": X, "ydata": y, "p0": START, "sigma": sigma}
    bad = arguments[where].copy()
    bad[1] = np.nan if where != "sigma" else 0.0
    fit = jax.jit(lambda **arguments: curve_fit(decay, **arguments))(
        **{**arguments, where: bad}
    )
    assert status_of(fit) is CurveFitStatus.NON_FINITE
    np.testing.assert_array_equal(fit.params, bad if where == "p0" else START)
    assert (fit.covariance == np.inf).all()


def test_a_region_where_the_curve_is_undefined_is_not_entered(x64):
    y = np.sqrt(0.2 + X)
    fit = curve_fit(lambda x, a: jnp.sqrt(a + x), X, y, [30.0])
    np.testing.assert_allclose(fit.params[0], 0.2, rtol=1e-10)
    assert status_of(fit) is CurveFitStatus.CONVERGED


def test_every_status_has_a_message():
    messages = {status.message for status in CurveFitStatus}
    assert len(messages) == len(CurveFitStatus)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"p0": 1.0}, TypeError, "`p0` must be a list or tuple"),
        ({"p0": {"a": 1.0}}, TypeError, "`p0` must be a list or tuple"),
        ({"p0": []}, ValueError, "`p0` must not be empty"),
        ({"p0": [1j, 1.0, 1.0]}, TypeError, "`p0` and `ydata` must be real"),
        ({"ydata": np.ones(30, np.complex64)}, TypeError, "must be real numbers"),
        ({"ydata": jnp.ones(30, jnp.float16)}, TypeError, "float16"),
        ({"ydata": np.ones(29)}, ValueError, "`f` must return an array of the shape"),
        (
            {"f": lambda *args: args},
            ValueError,
            "`f` must return an array of the shape (30,)",
        ),
        ({"f": lambda *args: args[0] * 1j}, TypeError, "`f` must return real numbers"),
        ({"sigma": np.ones(29)}, ValueError, "`sigma` must broadcast"),
        ({"sigma": np.ones((1, 30))}, ValueError, "`sigma` must broadcast"),
        ({"sigma": np.zeros(30)}, ValueError, "`sigma` must be positive"),
        ({"max_steps": 0}, ValueError, "`max_steps`"),
        ({"max_steps": 1.5}, TypeError, "`max_steps`"),
        ({"rtol": -1.0}, ValueError, "`rtol` must be None or in [0, 1)"),
        (
            {"xdata": np.ones(0), "ydata": np.ones(0)},
            ValueError,
            "`ydata` must not be empty",
        ),
    ],
)
def test_mistakes_name_the_argument(changes, error, message):
    arguments = {
        "f": decay,
        "xdata": X.astype(np.float32),
        "ydata": make_data(0)[0].astype(np.float32),
        "p0": [1.0, 0.5, 0.0],
        "sigma": None,
        **changes,
    }
    with pytest.raises(error, match=re.escape(message)):
        unchecked(curve_fit)(**arguments)


def test_an_f_that_holds_arrays_is_refused():
    class Curve:
        __hash__ = None

        def __call__(self, x, a):
            return a * x

    with pytest.raises(TypeError, match="`f` must be hashable"):
        curve_fit(Curve(), X, X, [1.0])


def test_reverse_mode_is_refused_in_our_words():
    with pytest.raises(TypeError, match="through curve_fit is not supported"):
        jax.grad(lambda y: curve_fit(decay, X, y, START).residual_sum)(make_data(0)[0])


def check_certified(name):
    problem = nist.load(name)
    for start in problem.starts:
        fit = curve_fit(problem.f, problem.x, problem.y, start)
        assert nist.digits(fit.params, problem.certified) >= 6, start
        assert status_of(fit) is CurveFitStatus.CONVERGED
        # What is left of Lanczos1's residuals is the round-off of its data.
        rtol = 1e-2 if name == "Lanczos1" else 1e-5
        np.testing.assert_allclose(fit.standard_errors, problem.deviations, rtol=rtol)
        np.testing.assert_allclose(fit.residual_sum, problem.residual_sum, rtol=rtol)


# An easy one, and those that column norms (MGH10, MGH17), the sizes of the parameters
# (Rat43) or a greedy first step (BoxBOD) lead astray.
HARD = ("Misra1a", "BoxBOD", "MGH10", "MGH17", "Rat43")


@pytest.mark.parametrize("name", HARD)
def test_certified_values_are_found_from_both_starts(name, x64):
    check_certified(name)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(nist.NAMES) - set(HARD)))
def test_all_certified_values_are_found_from_both_starts(name, x64):
    check_certified(name)


@pytest.mark.parametrize("name", nist.NAMES)
def test_models_and_data_are_those_that_were_certified(name, x64):
    problem = nist.load(name)
    r = np.asarray(problem.f(problem.x, *problem.certified)) - problem.y
    # At the certified digits of the parameters; Lanczos1 has a sum of 1e-25.
    rtol = 1e5 if name == "Lanczos1" else 1e-6
    np.testing.assert_allclose(r @ r, problem.residual_sum, rtol=rtol)
    assert len(problem.certified) == len(problem.deviations) == problem.starts.shape[1]
