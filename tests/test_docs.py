"""The tutorials run as they stand, in their quick form."""

import os
import re
import subprocess
import sys
from pathlib import Path

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"


def run(name: str) -> str:
    return subprocess.run(
        [sys.executable, TUTORIALS / name, "--quick"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    ).stdout


def test_physics_informed_network_solves_its_equation():
    output = run("pinn.py")
    found = re.search(r"L2 error (\S+)", output)
    assert found, output
    assert float(found[1]) <= 1e-5


def test_wave_function_finds_the_ground_state():
    output = run("wave_function.py")
    found = re.search(r"relative error of the energy: (\S+)", output)
    assert found, output
    assert 0 < float(found[1]) < 1e-2
