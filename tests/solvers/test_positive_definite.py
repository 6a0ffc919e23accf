"""Factors and solves of S + λI against NumPy: bad scales, singular, not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngd_jax.solvers.positive_definite import (
    factorise,
    make_positive_definite,
    solve_refined,
    with_least_jitter,
)
from tests.solvers.systems import spectrum


@jax.jit
def _solve(matrix, b, damping):
    system = make_positive_definite(matrix, damping)
    jitter, x, residual = with_least_jitter(
        system, lambda jitter, factor: (jitter, *solve_refined(system, factor, b))
    )
    return jitter, x / system.unit, residual


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_solutions_are_those_of_the_system_in_any_unit(scale, rng, x64):
    matrix = spectrum(rng, np.geomspace(1e-6, 1, 8))
    b = rng.normal(size=8)
    expected = np.linalg.solve(matrix + 1e-3 * np.eye(8), b) / scale
    jitter, x, residual = _solve(scale * matrix, jnp.asarray(b), 1e-3 * scale)
    assert jitter == 0
    np.testing.assert_allclose(x, expected, rtol=1e-10)
    assert np.linalg.norm(residual) < 1e-11 * np.linalg.norm(b)


def test_rows_of_very_different_scales_keep_their_digits(rng):
    scales = np.geomspace(1e-9, 1e9, 6)
    matrix = spectrum(rng, np.linspace(1, 2, 6)) * np.outer(scales, scales)
    b = matrix @ (np.ones(6) / scales)
    _, x, _ = _solve(*(jnp.asarray(v, jnp.float32) for v in (matrix, b)), 0.0)
    np.testing.assert_allclose(x * scales, 1, rtol=1e-3)


def test_a_singular_matrix_has_the_least_jitter_that_makes_a_factor(rng, x64):
    root = rng.normal(size=(3, 6))
    matrix = root.T @ root
    b = matrix @ rng.normal(size=6)
    jitter, x, _ = _solve(jnp.asarray(matrix), jnp.asarray(b), 0.0)
    assert 0 <= jitter <= np.finfo(float).eps ** 0.5
    np.testing.assert_allclose(matrix @ x, b, rtol=1e-5, atol=1e-7)


def test_a_matrix_that_is_not_finite_has_no_factor():
    matrix = jnp.eye(4).at[2, 1].set(jnp.nan).at[1, 2].set(jnp.nan)
    _, exists = factorise(make_positive_definite(matrix, 1.0))
    assert not exists
    _, exists = factorise(make_positive_definite(jnp.eye(4), 1.0))
    assert exists


def test_size_is_the_norm_and_does_not_overflow():
    system = make_positive_definite(jnp.full((3, 3), 1e30), 0.0)
    np.testing.assert_allclose(system.size(), 3e30, rtol=1e-6)
