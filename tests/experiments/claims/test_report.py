"""The report on claims: what it says, and that a figure out of its range shows."""

import json
import math
import re
import sys
import threading
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from experiments.benchmarks.markdown import Table
from experiments.claims import texts
from experiments.claims.__main__ import main
from experiments.claims.catalog import CLAIMS
from experiments.claims.claim import (
    Claim,
    Evidence,
    Plot,
    check,
    literature,
    seen,
    theory,
)
from experiments.claims.demonstrations import demonstrate_all
from experiments.claims.report import (
    Outcome,
    save_plots,
    summarize,
    write_report,
)
from tests.experiments.helpers import run_program

GOOD = check("an error", 1e-16, theory(None, 1e-15, "round-off"))
BAD = check("a ratio | of two", 3.0, literature(1.0, 2.0, "Somebody 1998"))
SEEN = check("a count", 4.0, seen(4.0, 4.0, "seen before: 4"))


def outcome(*checks):
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, 1])
    evidence = Evidence(
        headline="the figures that tell",
        setup="A network.",
        checks=checks,
        tables=[Table("More", ["a"], [["1"]])],
        plots=[Plot("drawn", "What is to be seen.", figure)],
        notes=["The honest side."],
    )
    claim = Claim(
        name="some",
        title="Something is so",
        statement="It is so.",
        truth="It is, mostly.",
        source="Somebody 1998",
        demonstrate=lambda _quick: evidence,
    )
    return Outcome(claim, evidence, 1.4)


@pytest.mark.parametrize(
    ("measured", "low", "high", "holds"),
    [
        (0.0, 0.0, 0.0, True),
        (5e-324, 0.0, 0.0, False),
        (1.0, 1.0, None, True),
        (1.0, None, 1.0, True),
        (1.0 + 1e-15, None, 1.0, False),
        (math.nan, None, None, False),
    ],
)
def test_ranges_are_inclusive_and_hold_no_nan(measured, low, high, holds):
    assert check("a", measured, theory(low, high, "")).holds == holds


def test_a_range_without_a_reason_cannot_be_made():
    with pytest.raises(TypeError, match="reason"):
        theory(1.0, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.0, 0.0, "0"),
        (None, 1e-15, "≤ 1e-15"),
        (0.1, None, "≥ 0.1"),
        (sys.float_info.min, None, "> 0"),
        (0.1, 2.0, "0.1 to 2"),
    ],
)
def test_ranges_read_as_they_are_meant(low, high, text):
    assert check("a", 1.0, theory(low, high, "")).expected == text


def test_a_claim_is_what_the_docstring_of_its_module_says():
    claim = CLAIMS["divergence"]
    assert claim.name == "divergence"
    assert claim.title == "Equal parameters are at KL 0, and KL grows as outputs differ"
    assert claim.statement.startswith("The KL between two networks with the same par")
    assert claim.truth.endswith("give the same outputs, and thus KL 0.")
    assert claim.source == "Amari 1998, Natural gradient works efficiently in learning"


UNIT = "m"


def described_function():
    """One line.

    A length of {length:.1f} {UNIT}, over
    two lines.

    Condition: at rest, {{}}
    """


def test_texts_are_docstrings_with_constants_and_values():
    text = "A length of 2.0 m, over two lines. Condition: at rest, {}"
    assert texts.described(described_function, length=2) == text
    assert texts.labelled(described_function, "Condition", length=2) == "at rest, {}"
    with pytest.raises(KeyError, match="length"):
        texts.described(described_function)


def report(outcomes, folder, *, quick):
    for each in outcomes:
        save_plots(each, folder)
    write_report(outcomes, folder, quick=quick)


def test_report_tells_all_of_a_claim(tmp_path):
    report([outcome(GOOD)], tmp_path, quick=False)
    markdown = (tmp_path / "report.md").read_text()
    for text in (
        "1 of 1 figures are as expected: 1 of 1 held to theory.",
        "- [Something is so](#some): the figures that tell. 1 of 1 figures",
        "[Back to the contents](#contents)",
        "**Claimed.** It is so. (Somebody 1998)",
        "**Whether it holds.** It is, mostly.",
        "**Set-up.** A network.",
        "| an error | 1e-16 | ≤ 1e-15 | theory | round-off | as expected |",
        "**More**",
        "The honest side.",
        "python -m experiments.claims claim=some",
    ):
        assert text in markdown
    assert "Quick" not in markdown
    picture = re.search(r"\]\((plots/[^)]*)\)", markdown)[1]
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_report_shows_a_figure_out_of_its_range(tmp_path):
    report([outcome(GOOD, BAD)], tmp_path, quick=True)
    markdown = (tmp_path / "report.md").read_text()
    assert "1 of 2 figures are as expected" in markdown
    assert "**1 of 2**" in markdown
    assert "| 1 to 2 | literature | Somebody 1998 | **NOT as expected** |" in markdown
    assert "Quick runs" in markdown
    figures = json.loads((tmp_path / "figures.json").read_text())["some"]
    assert figures["holds"] is False
    found = [(check["holds"], check["source"]) for check in figures["checks"]]
    assert found == [(True, "theory"), (False, "literature")]


def test_summary_tells_evidence_from_earlier_measurements():
    summary = summarize([outcome(GOOD, BAD), outcome(GOOD, SEEN, SEEN)])
    assert summary.startswith(
        "4 of 5 figures are as expected: 2 of 2 held to theory, 0 of 1 held to the "
        "literature, 2 of 2 held to our own earlier measurements"
    )
    assert "promises" not in summary


class Page(HTMLParser):
    """Links, anchors, names of `<meta>`, alt texts, and what is around tables."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.metas, self.alts = [], [], {}, []
        self.open, self.around_tables = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors += [attributes["id"]] if "id" in attributes else []
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        elif tag == "meta":
            self.metas[attributes.get("name")] = attributes.get("content")
        elif tag == "img":
            self.alts.append(attributes["alt"])
        elif tag == "table":
            self.around_tables.append(self.open[-1])
        if tag != "meta":
            self.open.append((tag, attributes.get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag


def test_page_has_contents_with_links_and_fits_a_phone(tmp_path):
    first, second = outcome(GOOD, BAD), outcome(SEEN)
    second = second._replace(claim=second.claim._replace(name="other"))
    report([first, second], tmp_path, quick=False)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.anchors == ["contents", "some", "other"]
    assert page.links == ["#some", "#other", "#contents", "#contents"]
    assert page.metas["viewport"] == "width=device-width, initial-scale=1"
    assert page.around_tables == [("div", "scroll")] * 4
    assert page.alts == ["What is to be seen."] * 2
    for rule in (
        r"\.scroll, pre \{ overflow-x: auto",
        r"img \{ max-width: 100%",
        r"prefers-color-scheme: dark",
    ):
        assert re.search(rule, text)


def test_page_needs_nothing_but_itself(tmp_path):
    report([outcome(GOOD, BAD)], tmp_path, quick=False)
    page = (tmp_path / "report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert "http" not in page
    assert '<a id="some"></a>' in page
    assert page.count("<table>") == 2
    assert "a ratio | of two" in page


def test_claims_have_names_of_their_own():
    assert all(name == claim.name for name, claim in CLAIMS.items())
    assert len({claim.title for claim in CLAIMS.values()}) == len(CLAIMS)


def test_claims_that_tell_times_run_alone_and_the_others_two_by_two():
    evidence = outcome(GOOD).evidence
    running: set[str] = set()
    alone: dict[str, set[str]] = {}
    # Each of the others waits for one beside it, and alone would end in an error.
    pair = threading.Barrier(2, timeout=60)

    def claim(name, *, is_timed):
        def demonstrate(_quick):
            running.add(name)
            if is_timed:
                alone[name] = set(running)
            else:
                pair.wait()
                assert len(running) <= 2
                pair.wait()
            running.remove(name)
            return evidence

        return outcome(GOOD).claim._replace(
            name=name, demonstrate=demonstrate, is_timed=is_timed
        )

    claims = [claim(name, is_timed=name in "bd") for name in "abcdef"]
    done = [each.claim.name for each in demonstrate_all(claims, quick=True)]
    assert sorted(done) == list("abcdef")
    assert alone == {"b": {"b"}, "d": {"d"}}


def test_an_error_in_one_claim_ends_the_run():
    def broken(_quick):
        raise ZeroDivisionError("in an experiment")

    claim = outcome(GOOD).claim
    with pytest.raises(ZeroDivisionError, match="in an experiment"):
        list(demonstrate_all([claim, claim._replace(demonstrate=broken)], quick=True))


@pytest.mark.long
def test_program_refuses_a_claim_that_there_is_not():
    status, output = run_program("claim=free_lunch", module="experiments.claims")
    assert status == 1
    assert "`claim` must be one of all, divergence" in output
    assert "free_lunch" in output


@pytest.mark.long
def test_program_writes_the_report_and_says_where(tmp_path):
    folder = tmp_path / "report"
    status, output = run_program(
        "claim=divergence",
        "quick=true",
        f"output={folder}",
        module="experiments.claims",
    )
    assert status == 0, output
    assert "divergence" in output
    assert "8 of 8 figures are as expected: 8 of 8 held to theory." in output
    assert str(folder / "report.html") in output.replace("\n", "")
    assert (folder / "report.md").exists()
    assert json.loads((folder / "figures.json").read_text())["divergence"]["holds"]


def test_program_fails_where_a_figure_is_not_as_expected(tmp_path, monkeypatch):
    failing = outcome(GOOD, BAD).claim._replace(
        name="divergence", demonstrate=lambda _quick: outcome(GOOD, BAD).evidence
    )
    monkeypatch.setitem(CLAIMS, "divergence", failing)
    folder = tmp_path / "report"
    arguments = ["claims", "claim=divergence", f"output={folder}"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert "NOT as expected" in (folder / "report.md").read_text()
