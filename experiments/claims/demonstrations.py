"""Runs the experiments on claims, two at a time where no times are measured."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import jax

from experiments.claims.claim import Claim
from experiments.claims.report import Outcome

__all__ = ["demonstrate_all"]


def demonstrate_all(claims: Sequence[Claim], *, quick: bool) -> Iterator[Outcome]:
    """Yields results as they are done: timed experiments run alone, others in pairs.

    Most of the time is compilation, which uses a single core.
    """
    for claim in claims:
        if claim.is_timed:
            yield _demonstrate(claim, quick=quick)
    with ThreadPoolExecutor(max_workers=2) as threads:
        started = [
            threads.submit(_demonstrate, claim, quick=quick)
            for claim in claims
            if not claim.is_timed
        ]
        try:
            yield from (done.result() for done in as_completed(started))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _demonstrate(claim: Claim, *, quick: bool) -> Outcome:
    """Runs one experiment, and times it."""
    start = time.perf_counter()
    with jax.enable_x64(claim.x64):  # for this thread only
        evidence = claim.demonstrate(quick)
    return Outcome(claim, evidence, time.perf_counter() - start)
