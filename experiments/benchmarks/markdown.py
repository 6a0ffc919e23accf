"""Tables of results as Markdown, and whether goals are met."""

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import NamedTuple

import jax

import ngd_jax as ngd

__all__ = [
    "Figure",
    "Table",
    "describe_environment",
    "goal_of",
    "value_of",
    "write_table",
]


class Figure(NamedTuple):
    """A measured figure and its goal.

    Attributes:
      name: what was measured, in words with its unit.
      value: the figure.
      goal: the largest acceptable value; None if there is none.
    """

    name: str
    value: float
    goal: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the figure is within its goal; a NaN never is."""
        return self.goal is None or self.value <= self.goal


class Table(NamedTuple):
    """One table, with its goals.

    Attributes:
      title: what the rows and columns are.
      head: the names of the columns.
      rows: the cells, as shown to the reader.
      goals: figures listed below the table, each with its goal.
      notes: what else a reader must know, one sentence each.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    goals: Sequence[Figure] = ()
    notes: Sequence[str] = ()


def describe_environment() -> str:
    """Versions and device, in one line."""
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")
    }
    where = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{where}, ngd_jax {ngd.__version__}, Python {platform.python_version()}; "
        f"{jax.devices()[0].device_kind}"
    )


def value_of(figure: Figure) -> str:
    """The figure as a cell, marked if its goal is missed."""
    return f"{figure.value:.3g}" + ("" if figure.is_met else " (missed)")


def goal_of(figure: Figure) -> str:
    """The goal as a cell."""
    return "" if figure.goal is None else f"≤ {figure.goal:g}"


def write_table(table: Table) -> str:
    """The table under its title, followed by its goals and notes."""
    lines = [
        f"**{table.title}**",
        "",
        _row(table.head),
        "|" + "---|" * len(table.head),
        *map(_row, table.rows),
        "",
    ]
    if table.goals:
        lines += [f"- {_judge(figure)}" for figure in table.goals] + [""]
    if table.notes:
        lines += [" ".join(table.notes), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _judge(figure: Figure) -> str:
    if figure.goal is None:
        return f"{figure.name}: {figure.value:.3g}."
    verdict = "met" if figure.is_met else "MISSED"
    return f"{figure.name}: {verdict}, {figure.value:.3g} against {goal_of(figure)}."
