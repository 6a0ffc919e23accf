"""Damping rules: their arithmetic, and NaN as the worst outcome."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ngd_jax as ngd

numbers = st.floats(-1e6, 1e6)


@given(actual=numbers, predicted=st.floats(0, 1e6), damping=st.floats(1e-8, 1e8))
def test_damping_moves_by_its_factors_and_stays_in_its_range(
    actual, predicted, damping
):
    rule = ngd.LevenbergMarquardt()
    new = float(rule.update(damping, actual=actual, predicted=predicted))
    actual, predicted = np.float32(actual), np.float32(predicted)
    if actual < rule.low * predicted:
        factor = rule.increase
    elif actual > rule.high * predicted:
        factor = rule.decrease
    else:
        factor = 1.0
    expected = np.clip(damping * factor, rule.minimum, rule.maximum)
    np.testing.assert_allclose(new, expected, rtol=1e-6)


@pytest.mark.parametrize("actual", [np.nan, -np.inf])
def test_a_loss_that_is_no_number_raises_damping_and_is_refused(actual):
    rule = ngd.LevenbergMarquardt()
    assert float(rule.update(1.0, actual=actual, predicted=1.0)) == rule.increase
    assert not bool(rule.accepts(actual=actual, predicted=1.0))


def test_a_prediction_that_is_no_number_raises_damping_and_is_refused():
    rule = ngd.LevenbergMarquardt()
    assert float(rule.update(1.0, actual=1.0, predicted=np.nan)) == rule.increase
    assert not bool(rule.accepts(actual=1.0, predicted=np.nan))


@given(actual=numbers, predicted=st.floats(0, 1e6), reject=st.floats(-2, 0.25))
def test_steps_are_kept_above_the_ratio_of_rejection(actual, predicted, reject):
    rule = ngd.LevenbergMarquardt(reject=reject)
    actual, predicted, bound = np.float32([actual, predicted, reject])
    expected = actual >= np.float32(bound * predicted)
    assert bool(rule.accepts(actual=actual, predicted=predicted)) == expected


def test_minus_infinity_refuses_nothing():
    rule = ngd.LevenbergMarquardt(reject=-np.inf)
    for actual in (-1e30, np.nan, -np.inf):
        assert bool(rule.accepts(actual=actual, predicted=1.0))


def test_jit_and_vmap_equal_a_loop():
    rule = ngd.LevenbergMarquardt()
    actual = jnp.array([-1.0, 0.3, 0.9, jnp.nan])

    def both(actual):
        damping = rule.update(2.0, actual=actual, predicted=1.0)
        return damping, rule.accepts(actual=actual, predicted=1.0)

    damping, accepted = jax.jit(jax.vmap(both))(actual)
    np.testing.assert_allclose(damping, [3, 2, 4 / 3, 3], rtol=1e-6)
    np.testing.assert_array_equal(accepted, [False, True, True, False])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"initial": 0.0}, "`initial` must be positive and finite, got 0.0"),
        ({"initial": np.inf}, "`initial` must be positive and finite"),
        ({"minimum": -1.0}, "`minimum` must be positive"),
        ({"maximum": np.nan}, "`maximum` must be positive"),
        ({"increase": 1.0}, "`increase` must be above 1, got 1.0"),
        ({"decrease": 1.0}, "`decrease` must be below 1, got 1.0"),
        ({"decrease": 0.0}, "`decrease` must be positive"),
        ({"low": 0.8}, "`reject` ≤ `low` < `high`"),
        ({"reject": 0.3}, "`reject` ≤ `low` < `high`"),
        ({"initial": 1e9}, "`initial` must lie between"),
    ],
)
def test_numbers_that_cannot_work_raise(options, match):
    with pytest.raises(ValueError, match=match):
        ngd.LevenbergMarquardt(**options)


@pytest.mark.parametrize("ratio", [0.0, -1.0, np.nan, np.inf])
def test_ratio_must_be_positive_and_finite(ratio):
    with pytest.raises(ValueError, match="`ratio` must be positive and finite"):
        ngd.RelativeDamping(ratio)


@pytest.mark.parametrize("units", [1e-6, 1.0, 1e6])
def test_relative_damping_is_in_units_of_the_mean_eigenvalue(units, rng):
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    fisher = ngd.linearize_fisher(
        lambda w, x: units * (x @ w), jnp.ones((3, 2)), x, ngd.Gaussian()
    )
    eigenvalues = units**2 * np.linalg.eigvalsh(np.asarray(x, float).T @ x / 8)
    damping = ngd.RelativeDamping(1e-2).value(fisher)
    np.testing.assert_allclose(damping, 1e-2 * eigenvalues.mean(), rtol=1e-5)
