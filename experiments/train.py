"""Trains one network: `python -m experiments.train task=... optimizer=... name=value`.

The library part is `experiments.running.loop`; `configs/` has all the settings.
With `distributed.num_processes` above one, this starts the others or is one of them.
"""

import signal
import sys

from experiments.running.interruption import StopRequest

if __name__ == "__main__":  # before the imports, which take seconds
    StopRequest("Stopped before the first step.", (signal.SIGINT,)).__enter__()

import hydra
from omegaconf import DictConfig, OmegaConf

from experiments.running.cache import use_cache
from experiments.running.command import run_command
from experiments.running.config import CONFIG_DIR, expand, run_program
from experiments.running.run_folder import choose_folder, plain_name
from experiments.running.settings import ConfigError


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def train(tree: DictConfig) -> None:
    """Trains the network that the composed configuration `tree` describes."""
    try:
        status = run_command(tree)
    except ConfigError as error:
        sys.exit(f"error: {error}")  # Hydra would print a line of its own before
    if status:
        sys.exit(status)


def main() -> None:
    """Runs the command line."""
    use_cache()
    sys.argv[1:] = expand(sys.argv[1:])
    OmegaConf.register_new_resolver("run_folder", choose_folder, replace=True)
    OmegaConf.register_new_resolver("plain_name", plain_name, replace=True)
    run_program(train)


if __name__ == "__main__":
    main()
