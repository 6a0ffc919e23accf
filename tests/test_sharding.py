"""Whole steps on 8 devices, with every solver, against the same on one."""

import json
import os
import subprocess
import sys

import pytest

from tests.sharded_program import LAYOUTS, QUICK, SOLVERS

# Solvers on products never need the examples of another device. The Gram matrix is of
# pairs of examples, so its rows must meet; and a dense F is built by products in bulk.
GATHERS = {"sample_space", "jacobi", "cholesky", "default"}


def run(*names):
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.sharded_program", *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.long
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(
            tuple(set(SOLVERS) - set(QUICK)), id="others", marks=pytest.mark.slow
        ),
    ],
)
def test_a_step_is_the_same_on_eight_devices(names):
    """With automatic mesh axes, and with explicit ones (jax 0.12's default)."""
    found = run(*names)
    assert len(found) == len(LAYOUTS) * len(names)
    for place, report in found.items():
        assert report["error"] is None, (place, report)
        assert report["status"] == 0, place
        assert report["devices"] == 8, place
        assert report["difference"] <= 1e-9 * report["step"], (place, report)
        if "explicit" not in place and place.split(",")[0] not in GATHERS:
            assert report["gathered"] == 0, (place, report)
