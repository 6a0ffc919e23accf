"""Every public name has one entry in the reference, and every page one place in a menu.

Reads the pages as text, so that no Sphinx is needed.
"""

import collections
import re
from pathlib import Path

import pytest

import ngd_jax as ngd

DOCS = Path(__file__).parents[1] / "docs"
API = DOCS / "reference" / "api"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts]
PACKAGES = {"ngd_jax": ngd, "ngd_jax.flax": ngd.flax, "ngd_jax.contrib": ngd.contrib}
DIRECTIVE = re.compile(
    r"^\.\. (currentmodule|autofunction|autoclass|automodule|data):: ([\w.]+)"
    r"(?:\(.*\))?\n((?:   :.*\n)*)",
    re.MULTILINE,
)
TOCTREE = re.compile(r"^(`{3,}|:{3,})\{toctree\}\n(.*?)^\1$", re.DOTALL | re.MULTILINE)
OPTION = re.compile(r"^:([\w-]+):")


def entries():
    """The full name and the options of every entry of the API pages."""
    found = []
    for page in sorted(API.glob("*.md")):
        module = ""
        for kind, name, options in DIRECTIVE.findall(page.read_text()):
            if kind == "currentmodule":
                module = name
            else:
                full = name if kind == "automodule" else f"{module}.{name}"
                found.append((full, options))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_exactly_one_entry(package):
    counts = collections.Counter(
        name for name, _ in entries() if name.rpartition(".")[0] == package
    )
    expected = {f"{package}.{name}": 1 for name in PACKAGES[package].__all__}
    assert counts == expected


def test_entries_are_of_these_packages_only():
    assert {name.rpartition(".")[0] for name, _ in entries()} == set(PACKAGES)


def test_members_that_are_asked_for_exist():
    for full, options in entries():
        package, _, name = full.rpartition(".")
        members = re.search(r":members: (.+)", options)
        for member in members[1].split(", ") if members else ():
            assert hasattr(getattr(PACKAGES[package], name), member), (full, member)


def toctree_entries(page):
    """The paths of the pages in the toctrees of a page, relative to `docs`."""
    for _, body in TOCTREE.findall(page.read_text()):
        lines = [line.strip() for line in body.splitlines() if line.strip()]
        is_glob = any(line.startswith(":glob:") for line in lines)
        for line in lines:
            if OPTION.match(line):
                continue
            titled = re.fullmatch(r".*<(.+)>", line)
            target = titled[1] if titled else line
            if is_glob and any(sign in target for sign in "*?["):
                yield from page.parent.glob(f"{target}.md")
            else:
                yield page.parent / f"{target}.md"


def test_every_page_is_in_exactly_one_menu():
    places = collections.defaultdict(list)
    for page in PAGES:
        for entry in toctree_entries(page):
            places[str(entry.resolve().relative_to(DOCS))].append(page.name)
    pages = {str(page.relative_to(DOCS)) for page in PAGES} - {"index.md"}
    assert not set(places) - pages, "there is no such page"
    assert not pages - set(places), "in no toctree"
    assert all(len(parents) == 1 for parents in places.values()), dict(places)


def test_every_module_of_contrib_has_a_page():
    modules = {path.stem for path in Path(ngd.contrib.__file__).parent.glob("*.py")}
    pages = {path.stem for path in (DOCS / "contrib").glob("*.md")}
    assert pages == modules - {"__init__"}


def test_the_citation_names_this_version():
    text = (DOCS / "reference" / "citation.md").read_text()
    assert f"version = {{{ngd.__version__}}}" in text
