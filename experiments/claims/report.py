"""The report: a page that sums up, then each claim, as Markdown and as HTML.

The HTML is one file with its pictures inside; the Markdown has them in a folder beside.
"""

import base64
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markdown_it import MarkdownIt

from experiments.benchmarks.markdown import Table, describe_environment, write_table
from experiments.claims.claim import Claim, Evidence

__all__ = ["Outcome", "save_plots", "write_report"]


class Outcome(NamedTuple):
    """A claim with its evidence.

    Attributes:
      claim: what was claimed.
      evidence: what came out.
      seconds: that it took, compiling included.
    """

    claim: Claim
    evidence: Evidence
    seconds: float


def save_plots(outcome: Outcome, folder: Path) -> None:
    """Writes `plots/*.png` of one claim, where `write_report` looks for them."""
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for plot in outcome.evidence.plots:
        plot.figure.savefig(plots / f"{plot.name}.png")


def write_report(outcomes: Sequence[Outcome], folder: Path, *, quick: bool) -> None:
    """Writes `report.md`, `report.html` and `figures.json`, after `save_plots`."""
    markdown = _write_markdown(outcomes, quick=quick)
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    (folder / "report.html").write_text(_to_html(markdown, folder), encoding="utf-8")
    figures = {outcome.claim.name: _as_json(outcome) for outcome in outcomes}
    text = json.dumps(figures, indent=2, ensure_ascii=False)
    (folder / "figures.json").write_text(text + "\n", encoding="utf-8")


def _write_markdown(outcomes: Sequence[Outcome], *, quick: bool) -> str:
    checks = [check for outcome in outcomes for check in outcome.evidence.checks]
    good = sum(check.holds for check in checks)
    size = "Quick runs: fewer steps, seeds and sizes. " if quick else ""
    rows = [
        [
            f"[{claim.title}](#{claim.name})",
            evidence.headline,
            _count(evidence),
            f"{seconds:.0f}",
        ]
        for claim, evidence, seconds in outcomes
    ]
    head = ["claim", "what came out", "figures as expected", "seconds"]
    parts = [
        "# The claims of the natural gradient, measured",
        (
            f"{good} of {len(checks)} figures are in the range that theory or the "
            f"literature gives them. {size}{describe_environment()}."
        ),
        write_table(Table("In one page", head, rows)),
        *map(_write_outcome, outcomes),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _write_outcome(outcome: Outcome) -> str:
    claim, evidence, _ = outcome
    figures = Table(
        "Measured against expected",
        ["figure", "measured", "expected", "whence", ""],
        [
            [
                check.name,
                _number(check.measured),
                check.expected,
                check.source,
                "as expected" if check.holds else "**NOT as expected**",
            ]
            for check in evidence.checks
        ],
    )
    parts = [
        f'<a id="{claim.name}"></a>\n\n## {claim.title}',
        f"**Claimed.** {claim.statement} ({claim.source})",
        f"**Whether it holds.** {claim.truth}",
        f"**Set-up.** {evidence.setup}",
        write_table(figures),
    ]
    for plot in evidence.plots:
        parts += [f"![{plot.caption}](plots/{plot.name}.png)", f"*{plot.caption}*"]
    parts += map(write_table, evidence.tables)
    parts += evidence.notes
    again = f"python -m experiments.claims claim={claim.name}"
    parts.append(f"Again: `{again}`")
    return "\n\n".join(part.rstrip() for part in parts)


def _count(evidence: Evidence) -> str:
    good = sum(check.holds for check in evidence.checks)
    verdict = f"{good} of {len(evidence.checks)}"
    return verdict if evidence.holds else f"**{verdict}**"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "title": outcome.claim.title,
        "holds": outcome.evidence.holds,
        "seconds": round(outcome.seconds, 2),
        "checks": [
            {
                "name": check.name,
                "measured": _or_null(check.measured),
                "low": _or_null(check.low),
                "high": _or_null(check.high),
                "holds": check.holds,
            }
            for check in outcome.evidence.checks
        ],
    }


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


_STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5;
       font-family: system-ui, sans-serif; color: #1b1b1b; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; }
th, td { border-bottom: 1px solid #ddd; padding: 0.3rem 0.6rem; text-align: left; }
th { background: #f4f4f4; }
img { max-width: 100%; }
code { background: #f4f4f4; padding: 0.1rem 0.3rem; }
h2 { margin-top: 3rem; border-top: 2px solid #ddd; padding-top: 1rem; }
"""


def _to_html(markdown: str, folder: Path) -> str:
    """One page with the pictures inside."""
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)

    def inside(match: re.Match[str]) -> str:
        picture = (folder / match[1]).read_bytes()
        return f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"'

    body = re.sub(r'src="(plots/[^"]+\.png)"', inside, body)
    title = "The claims of the natural gradient, measured"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )
