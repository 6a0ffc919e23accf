"""The experiment on Fisher efficiency."""

import itertools

import numpy as np
import pytest

from experiments.claims import fisher_efficiency
from experiments.claims.fisher_efficiency import Method, expected_errors
from tests.experiments.claims.helpers import run


@pytest.mark.long
def test_another_rate_is_found_out(monkeypatch):
    """2/t has 4d / 3 for its limit."""
    original = fisher_efficiency.natural_gradient
    monkeypatch.setattr(
        fisher_efficiency, "natural_gradient", lambda rate: original(2 * rate)
    )
    first, *others = run(fisher_efficiency.FISHER_EFFICIENCY).checks
    assert not first.holds
    assert all(check.holds for check in others)


def test_expected_errors_equal_those_of_quadrature():
    """One step on every node of Gauss and Hermite, exact for polynomials."""
    eigenvalues, rate = np.array([1.0, 0.3]), 0.2
    offset = np.array([0.7, -1.1])
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    weights /= weights.sum()
    expected = 0.0
    for i, j, k in itertools.product(range(5), repeat=3):
        x, noise = np.sqrt(eigenvalues) * nodes[[i, j]], nodes[k]
        moved = offset - rate * x * (x @ offset - noise)
        expected += weights[[i, j, k]].prod() * eigenvalues @ moved**2
    method = Method("", "", np.array([rate]), eigenvalues)
    actual = expected_errors(method, eigenvalues * offset**2)
    np.testing.assert_allclose(actual, [expected], rtol=1e-12)


def test_expected_error_of_the_natural_gradient_goes_to_the_dimension():
    method = fisher_efficiency.methods(20_000)[0]
    errors = expected_errors(method, np.full(6, 1 / 20))
    assert 20_000 * errors[-1] == pytest.approx(6, rel=2e-3)
