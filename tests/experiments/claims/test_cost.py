"""The experiment on cost: its operation counts, and that they can be wrong."""

import pytest

from experiments.benchmarks import contestants
from experiments.claims import cost


def test_a_product_that_does_more_is_found_out(monkeypatch):
    problem = cost.make_problem(cost._SMALL, 32)
    expected, _ = cost._multiplications(cost._SMALL)

    def error():
        return cost.price_of_products(problem)[1] / expected - 1

    assert abs(error()) < cost._TOLERANCE
    honest = contestants.products
    monkeypatch.setattr(
        contestants, "products", lambda problem, k: honest(problem, 2 * k)
    )
    assert error() > cost._TOLERANCE


def test_a_product_of_a_deep_network_of_equal_widths_costs_four_thirds():
    product, lone = cost._multiplications([64] * 1000)
    assert product == pytest.approx(4 / 3, rel=1e-3)
    assert lone == pytest.approx(5 / 3, rel=1e-3)
