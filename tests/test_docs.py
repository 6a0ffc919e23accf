"""The tutorials run as they stand, in a quick form."""

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def run(name, *arguments):
    command = [sys.executable, DOCS / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_your_wave_function_finds_the_ground_state():
    output = run("your_wave_function.py", "60")
    error = re.search(r"relative error of the energy: (\S+)", output)
    assert 0 < float(error[1]) < 1e-2
