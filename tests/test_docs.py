"""Every page of the site runs, and the figures that it prints are right."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CELL = re.compile(r"^```+\{code-cell\}[^\n]*\n(.*?)^```+$", re.DOTALL | re.MULTILINE)


def program(page: Path) -> str:
    """The cells of a page, without their options."""
    cells = CELL.findall(page.read_text())
    return "\n".join(re.sub(r"^:[\w-]+:.*\n", "", x, flags=re.MULTILINE) for x in cells)


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(DOCS).with_suffix("")) for page in pages]


PROGRAMS = [page for page in PAGES if program(page)]


def run(page: Path, folder: Path) -> str:
    """What a page prints when it runs as in the build of the site."""
    done = subprocess.run(
        [sys.executable, "-c", program(page)],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "MPLBACKEND": "agg",
            "PYTHONPATH": str(DOCS.parent),
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", PROGRAMS, ids=names(PROGRAMS))
def test_page_runs(page, tmp_path):
    """Pages assert the figures that they quote."""
    run(page, tmp_path)


@pytest.mark.long
def test_physics_informed_network_solves_its_equation(tmp_path):
    output = run(DOCS / "learn" / "equation.md", tmp_path)
    found = re.search(r"^L2 error (\S+)$", output, re.MULTILINE)
    assert found, output
    assert float(found[1]) <= 1e-5


@pytest.mark.long
def test_wave_function_finds_the_ground_state(tmp_path):
    output = run(DOCS / "learn" / "wave_function.md", tmp_path)
    found = re.search(r"relative error of the energy: (\S+)", output)
    assert found, output
    assert 0 < float(found[1]) < 1e-2
