"""The race: `python -m experiments.compare task=... seeds=3 budget=60s`.

Optimizers train the same model from the same initial parameters on the same batches;
every peer is tuned over its grid. Writes a table and two plots into `output`, and
continues from the results already there. `only=[adam,muon]` runs a part of the race.
The library part is `experiments.race`; `configs/compare.yaml` and `configs/race/` have
the settings.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from experiments.benchmarks.clocks import use_one_thread

use_one_thread()  # before JAX starts its threads

from experiments.race.racing import Race  # noqa: E402
from experiments.race.report import write_report  # noqa: E402
from experiments.race.settings import check_task, read_compare  # noqa: E402
from experiments.running.config import CONFIG_DIR, expand, run_program  # noqa: E402
from experiments.running.screen import Terminal  # noqa: E402
from experiments.running.settings import ConfigError  # noqa: E402


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="compare")
def compare(tree: DictConfig) -> None:
    """Runs the race that the composed configuration `tree` describes."""
    console = Terminal(highlight=False, markup=False, soft_wrap=True)
    try:
        config, entrants = read_compare(tree)
        results = Race(config, entrants, console.print).run()
    except ConfigError as error:
        sys.exit(f"error: {error}")  # Hydra would print a line of its own first
    if not results:
        sys.exit("error: no entrant could run")
    folder = Path(config.output)
    console.print(write_report(results, config, entrants, folder))
    console.print(f"{folder / 'race.md'}, race.json, loss_steps.png, loss_seconds.png")


def checked_compare() -> None:
    """Checks what Hydra cannot say in our words, and runs the race."""
    check_task(sys.argv[1:])
    compare()


def main() -> None:
    """Runs the command line."""
    sys.argv[1:] = expand(sys.argv[1:])
    run_program(checked_compare)


if __name__ == "__main__":
    main()
