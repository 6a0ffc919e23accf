"""The prose of the report: it comes from the docstrings of the experiments.

    module                       title; "Claimed: ", "Verdict: ", "Source: ", "Note: "
    demonstrate, below its line  the set-up
    drawing, below its line      the caption of the picture

A `{name}` in them is a constant of the module, or a value that the experiment passes.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from experiments.claims.claim import Claim, Evidence, Plot

__all__ = ["claim_of", "described", "drawn", "labelled", "notes"]


def claim_of(
    demonstrate: Callable[[bool], Evidence], *, x64: bool = True, is_timed: bool = False
) -> Claim:
    """The claim that the docstring of a module makes, with its experiment."""
    module = sys.modules[demonstrate.__module__]
    title, *paragraphs = _paragraphs(module)
    statement, truth, source = (
        _labelled(paragraphs, label)[0] for label in ("Claimed", "Verdict", "Source")
    )
    return Claim(
        name=module.__name__.rpartition(".")[2],
        title=title.removesuffix("."),
        statement=statement,
        truth=truth,
        source=source,
        demonstrate=demonstrate,
        x64=x64,
        is_timed=is_timed,
    )


def described(function: Callable[..., Any], **values: Any) -> str:
    """What the docstring of a function says below its first line, filled in."""
    return _fill(" ".join(_paragraphs(function)[1:]), function, values)


def notes(function: Callable[..., Any], **values: Any) -> list[str]:
    """The notes in the docstring of the function's module, filled in."""
    found = _labelled(_paragraphs(sys.modules[function.__module__]), "Note")
    return [_fill(note, function, values) for note in found]


def labelled(function: Callable[..., Any], label: str, **values: Any) -> str:
    """The paragraph of a function's docstring that begins with `label`, filled in."""
    (found,) = _labelled(_paragraphs(function), label)
    return _fill(found, function, values)


def drawn(name: str, draw: Callable[..., Figure], *args: Any, **values: Any) -> Plot:
    """The picture that `draw` makes of `args`, with its caption."""
    return Plot(name, described(draw, **values), draw(*args))


def _paragraphs(documented: Any) -> list[str]:
    """The paragraphs of a docstring, each on one line."""
    text = inspect.getdoc(documented) or ""
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def _labelled(paragraphs: list[str], label: str) -> list[str]:
    start = f"{label}: "
    return [one.removeprefix(start) for one in paragraphs if one.startswith(start)]


def _fill(text: str, function: Callable[..., Any], values: dict[str, Any]) -> str:
    return text.format_map(vars(sys.modules[function.__module__]) | values)
