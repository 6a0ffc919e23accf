"""What natural gradient costs: `python -m experiments.benchmark [name=value ...]`.

Ratios to one gradient of the same network, interleaved in one process, as Markdown.
The library part is `experiments.measure`; `configs/benchmark.yaml` has the settings.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.progress import track

from experiments.measure.clocks import use_one_thread

use_one_thread()  # before JAX starts its threads

from experiments.config import CONFIG_DIR, describe_error  # noqa: E402
from experiments.measure.tables import (  # noqa: E402
    measure_network,
    measure_setup,
    network_name,
    write_markdown,
)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="benchmark")
def benchmark(config: DictConfig) -> None:
    """Measures everything and prints the tables."""
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
    """Runs the command line; a mistake in it ends as one line, not as a traceback."""
    try:
        benchmark()
    except Exception as error:
        if (message := describe_error(error)) is None:
            raise
        sys.exit(f"error: {message}")


if __name__ == "__main__":
    main()
