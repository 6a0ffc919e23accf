"""The common style of the report's pictures: sizes, colours, and axes."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.running.plots import add_legend

__all__ = ["COLORS", "finish", "new_figure"]

# One colour for each optimizer in all pictures, distinguishable without colour vision.
COLORS = {
    "natural gradient": "#08519c",
    "natural gradient, fixed rate": "#6baed6",
    "SGD": "#d94801",
    "SGD, clipped": "#fdae6b",
    "Adam": "#238b45",
    "theory": "#636363",
}


def new_figure(
    columns: int = 1, *, width: float = 7.0, height: float = 4.2
) -> tuple[Figure, Sequence[Axes]]:
    """A figure with axes side by side, readable at the width of a README."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    return figure, list(figure.subplots(1, columns, squeeze=False).flat)


def finish(axis: Axes, title: str, x: str, y: str, *, legend: bool = True) -> None:
    """Sets the title and the labels of an axis; labels include their units."""
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.grid(visible=True, which="major", alpha=0.3)
    if legend:
        add_legend(axis)
