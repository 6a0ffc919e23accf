"""Trains one network: `python -m experiments.train task=... optimizer=... name=value`.

The library part is `experiments.loop.run_training`; `configs/` has all the settings.
"""

import contextlib
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments.config import CONFIG_DIR, run_program
from experiments.loop import describe_result, run_training
from experiments.run_folder import choose_folder, open_run, plain_name, shorten
from experiments.settings import ConfigError

EXIT_INTERRUPTED = 130


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def train_one(tree: DictConfig) -> None:
    """Trains the network that the composed configuration `tree` describes."""
    hydra_config = HydraConfig.get()
    folder = shorten(Path(hydra_config.runtime.output_dir))
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    try:
        config = open_run(tree, folder, list(hydra_config.overrides.task), is_sweep)
        result = run_training(config, folder, Console())
    except ConfigError as error:
        # Hydra made the folder before anyone had looked at the configuration.
        with contextlib.suppress(OSError):
            folder.rmdir()
            folder.parent.rmdir()
        sys.exit(f"error: {error}")
    print(describe_result(result, config, folder))
    if not result.finished:
        sys.exit(EXIT_INTERRUPTED)


def main() -> None:
    """Runs the command line."""
    OmegaConf.register_new_resolver("run_folder", choose_folder, replace=True)
    OmegaConf.register_new_resolver("plain_name", plain_name, replace=True)
    run_program(train_one)


if __name__ == "__main__":
    main()
