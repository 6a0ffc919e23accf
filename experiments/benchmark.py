"""The cost of natural gradient: `python -m experiments.benchmark [table=name ...]`.

Prints, as Markdown, ratios to the cost of one gradient of the same network, measured
alternately in one process. The tables are products (the default), solvers, trpo, vmc,
price (a step in units of Adam's: compile time, run time and memory) and nist (curve
fits against certified values); `table=all` prints all of them.
The library part is `experiments.benchmarks`; `configs/benchmark.yaml` has the settings.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from experiments.benchmarks.clocks import use_one_thread

use_one_thread()  # before JAX starts its threads

from experiments.benchmarks.settings import BenchmarkConfig  # noqa: E402
from experiments.benchmarks.tables import measure_tables, select, write_tables  # noqa: E402
from experiments.running.config import CONFIG_DIR, read_as, run_program  # noqa: E402
from experiments.running.screen import Terminal  # noqa: E402
from experiments.running.settings import ConfigError  # noqa: E402


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="benchmark")
def benchmark(tree: DictConfig) -> None:
    """Measures what `table` selects and prints it."""
    try:
        config = read_as(OmegaConf.structured(BenchmarkConfig), tree)
    except ConfigError as error:
        sys.exit(f"error: {error}")  # Hydra would print a line of its own first
    tables = []
    for name in track(select(config.table), "tables", transient=True):
        tables += measure_tables(name, config)
    markdown = write_tables(tables)
    if config.output is not None:
        Path(config.output).write_text(markdown)
    Terminal(highlight=False, markup=False, soft_wrap=True).print(markdown)


def main() -> None:
    """Runs the command line."""
    run_program(benchmark)


if __name__ == "__main__":
    main()
