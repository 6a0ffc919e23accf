"""Every experiment on a claim: all of its figures are as expected."""

import pytest

from experiments.claims.catalog import CLAIMS
from tests.experiments.claims.helpers import assert_as_expected, run

MARKS = {
    **dict.fromkeys(("deep_linear", "empirical_fisher", "fisher_efficiency"), "long"),
    **dict.fromkeys(("flow", "invariance", "outliers", "spaces"), "long"),
    **dict.fromkeys(("autoencoder", "cost", "order", "step_size"), "slow"),
}
PICTURES = {
    "empirical_fisher": ["empirical_fisher_field", "empirical_fisher_cosine"],
    "invariance": ["invariance", "invariance_condition"],
}
# Rows of the first table, in quick runs and in full ones.
ROWS = {"autoencoder": (3, 3), "cost": (4, 5), "order": (3, 9)}


def with_mark(name):
    marks = [getattr(pytest.mark, MARKS[name])] if name in MARKS else []
    return pytest.param(name, marks=marks)


# `test_gallery` runs its own quick form.
@pytest.mark.parametrize(
    "name", [with_mark(name) for name in CLAIMS if name != "gallery"]
)
def test_figures_are_as_expected(name):
    evidence = run(CLAIMS[name])
    assert_as_expected(evidence)
    pictures = [plot.name for plot in evidence.plots]
    assert pictures == PICTURES.get(name, [name])
    if name in ROWS:
        assert len(evidence.tables[0].rows) == ROWS[name][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_figures_of_the_full_experiment_are_as_expected(name):
    evidence = run(CLAIMS[name], quick=False)
    assert_as_expected(evidence)
    if name in ROWS:
        assert len(evidence.tables[0].rows) == ROWS[name][1]
    if name == "cost":  # no product is above the limit, whatever the network
        assert all(check.measured < 1.7 for check in evidence.checks)
