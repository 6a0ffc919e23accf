"""What the natural gradient promises, measured: `python -m experiments.claims`.

Runs every experiment, or one by `claim=name`, and writes a report with a page that sums
up, tables of measured against expected figures, and plots. `quick=true` takes smaller
ones. The library part is `experiments.evidence`. The exit status is 1 where a figure is
not as expected.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated

import hydra
import jax
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from experiments.config import CONFIG_DIR, read_as, run_program
from experiments.evidence import CLAIMS
from experiments.evidence.claim import Claim
from experiments.evidence.report import Outcome, write_report
from experiments.settings import ConfigError, one_of


@dataclasses.dataclass
class ClaimsConfig:
    """Settings of the report.

    Attributes:
      claim: the name of one, or "all".
      quick: smaller experiments.
      output: the folder of the report.
    """

    claim: Annotated[str, one_of("all", *CLAIMS)]
    quick: bool
    output: str


def demonstrate(claim: Claim, *, quick: bool) -> Outcome:
    """Runs one experiment, and times it."""
    start = time.perf_counter()
    with jax.enable_x64(claim.x64):
        evidence = claim.demonstrate(quick)
    return Outcome(claim, evidence, time.perf_counter() - start)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="claims")
def claims(tree: DictConfig) -> None:
    """Runs what `claim` says and writes the report."""
    try:
        config = read_as(OmegaConf.structured(ClaimsConfig), tree)
    except ConfigError as error:
        sys.exit(f"error: {error}")  # Hydra would print a line of its own before
    chosen = list(CLAIMS.values()) if config.claim == "all" else [CLAIMS[config.claim]]
    console, folder, outcomes = Console(), Path(config.output), []
    columns = (*Progress.get_default_columns()[:1], BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("claims", total=len(chosen))
        for claim in chosen:
            progress.update(task, description=claim.name)
            outcome = demonstrate(claim, quick=config.quick)
            outcomes.append(outcome)
            progress.advance(task)
            mark = "as expected" if outcome.evidence.holds else "NOT as expected"
            line = f"{claim.name} ({outcome.seconds:.0f} s): {mark}. "
            console.print(
                line + outcome.evidence.headline, highlight=False, markup=False
            )
    write_report(outcomes, folder, quick=config.quick)
    console.print(f"{folder / 'report.html'}, and {folder / 'report.md'}.")
    if not all(outcome.evidence.holds for outcome in outcomes):
        sys.exit(1)


def main() -> None:
    """Runs the command line."""
    run_program(claims)


if __name__ == "__main__":
    main()
