"""Trains one network: `python -m experiments.train task=... optimizer=... name=value`.

The library part is `experiments.running.loop`; `configs/` has all the settings.
With `distributed.num_processes` above one, this starts the others or is one of them.
"""

import signal
import sys
from pathlib import Path

from experiments.running.interruption import EXIT_INTERRUPTED, StopRequest

if __name__ == "__main__":  # before the imports, which take seconds
    StopRequest("Stopped before the first step.", (signal.SIGINT,)).__enter__()

import hydra
import jax
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.running.cache import use_cache
from experiments.running.config import (
    CONFIG_DIR,
    describe_error,
    expand,
    read_config,
    run_program,
)
from experiments.running.distributed import (
    EXIT_CONFIG_ERROR,
    broadcast_text,
    check_same,
    connect,
)
from experiments.running.launcher import launch
from experiments.running.loop import describe_result, run_training
from experiments.running.run_folder import (
    choose_folder,
    config_text,
    describe_resumption,
    open_run,
    plain_name,
    removed_if_empty,
    shorten,
)
from experiments.running.screen import Terminal
from experiments.running.settings import ConfigError


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def train_one(tree: DictConfig) -> None:
    """Trains the network that the composed configuration `tree` describes."""
    hydra_config = HydraConfig.get()
    folder = shorten(Path(hydra_config.runtime.output_dir))
    overrides = list(hydra_config.overrides.task)
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    try:
        with removed_if_empty(folder):
            processes = read_config(tree).distributed
            processes.check(is_sweep)
            if processes.is_launcher:
                open_run(tree, folder, overrides, is_sweep)
                status = launch(processes.num_processes, overrides, folder)
            else:
                with connect(processes), removed_if_empty(folder):
                    status = _train(tree, folder, overrides, is_sweep)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    if status:
        sys.exit(status)


def _train(tree: DictConfig, folder: Path, overrides: list[str], is_sweep: bool) -> int:
    # If there are several processes, the first one has chosen the folder.
    folder = shorten(Path(broadcast_text(str(folder.absolute()))))
    config = open_run(tree, folder, overrides, is_sweep)
    check_same(config_text(config), "settings")
    console = Terminal(soft_wrap=True, highlight=False, markup=False)
    try:
        result = run_training(config, folder, console)
    except OSError as error:
        if (message := describe_error(error)) is None:
            raise
        resumption = describe_resumption(folder, config.distributed.num_processes)
        raise ConfigError(f"{message}; to go on: {resumption}") from error
    if jax.process_index() == 0:
        console.print(describe_result(result, config, folder))
    if result.failure:
        print(f"error: {result.failure}", file=sys.stderr)
        return 0 if is_sweep else EXIT_CONFIG_ERROR  # a sweep continues
    return 0 if result.finished else EXIT_INTERRUPTED


def main() -> None:
    """Runs the command line."""
    use_cache()
    sys.argv[1:] = expand(sys.argv[1:])
    OmegaConf.register_new_resolver("run_folder", choose_folder, replace=True)
    OmegaConf.register_new_resolver("plain_name", plain_name, replace=True)
    run_program(train_one)


if __name__ == "__main__":
    main()
