"""What a claim is, and what an experiment found about it."""

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
    "at_most",
    "between",
    "exactly",
]

# Where a range comes from: a derivation, if only of a sign or an order of magnitude; a
# paper, which the reason names; the documentation of this library; or else earlier runs
# of the same experiment and margins set by hand, which show a change and prove nothing.
Source = Literal["theory", "literature", "promise", "measured"]


class Check(NamedTuple):
    """A figure, and the range that it must be in.

    Attributes:
      name: what was measured, in words with its unit.
      measured: the figure.
      low: the smallest value that bears the claim out.
      high: the largest one.
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
        """Whether the figure is in its range; a NaN is in none."""
        return self.low <= self.measured <= self.high

    @property
    def expected(self) -> str:
        """The range as it is to be read."""
        if self.low == self.high:
            return f"{self.low:.4g}"
        if self.low == -math.inf:
            return f"≤ {self.high:.3g}"
        if (self.low, self.high) == (sys.float_info.min, math.inf):
            return "> 0"
        if self.high == math.inf:
            return f"≥ {self.low:.3g}"
        return f"{self.low:.3g} to {self.high:.3g}"


def at_most(
    name: str, measured: float, high: float, source: Source, reason: str
) -> Check:
    """A figure with an upper bound."""
    return Check(name, float(measured), -math.inf, float(high), source, reason)


def between(
    name: str, measured: float, low: float, high: float, source: Source, reason: str
) -> Check:
    """A figure with a range; `math.inf` for one that is open above."""
    return Check(name, float(measured), float(low), float(high), source, reason)


def exactly(
    name: str, measured: float, value: float, source: Source, reason: str
) -> Check:
    """A figure that must have this very value, to the last bit."""
    return Check(name, float(measured), value, value, source, reason)


class Plot(NamedTuple):
    """A picture that is understood without the code.

    Attributes:
      name: of its file, without the ending.
      caption: what is to be seen in it, a sentence or two.
      figure: drawn with `experiments.claims.drawing`.
    """

    name: str
    caption: str
    figure: Figure


class Evidence(NamedTuple):
    """What came out of the experiment of a claim.

    Attributes:
      headline: the one line of the summary: the figures that tell.
      setup: model, data, optimizers, precision, seeds; a paragraph.
      checks: measured against expected.
      tables: further results.
      plots: pictures.
      notes: what else must be said, a sentence each: the honest side.
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
    """Something that is said of the natural gradient, and the experiment on it.

    Attributes:
      name: as on the command line.
      title: a short sentence.
      statement: what is claimed.
      truth: whether it is so and under which condition, including what is false in it.
      source: who says so.
      demonstrate: quick -> the evidence; quick runs are smaller, not laxer.
      x64: whether it runs in 64-bit mode.
      is_timed: whether it tells times, and so must not run beside another.
    """

    name: str
    title: str
    statement: str
    truth: str
    source: str
    demonstrate: Callable[[bool], Evidence]
    x64: bool = True
    is_timed: bool = False
