"""The experiment on solves in the spaces of samples and of parameters."""

import decimal

import numpy as np
import pytest

import ngd_jax as ngd
from experiments.claims import spaces
from tests.experiments.claims.helpers import run


@pytest.mark.slow
def test_a_solve_that_stops_early_is_found_out(monkeypatch):
    monkeypatch.setattr(spaces, "_CG", ngd.CG(max_steps=60, rtol=1e-14))
    failed = [check.name for check in run(spaces.SPACES).checks if not check.holds]
    assert len(failed) == 1
    assert "difference" in failed[0]


def test_rows_have_the_singular_values_asked_for():
    rows = spaces.make_batch(0)["rows"].reshape(60, 300) / np.sqrt(20)
    values = np.linalg.svd(rows, compute_uv=False)
    np.testing.assert_allclose(values, np.geomspace(1, 1e-2, 60), rtol=1e-10)


def test_exact_directions_solve_the_system_to_many_digits():
    rng = np.random.default_rng(0)
    rows, residuals = rng.normal(size=(6, 9)), rng.normal(size=6)
    damping = 1e-8
    (exact,) = spaces.exact_directions(rows, residuals, np.array([damping]))
    with decimal.localcontext(prec=50):
        jacobian = spaces.to_decimal(rows)
        gradient = spaces.to_decimal(residuals) @ jacobian
        product = jacobian.T @ (jacobian @ exact)
        product += 20 * decimal.Decimal(damping) * exact
        error = max(abs(product - gradient))
    assert error < decimal.Decimal(10) ** -40


def test_textbook_formula_is_right_at_large_damping():
    rng = np.random.default_rng(0)
    rows, gradient = rng.normal(size=(6, 9)), rng.normal(size=9)
    expected = np.linalg.solve(rows.T @ rows + 0.5 * np.eye(9), gradient)
    found = spaces.textbook_woodbury(rows, gradient, 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
