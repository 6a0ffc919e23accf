"""Whole steps on 8 devices, with every solver, against the same on one."""

import json
import os
import subprocess
import sys

import pytest

from tests.sharded_program import LAYOUTS, SOLVERS

# Solvers on products never need the examples of another device. The Gram matrix is of
# pairs of examples, so its rows must meet; and a dense F is built by products in bulk.
GATHERS = {"sample_space", "jacobi"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "cg" else pytest.mark.slow)
        for name in SOLVERS
    ],
)
def test_a_step_is_the_same_on_eight_devices(name):
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.sharded_program", name],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert len(found) == len(LAYOUTS)
    for layout, report in found.items():
        assert report["status"] == 0, layout
        assert report["devices"] == 8, layout
        assert report["difference"] <= 1e-9 * report["step"], (layout, report)
        if name not in GATHERS:
            assert report["gathered"] == 0, (layout, report)
