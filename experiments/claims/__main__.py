"""The promises of the natural gradient, measured: `python -m experiments.claims`.

Runs every experiment, or one with `claim=name`, and writes a report with a summary,
tables of measured and expected figures, and plots. `quick=true` runs smaller
experiments. The library part is `experiments.claims`. The exit status is 1 if a figure
is not as expected.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import hydra
import jaxlib.version
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from experiments.benchmarks.clocks import use_one_thread

# Before JAX starts its threads, so that two experiments can share two cores. In a pool
# of several threads, batched LAPACK calls of jaxlib 0.10 may also deadlock.
use_one_thread()

# Most of a quick run is compilation. XLA's previous fusion emitters take a quarter less
# of it, for programs that are as correct and slightly slower. Later versions of jaxlib
# may not know the flag, and abort on an unknown one.
if "quick=true" in sys.argv and jaxlib.version.__version_info__ < (0, 11):
    flags = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"

from experiments.claims.catalog import CLAIMS  # noqa: E402
from experiments.claims.demonstrations import demonstrate_all  # noqa: E402
from experiments.claims.report import Outcome, save_plots, summarize, write_report  # noqa: E402
from experiments.running.config import CONFIG_DIR, read_as, run_program  # noqa: E402
from experiments.running.screen import Terminal  # noqa: E402
from experiments.running.settings import ConfigError, one_of  # noqa: E402


@dataclasses.dataclass
class ClaimsConfig:
    """Settings of the report.

    Attributes:
      claim: the name of a claim, or "all".
      quick: smaller experiments.
      output: the folder of the report.
    """

    claim: Annotated[str, one_of("all", *CLAIMS)]
    quick: bool
    output: str


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="claims")
def claims(tree: DictConfig) -> None:
    """Runs the experiments that `claim` selects and writes the report."""
    try:
        config = read_as(OmegaConf.structured(ClaimsConfig), tree)
    except ConfigError as error:
        sys.exit(f"error: {error}")  # Hydra would print a line of its own first
    chosen = list(CLAIMS.values()) if config.claim == "all" else [CLAIMS[config.claim]]
    console, folder = Terminal(), Path(config.output)
    outcomes: dict[str, Outcome] = {}
    columns = (*Progress.get_default_columns()[:1], BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("claims", total=len(chosen))
        for outcome in demonstrate_all(chosen, quick=config.quick):
            outcomes[outcome.claim.name] = outcome
            save_plots(outcome, folder)  # while others run
            progress.advance(task)
            mark = "as expected" if outcome.evidence.holds else "NOT as expected"
            line = f"{outcome.claim.name} ({outcome.seconds:.0f} s): {mark}. "
            console.print(
                line + outcome.evidence.headline, highlight=False, markup=False
            )
    in_order = [outcomes[claim.name] for claim in chosen]
    write_report(in_order, folder, quick=config.quick)
    console.print(summarize(in_order), highlight=False, markup=False)
    console.print(f"{folder / 'report.html'}, and {folder / 'report.md'}.")
    if not all(outcome.evidence.holds for outcome in in_order):
        sys.exit(1)


def main() -> None:
    """Runs the command line."""
    run_program(claims)


if __name__ == "__main__":
    main()
