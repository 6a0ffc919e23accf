"""The README's Python runs as it stands, and its commands have the promised form."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_python_of_the_readme_runs():
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, namespace)
    assert "info" in namespace


def test_first_two_commands_are_one_line_each_and_install_what_they_need():
    train, test = blocks("bash")[:2]
    for block, module in ((train, "experiments.train"), (test, "pytest")):
        assert len(block.splitlines()) == 1
        assert block.startswith("python3 -m venv .venv && .venv/bin/pip install")
        assert module in block
