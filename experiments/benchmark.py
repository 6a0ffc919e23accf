"""What natural gradient costs: `python -m experiments.benchmark [name=value ...]`.

Ratios to one gradient of the same network, interleaved in one process, as Markdown.
The library part is `experiments.measure`; `configs/benchmark.yaml` has the settings.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from experiments.measure.clocks import use_one_thread

use_one_thread()  # before JAX starts its threads

from experiments.config import CONFIG_DIR, read_as, run_program  # noqa: E402
from experiments.measure.settings import BenchmarkConfig  # noqa: E402
from experiments.measure.tables import (  # noqa: E402
    measure_network,
    measure_setup,
    network_name,
    write_markdown,
)
from experiments.settings import ConfigError  # noqa: E402


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="benchmark")
def benchmark(tree: DictConfig) -> None:
    """Measures everything and prints the tables."""
    try:
        config = read_as(OmegaConf.structured(BenchmarkConfig), tree)
    except ConfigError as error:
        sys.exit(f"error: {error}")  # Hydra would print a line of its own before
    columns = {}
    for widths in track(config.networks, "networks", transient=True):
        columns[network_name(widths, config.batch_size)] = measure_network(
            widths,
            batch_size=config.batch_size,
            cg_steps=config.cg_steps,
            repeats=config.repeats,
        )
    setup = measure_setup(
        config.networks[0],
        batch_size=config.batch_size,
        compile_repeats=config.compile_repeats,
        import_repeats=config.import_repeats,
    )
    markdown = write_markdown(columns, setup)
    print(markdown)
    if config.output is not None:
        Path(config.output).write_text(markdown)


def main() -> None:
    """Runs the command line."""
    run_program(benchmark)


if __name__ == "__main__":
    main()
