"""Error bars and autocorrelation times of known processes."""

import jax
import numpy as np
import pytest

from experiments.tasks.wave_functions.error_bars import (
    autocorrelation_time,
    standard_error,
    v_score,
)


def autoregression(phi, *shape):
    """x(t) = φ x(t - 1) + noise along the first axis, of variance 1 from its start."""
    noise = np.random.default_rng(0).normal(size=shape)
    draws = [noise[0]]
    for step in noise[1:]:
        draws.append(phi * draws[-1] + np.sqrt(1 - phi**2) * step)
    return np.stack(draws) + 3.0


@pytest.mark.parametrize("phi", [-0.3, 0.0, 0.5, 0.9])
def test_autocorrelation_time_of_an_autoregression_is_the_known_one(phi):
    found = autocorrelation_time(autoregression(phi, 2000, 100))
    assert float(found) == pytest.approx((1 + phi) / (1 - phi), rel=0.05)


def test_with_few_draws_all_lags_are_summed():
    found = autocorrelation_time(autoregression(0.9, 8, 20_000))
    assert float(found) == pytest.approx(1 + 2 * sum(0.9 ** np.arange(1, 8)), rel=0.05)


@pytest.mark.parametrize(("phi", "draws"), [(0.8, 8), (0.8, 100), (0.0, 1)])
def test_error_bars_are_the_spread_of_the_mean(phi, draws):
    repetitions = autoregression(phi, draws, 1000, 16).transpose(1, 0, 2)
    bars = np.asarray(jax.vmap(standard_error)(repetitions))
    spread = repetitions.mean((1, 2)).std()
    assert np.sqrt(np.mean(bars**2)) == pytest.approx(spread, rel=0.1)
    naive = repetitions.std() / np.sqrt(draws * 16)
    assert (naive < 0.6 * spread) == (phi > 0)  # so that the test can fail


def test_v_score_is_the_variance_in_units_of_the_energy():
    assert v_score(-8.0, 3.0, 16) == 0.75
