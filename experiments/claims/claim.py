"""A claim, and the evidence that an experiment found for it."""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from matplotlib.figure import Figure

from experiments.benchmarks.markdown import Table

__all__ = [
    "Check",
    "Claim",
    "Evidence",
    "Plot",
    "Source",
    "check",
    "literature",
    "promise",
    "seen",
    "theory",
]

# Where a range comes from: a derivation, if only of a sign or an order of magnitude; a
# paper, named in the reason; the documentation of this library; or else earlier runs of
# the same experiment with margins set by hand, which reveal changes but prove nothing.
Source = Literal["theory", "literature", "promise", "measured"]


class Check(NamedTuple):
    """A figure, and the range that it must be in.

    Attributes:
      name: what was measured, in words with its unit.
      measured: the figure.
      low: the smallest value that supports the claim.
      high: the largest such value.
      source: where the range comes from.
      reason: the derivation, the paper or the earlier figure, in a few words.
    """

    name: str
    measured: float
    low: float
    high: float
    source: Source
    reason: str

    @property
    def holds(self) -> bool:
        """Whether the figure is in its range; NaN never is."""
        return self.low <= self.measured <= self.high

    @property
    def expected(self) -> str:
        """The range, written for the reader."""
        if self.low == self.high:
            return f"{self.low:.4g}"
        if self.low == -math.inf:
            return f"≤ {self.high:.3g}"
        if (self.low, self.high) == (sys.float_info.min, math.inf):
            return "> 0"
        if self.high == math.inf:
            return f"≥ {self.low:.3g}"
        return f"{self.low:.3g} to {self.high:.3g}"


class Expected(NamedTuple):
    """The range of a figure; see `Check`."""

    low: float
    high: float
    source: Source
    reason: str


def _expected(
    source: Source, low: float | None, high: float | None, reason: str
) -> Expected:
    return Expected(
        -math.inf if low is None else float(low),
        math.inf if high is None else float(high),
        source,
        reason,
    )


# Each makes a range from its low and high end, None for an open one, and the reason.
theory = functools.partial(_expected, "theory")
literature = functools.partial(_expected, "literature")
promise = functools.partial(_expected, "promise")
seen = functools.partial(_expected, "measured")


def check(name: str, measured: float, expected: Expected) -> Check:
    """A figure with its range, such as `theory(0, 1, "cosines of acute angles")`."""
    return Check(name, float(measured), *expected)


class Plot(NamedTuple):
    """A picture that can be understood without the code.

    Attributes:
      name: of its file, without the extension.
      caption: what it shows, in a sentence or two.
      figure: drawn with `experiments.claims.drawing`.
    """

    name: str
    caption: str
    figure: Figure


class Evidence(NamedTuple):
    """The result of the experiment on a claim.

    Attributes:
      headline: one line for the summary, with the key figures.
      setup: model, data, optimizers, precision and seeds, in a paragraph.
      checks: measured and expected figures.
      tables: further results.
      plots: pictures.
      notes: caveats and other remarks, a sentence each.
    """

    headline: str
    setup: str
    checks: Sequence[Check]
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()

    @property
    def holds(self) -> bool:
        """Whether every figure is in its range."""
        return all(check.holds for check in self.checks)


class Claim(NamedTuple):
    """A claim about the natural gradient, and the experiment on it.

    Attributes:
      name: as on the command line.
      title: a short sentence.
      statement: what is claimed.
      truth: whether it holds and under which condition, including what is false in it.
      source: who makes the claim.
      demonstrate: quick -> the evidence; quick runs are smaller, but as strict.
      x64: whether it runs in 64-bit mode.
      is_timed: whether it reports times, and so must not run beside another.
    """

    name: str
    title: str
    statement: str
    truth: str
    source: str
    demonstrate: Callable[[bool], Evidence]
    x64: bool = True
    is_timed: bool = False
