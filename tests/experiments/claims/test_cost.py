"""The experiment on cost: its operation counts, and that they can be wrong."""

import pytest

from experiments.claims import cost
from tests.experiments.claims.helpers import assert_as_expected, run


@pytest.mark.slow
def test_figures_are_as_expected():
    evidence = run(cost.COST)
    assert_as_expected(evidence)
    assert len(evidence.tables[0].rows) == 4


@pytest.mark.slow
def test_figures_of_the_full_experiment_are_as_expected():
    evidence = run(cost.COST, quick=False)
    assert_as_expected(evidence)
    # No product is above the limit, whatever the network.
    assert all(check.measured < 1.7 for check in evidence.checks)


def test_a_product_that_does_more_is_found_out(monkeypatch):
    problem = cost.make_problem(cost._SMALL, 32)
    expected, _ = cost._multiplications(cost._SMALL)
    assert abs(cost._operations(problem)[0] / expected - 1) < cost._TOLERANCE
    honest = cost.products
    monkeypatch.setattr(cost, "products", lambda problem, k: honest(problem, 2 * k))
    assert cost._operations(problem)[0] / expected - 1 > cost._TOLERANCE


def test_a_product_of_a_deep_network_of_equal_widths_costs_four_thirds():
    product, lone = cost._multiplications([64] * 1000)
    assert product == pytest.approx(4 / 3, rel=1e-3)
    assert lone == pytest.approx(5 / 3, rel=1e-3)
