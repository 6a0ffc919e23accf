"""The tutorial runs as it is, in its quick form, and comes to its eight digits."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_tutorial_solves_its_equation():
    result = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "tutorials" / "pinn.py"), "--quick"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    found = re.search(r"L2 error (\S+)", result.stdout)
    assert found, result.stdout
    assert float(found[1]) <= 1e-5
