"""What one command line of `experiments.train` does, whichever process runs it."""

import sys
from pathlib import Path

import jax
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.running.config import describe_error, read_config
from experiments.running.distributed import (
    EXIT_CONFIG_ERROR,
    broadcast_text,
    check_same,
    connect,
)
from experiments.running.interruption import EXIT_INTERRUPTED
from experiments.running.launcher import launch
from experiments.running.loop import describe_result, run_training
from experiments.running.run_folder import (
    config_text,
    describe_resumption,
    open_run,
    removed_if_empty,
    shorten,
)
from experiments.running.screen import Terminal
from experiments.running.settings import ConfigError

__all__ = ["run_command"]


def run_command(tree: DictConfig) -> int:
    """Trains what `tree` describes, or starts the processes that do.

    Returns:
      The exit status.

    Raises:
      ConfigError: the settings, or what lies in the folder of the run.
    """
    hydra_config = HydraConfig.get()
    folder = shorten(Path(hydra_config.runtime.output_dir))
    overrides = list(hydra_config.overrides.task)
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    with removed_if_empty(folder):
        processes = read_config(tree).distributed
        processes.check(is_sweep)
        if processes.is_launcher:
            open_run(tree, folder, overrides, is_sweep)
            return launch(processes.num_processes, overrides, folder)
        with connect(processes), removed_if_empty(folder):
            return _train(tree, folder, overrides, is_sweep)


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
