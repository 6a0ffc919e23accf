"""Points that follow the residual: where they are, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks.equations.points import follow_residuals

CANDIDATES = jnp.arange(100.0)[:, None]


def draw(residuals, count=20, power=1.0, seeds=400):
    keys = jax.random.split(jax.random.key(0), seeds)

    @jax.jit  # with residuals as an argument: XLA squares constants that underflow
    def pick(keys, residuals):
        return jax.vmap(
            lambda key: follow_residuals(key, CANDIDATES, residuals, count, power)
        )(keys)

    return np.asarray(pick(keys, residuals))[..., 0].astype(int)


def test_no_point_is_drawn_twice():
    drawn = draw(jnp.where(jnp.arange(100) < 5, 1e6, 1.0), count=50, seeds=20)
    assert all(len(np.unique(row)) == 50 for row in drawn)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_the_first_point_has_the_density_of_the_residual(power, scale):
    """A tenth of the candidates have a residual that is three times as large."""
    is_large = jnp.arange(100) % 10 == 0
    drawn = draw(scale * jnp.where(is_large, -3.0, 1.0), 1, power, seeds=4000)
    raised = np.where(is_large, 3.0, 1.0) ** power
    density = 1 + raised / raised.mean()
    expected = (density * is_large).sum() / density.sum()
    # Four standard deviations of the fraction.
    tolerance = 4 * (expected * (1 - expected) / 4000) ** 0.5
    np.testing.assert_allclose((drawn % 10 == 0).mean(), expected, atol=tolerance)


def test_without_residuals_all_candidates_are_equally_likely():
    counts = np.bincount(draw(jnp.zeros(100), seeds=500).ravel(), minlength=100)
    np.testing.assert_allclose(counts, 100, atol=45)


def test_more_points_than_candidates_are_refused():
    with pytest.raises(ValueError, match="at most the number of candidates, 100"):
        follow_residuals(jax.random.key(0), CANDIDATES, jnp.ones(100), 101)
