"""The report: a summary, then each claim, as Markdown and as HTML.

The HTML is one file with embedded pictures; the Markdown has them in a folder beside
it.
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
from experiments.claims.claim import Check, Claim, Evidence, Source

__all__ = ["Outcome", "save_plots", "summarize", "write_report"]

_STANDARDS: dict[Source, str] = {
    "theory": "theory",
    "literature": "the literature",
    "promise": "what the library promises",
    "measured": (
        "our own earlier measurements or bounds set by hand, which reveal changes but "
        "are no evidence"
    ),
}


class Outcome(NamedTuple):
    """A claim with its evidence.

    Attributes:
      claim: what was claimed.
      evidence: the result of the experiment.
      seconds: the time that it took, including compilation.
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


def summarize(outcomes: Sequence[Outcome]) -> str:
    """How many figures are as expected, by the source of their ranges."""
    checks = [check for outcome in outcomes for check in outcome.evidence.checks]
    parts = [
        f"{_count(some)} held to {words}"
        for source, words in _STANDARDS.items()
        if (some := [check for check in checks if check.source == source])
    ]
    return f"{_count(checks)} figures are as expected: {', '.join(parts)}."


def write_report(outcomes: Sequence[Outcome], folder: Path, *, quick: bool) -> None:
    """Writes `report.md`, `report.html` and `figures.json`, after `save_plots`."""
    markdown = _write_markdown(outcomes, quick=quick)
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    (folder / "report.html").write_text(_to_html(markdown, folder), encoding="utf-8")
    figures = {outcome.claim.name: _as_json(outcome) for outcome in outcomes}
    text = json.dumps(figures, indent=2, ensure_ascii=False)
    (folder / "figures.json").write_text(text + "\n", encoding="utf-8")


def _write_markdown(outcomes: Sequence[Outcome], *, quick: bool) -> str:
    size = "Quick runs: fewer steps, seeds and sizes. " if quick else ""
    contents = [
        f"- [{claim.title}](#{claim.name}): {evidence.headline}. "
        f"{_verdict(evidence)} figures as expected, in {seconds:.0f} s."
        for claim, evidence, seconds in outcomes
    ]
    parts = [
        f"# {_TITLE}",
        f"{summarize(outcomes)} {size}{describe_environment()}.",
        '<a id="contents"></a>\n\n## Contents',
        "\n".join(contents),
        *map(_write_outcome, outcomes),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _write_outcome(outcome: Outcome) -> str:
    claim, evidence, _ = outcome
    figures = Table(
        "Measured against expected",
        ["figure", "measured", "expected", "source", "reason", ""],
        [
            [
                check.name,
                _number(check.measured),
                check.expected,
                check.source,
                check.reason,
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
    parts.append(f"Again: `{again}`. [Back to the contents](#contents)")
    return "\n\n".join(part.rstrip() for part in parts)


def _count(checks: Sequence[Check]) -> str:
    return f"{sum(check.holds for check in checks)} of {len(checks)}"


def _verdict(evidence: Evidence) -> str:
    count = _count(evidence.checks)
    return count if evidence.holds else f"**{count}**"


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
                "source": check.source,
                "holds": check.holds,
            }
            for check in outcome.evidence.checks
        ],
    }


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


_TITLE = "The claims of the natural gradient, measured"
# The colours of text, links and background are the browser's, light or dark.
_STYLE = """
:root { color-scheme: light dark; --line: #ddd; --shade: #f4f4f4; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --shade: #262626; } }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5;
       font-family: system-ui, sans-serif; overflow-wrap: break-word; }
p, li { max-width: 42rem; }
p:has(img) { max-width: none; }
li { margin: 0.5rem 0; }
.scroll, pre { overflow-x: auto; }
table { border-collapse: collapse; width: max-content; margin: 1rem 0;
        font-size: 0.9rem; }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 0.6rem;
         max-width: 14rem; text-align: left; vertical-align: top; }
th, code { background: var(--shade); }
img { max-width: 100%; height: auto; }
h2 { margin-top: 3rem; border-top: 2px solid var(--line); padding-top: 1rem; }
"""


def _to_html(markdown: str, folder: Path) -> str:
    """One page with embedded pictures, for screens of any width."""
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)

    def inside(match: re.Match[str]) -> str:
        picture = (folder / match[1]).read_bytes()
        return f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"'

    body = re.sub(r'src="(plots/[^"]+\.png)"', inside, body)
    # Only a table that is wider than the screen scrolls sideways, also by keyboard.
    body = body.replace("<table>", '<div class="scroll" tabindex="0">\n<table>')
    body = body.replace("</table>", "</table>\n</div>")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_TITLE}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )
