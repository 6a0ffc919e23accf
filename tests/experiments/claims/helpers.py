"""Runs the experiments for their tests."""

import re

import jax

from experiments.claims.claim import Claim, Evidence

__all__ = ["assert_as_expected", "run"]


def run(claim: Claim, *, quick: bool = True) -> Evidence:
    """The evidence of a claim, as `python -m experiments.claims` gets it."""
    with jax.enable_x64(claim.x64):
        return claim.demonstrate(quick)


def assert_as_expected(evidence: Evidence) -> None:
    """Every figure is in its range, and there are some; a paper has its year."""
    assert evidence.checks
    for check in evidence.checks:
        assert check.reason
        assert check.source != "literature" or re.search(r"\b\d{4}\b", check.reason)
        assert check.holds, f"{check.name}: {check.measured}, not {check.expected}"
