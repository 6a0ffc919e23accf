"""The tables for an accelerator, small and on whatever device there is."""

import dataclasses

import pytest

from experiments.benchmarks.accelerator import accelerator_tables, step_table
from experiments.benchmarks.settings import AcceleratorSettings

SMALL = AcceleratorSettings(
    networks=["mlp_small"],
    precisions=["float32"],
    optimizers=["Adam", "CG(10)"],
    exact_network="mlp_small",
    steps=2,
    repeats=1,
    gram_limit=100,
    seconds=600.0,
)


@pytest.mark.long
def test_steps_are_measured_and_digits_compared_with_float64():
    steps, digits = accelerator_tables(SMALL)
    assert [row[2] for row in steps.rows] == ["Adam", "CG(10)"]
    adam, natural = steps.rows
    assert adam[-1] == "–"
    assert 0.8 <= float(natural[-1]) <= 1.0
    assert all(float(cell) > 0 for row in steps.rows for cell in row[3:-1])
    errors = {name: float(cell) for name, cell in digits.rows}
    assert len(errors) == 5
    assert all(0 < error < 2e-3 for error in errors.values())
    assert errors["gradient"] < 1e-5


def test_what_takes_too_long_or_is_too_large_is_told():
    settings = dataclasses.replace(SMALL, optimizers=["SampleSpace"])
    steps = step_table(settings)
    assert steps.rows == []
    assert "mlp_small float32 SampleSpace" in steps.notes[-1]
