"""Pictures of a run: curves with bands, and frames of an episode.

Bands are the 10 % and 90 % quantiles of the last episodes for a single agent, and range
from the lowest to the highest agent for several.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from experiments.running.plots import (
    CONTRAST,
    DARK,
    LIGHT,
    Records,
    save_figure,
    series,
    write_figure,
)

__all__ = ["can_draw", "draw_curves", "draw_frames"]

NUM_FRAMES = 8


def draw_curves(
    records: Records, path: Path, title: str, *, steps_per_update: int
) -> None:
    """Draws the records of a run (the lines of `metrics.jsonl`) into `path`.

    Args:
      records: one for each update of the policy.
      path: where to save the picture.
      title: a description of the run.
      steps_per_update: environment steps of an agent between two updates.
    """
    curves = _Curves(records, steps_per_update)
    figure = Figure(layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    figure.suptitle(title)
    _draw_returns(axes[0, 0], curves)
    _draw_kl(axes[0, 1], curves)
    _draw_acceptance(axes[0, 2], curves)
    _draw_solver(axes[1, 0], curves)
    curves.draw(axes[1, 1], "entropy", DARK)
    axes[1, 1].set(title="Entropy of the policy", ylabel="nats per action")
    _draw_value(axes[1, 2], curves)
    label = "environment steps of an agent (thousands)"
    scale = steps_per_update / 1000
    save_figure(figure, axes, path, records, label=label, scale=scale)


class _Curves:
    """The values of a run over its environment steps."""

    def __init__(self, records: Records, steps_per_update: int):
        self._records = records
        self._size = steps_per_update

    def get(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Thousands of environment steps where `name` is known, and its values."""
        steps, values = series(self._records, name)
        return self._size * steps / 1000, values

    def draw(
        self,
        axis: Axes,
        name: str,
        color: str,
        label: str | None = None,
        style: str = "-",
        bounds: Sequence[str] = ("{}_min", "{}_max"),
    ) -> bool:
        """Draws `name`, and its band if it has one; returns whether there was data."""
        steps, values = self.get(name)
        if not steps.size:
            return False
        low, high = (self.get(bound.format(name))[1] for bound in bounds)
        if low.size == high.size == steps.size:
            axis.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
        axis.plot(steps, values, style, color=color, label=label, ms=3)
        return True


def _draw_returns(axis: Axes, curves: _Curves) -> None:
    is_many = curves.get("return_min")[0].size
    bounds = ("return_min", "return_max") if is_many else ("return_low", "return_high")
    band = "agents" if is_many else "10 to 90 %"
    label = f"last 100 episodes ({band})"
    curves.draw(axis, "return", DARK, label, bounds=bounds)
    steps, values = curves.get("test_return")
    if steps.size:
        axis.plot(steps, values, "s", ms=5, color=CONTRAST, label="greedy evaluation")
    axis.set(title="Return", ylabel="return of an episode")


def _draw_kl(axis: Axes, curves: _Curves) -> None:
    axis.set(title="KL of the update", ylabel="mean KL per step (nats)")
    curves.draw(axis, "predicted_kl", LIGHT, "quadratic model")
    curves.draw(axis, "measured_kl", DARK, "measured", ".-")
    steps, radius = curves.get("max_kl")
    if steps.size:
        axis.plot(steps, radius, "--", color=CONTRAST, label="radius (max_kl)")
    axis.set_ylim(bottom=0.0)


def _draw_acceptance(axis: Axes, curves: _Curves) -> None:
    steps, actual = curves.get("improvement")
    _, expected = curves.get("expected_improvement")
    if actual.size and actual.size == expected.size:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = actual / expected
        label = "actual over expected improvement"
        axis.plot(steps, ratio, ".-", ms=4, color=DARK, label=label)
        _limit(axis, steps, ratio, -0.2, 1.8)
        steps, accepted = curves.get("accepted")
        if steps.size:
            label = "share of updates taken"
            axis.step(steps, accepted, where="mid", color=CONTRAST, label=label)
        axis.set(title="Acceptance", ylabel="ratio")
        return
    curves.draw(axis, "improvement", DARK)
    axis.set(title="Improvement", ylabel="of the surrogate")


def _draw_solver(axis: Axes, curves: _Curves) -> None:
    axis.set(title="Solver and step", ylabel="relative residual")
    if not curves.draw(axis, "solver_residual", DARK, style=".-"):
        axis.set_yticks([])
        axis.text(0.5, 0.5, "no residual", ha="center", transform=axis.transAxes)
        return
    axis.set_yscale("log")
    twin = axis.twinx()
    curves.draw(twin, "step_scale", CONTRAST)
    twin.set_ylim(bottom=0.0)
    twin.set_ylabel("step scale s in θ ← θ - s d", color=CONTRAST)


def _draw_value(axis: Axes, curves: _Curves) -> None:
    axis.set(title="Value function", ylabel="explained variance of the returns")
    name = "explained_variance"
    curves.draw(axis, name, DARK)
    steps, lowest = curves.get(f"{name}_min")  # for several agents
    if not steps.size:
        steps, lowest = curves.get(name)
    _limit(axis, steps, lowest, -1.0, 1.05)


def _limit(
    axis: Axes, steps: np.ndarray, values: np.ndarray, low: float, high: float
) -> None:
    """Limits `axis`, and marks at its edge the steps whose values lie outside."""
    axis.set_ylim(low, high)
    for edge, beyond, marker, text in (
        (low, values < low, "v", "below {:g}, down to {:.3g}"),
        (high, values > high, "^", "above {:g}, up to {:.3g}"),
    ):
        if beyond.any():
            extreme = values[beyond][np.argmax(np.abs(values[beyond] - edge))]
            axis.plot(
                steps[beyond],
                np.full(beyond.sum(), edge),
                marker,
                ms=5,
                color=DARK,
                clip_on=False,
                zorder=3,
                label=text.format(edge, extreme),
            )


def can_draw(name: str) -> bool:
    """Whether there are pictures of the environment `name`."""
    return name in PAINTERS


def draw_frames(name: str, observations: np.ndarray, path: Path, title: str) -> None:
    """Draws a strip of frames, evenly spaced in time, of one episode.

    Args:
      name: of the environment.
      observations: `[steps, ...]`, as the environment returned them.
      path: where to save the picture.
      title: written above it.
    """
    last = len(observations) - 1
    times = np.unique(np.linspace(0, last, NUM_FRAMES).round().astype(int))
    figure = Figure(figsize=(2.0 * len(times), 2.3), layout="constrained")
    figure.suptitle(title)
    axes = np.atleast_1d(figure.subplots(1, len(times)))
    for axis, time in zip(axes, times, strict=True):
        axis.set_aspect("equal")
        PAINTERS[name](axis, observations[time])
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(f"step {time}", fontsize=9)
    write_figure(figure, path)


def _paint_cart_pole(axis: Axes, observation: np.ndarray) -> None:
    position, _, angle, _ = observation
    axis.plot([-2.4, 2.4], [0, 0], color="0.6", lw=1)
    axis.add_patch(Rectangle((position - 0.3, -0.15), 0.6, 0.3, color=DARK))
    tip = position + 1.4 * np.sin(angle), 0.15 + 1.4 * np.cos(angle)
    axis.plot([position, tip[0]], [0.15, tip[1]], color=CONTRAST, lw=4)
    axis.set(xlim=(-2.6, 2.6), ylim=(-1.0, 2.2))


def _paint_pendulum(axis: Axes, observation: np.ndarray) -> None:
    cosine, sine, _ = observation
    axis.plot([0, -sine], [0, cosine], color=CONTRAST, lw=5)
    axis.add_patch(Circle((0, 0), 0.08, color=DARK))
    axis.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))


def _paint_acrobot(axis: Axes, observation: np.ndarray) -> None:
    first = np.arctan2(observation[1], observation[0])
    both = first + np.arctan2(observation[3], observation[2])
    elbow = np.array([np.sin(first), -np.cos(first)])
    tip = elbow + np.array([np.sin(both), -np.cos(both)])
    axis.axhline(1.0, color="0.6", lw=1)
    axis.plot(*np.stack([[0, 0], elbow, tip]).T, "o-", color=CONTRAST, lw=4, mec=DARK)
    axis.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2))


def _paint_mountain_car(axis: Axes, observation: np.ndarray) -> None:
    position, _ = observation
    x = np.linspace(-1.2, 0.6, 100)
    axis.plot(x, np.sin(3 * x) * 0.45, color="0.6")
    axis.axvline(0.45, color=LIGHT)
    axis.add_patch(
        Circle((position, np.sin(3 * position) * 0.45 + 0.06), 0.07, color=DARK)
    )
    axis.set(xlim=(-1.25, 0.65), ylim=(-0.6, 0.8))


PAINTERS: dict[str, Callable[[Axes, np.ndarray], None]] = {
    "CartPole-v1": _paint_cart_pole,
    "Pendulum-v1": _paint_pendulum,
    "Acrobot-v1": _paint_acrobot,
    "MountainCarContinuous-v0": _paint_mountain_car,
}
