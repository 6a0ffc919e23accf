"""The table of wave functions, on systems of a few samples."""

import pytest

from experiments.benchmarks.settings import WaveFunctionsSettings
from experiments.benchmarks.wave_functions import wave_function_tables


@pytest.mark.slow
def test_solvers_agree_and_those_that_are_not_done_say_so():
    settings = WaveFunctionsSettings(
        cells=[[64, 8], [64, 8, 8]], damping=1e-4, repeats=1, peer_python=None
    )
    (table,) = wave_function_tables(settings)
    rows = [dict(zip(table.head, row, strict=True)) for row in table.rows]
    ours = [row for row in rows if row["who"] == "ours"]
    assert {row["P"] for row in rows} == {"152", "217"}
    assert len(ours) == 12
    for row in ours:
        error, residual = float(row["direction error"]), float(row["residual"])
        if row["how"] in ("`SampleSpace`", "`Cholesky`"):
            assert error < 1e-8
            assert row["status"] == "converged"
        elif row["how"] == "`CG(10)`":
            assert error > 1e-3
            assert residual > 1e-4
            assert row["status"] == "max_steps"
        assert float(row["CPU ms"]) > 0
