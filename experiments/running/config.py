"""The configuration of a run: from Hydra's untyped tree to checked dataclasses.

`configs/` holds the values; the dataclasses hold the names, types and rules. Any
mistake becomes a one-line `ConfigError` that names the setting.
"""

import dataclasses
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from experiments.running.build import locate, settings_class
from experiments.running.distributed import DistributedConfig
from experiments.running.optimizers import check_optimizer
from experiments.running.settings import (
    AT_LEAST_ONE,
    NON_NEGATIVE,
    SEED,
    ConfigError,
    check_rules,
)

__all__ = [
    "CONFIG_DIR",
    "RESUMABLE_OVERRIDES",
    "TrainConfig",
    "check_without_data",
    "compose_config",
    "describe_error",
    "expand",
    "merge_resumed",
    "read_as",
    "read_config",
    "read_schema",
    "run_program",
]

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"

# What a resumed run may change: how far it goes, how often it reports or saves, and
# where its data is. None of these affects a number that the run computes.
RESUMABLE_OVERRIDES = (
    "steps",
    "checkpoint_every",
    "log_every",
    "prefetch",
    "task.data_dir",
    "task.cache_dir",
)

# Where to find the run and where to run it; not part of the run itself.
LOCATION_SETTINGS = re.compile(r"resume|runs_dir|distributed(\..*)?|hydra\..*")


@dataclasses.dataclass
class TrainConfig:
    """Settings of one training run.

    Attributes:
      task: what to learn; a group, `task=...`.
      optimizer: how to learn it; a group, `optimizer=...`, with the name of the
        constructor, `_target_`, and its arguments.
      seed: the only source of randomness.
      steps: total number of optimizer steps of the run.
      batch_size: examples in a batch; null for the whole training set.
      steps_per_dispatch: steps that run on the device before control returns to Python.
      eval_every: steps between evaluations on the whole training and test sets.
      checkpoint_every: steps between checkpoints.
      log_every: steps between rows on the screen; the files hold every step.
      eval_batch_size: examples per forward pass in evaluation.
      eval_train_examples: number of training examples that are evaluated; null for all.
      stream_above: a training set of more MiB than this stays on the host, and its
        batches are copied to the devices in advance; null for never.
      prefetch: number of dispatches whose batches are copied to the devices in advance.
      measure_kl: measure the KL of each step even if the optimizer does not need it.
      runs_dir: the folder of all run folders.
      resume: a run folder to continue, or "latest"; null for a new run.
      distributed: the processes of the run.
    """

    task: Any
    optimizer: dict[str, Any]
    seed: Annotated[int, SEED]
    steps: Annotated[int, AT_LEAST_ONE]
    batch_size: Annotated[int | None, AT_LEAST_ONE]
    steps_per_dispatch: Annotated[int, AT_LEAST_ONE]
    eval_every: Annotated[int, AT_LEAST_ONE]
    checkpoint_every: Annotated[int, AT_LEAST_ONE]
    log_every: Annotated[int, AT_LEAST_ONE]
    eval_batch_size: Annotated[int, AT_LEAST_ONE]
    eval_train_examples: Annotated[int | None, AT_LEAST_ONE]
    stream_above: Annotated[float | None, NON_NEGATIVE]
    prefetch: Annotated[int, AT_LEAST_ONE]
    measure_kl: bool
    runs_dir: str
    resume: str | None
    distributed: DistributedConfig


CANNOT_WRITE = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
)


def compose_config(overrides: list[str]) -> DictConfig:
    """Composes `configs/train.yaml` with command-line overrides, as `train` does."""
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        return compose("train", overrides=expand(overrides))


def expand(overrides: list[str]) -> list[str]:
    """Expands the short forms on the command line for problems of the user's own.

    `task=module:function` becomes the task that the function makes. `env=` and
    `problem=` become `task.env=` and `task.problem=` if there is no such file.
    """
    expanded = []
    for override in overrides:
        name, _, value = override.partition("=")
        is_file = (CONFIG_DIR / name / f"{value}.yaml").is_file()
        if "," in value:  # a sweep over names of files
            expanded.append(override)
        elif name == "task" and ":" in value:
            task_name = value.rpartition(":")[2].removeprefix("make_")
            expanded += ["task=own", f"task._target_={value}", f"task.name={task_name}"]
        elif name in ("env", "problem") and not is_file:
            expanded.append(f"task.{override}")
        else:
            expanded.append(override)
    return expanded


def read_config(tree: DictConfig) -> TrainConfig:
    """Turns an untyped tree into checked dataclasses.

    Raises:
      ConfigError: an unknown key, a missing one, a wrong type, or a broken rule.
    """
    schema = OmegaConf.structured(TrainConfig)
    schema.task = read_schema(tree)
    config = read_as(schema, tree)
    check_optimizer(config.optimizer)
    return config


def read_schema(tree: DictConfig) -> DictConfig:
    """Returns the names and types of the settings of the task of `tree`.

    Raises:
      ConfigError: `task._target_` does not name something that makes a task.
    """
    name = OmegaConf.select(tree, "task._target_")
    settings = settings_class(locate(name, "task._target_"))
    try:
        return OmegaConf.structured(settings)
    except OmegaConfBaseException as error:  # types that settings cannot have
        raise ConfigError(f"`task._target_`: {name} has {_explain(error)}") from error


def read_as(schema: DictConfig, tree: DictConfig) -> Any:
    """Turns an untyped tree into the dataclasses of `schema`, and checks their rules.

    Raises:
      ConfigError: an unknown key, a missing one, a wrong type, or a broken rule.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema, tree))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    check_rules(config)
    return config


def check_without_data(config: TrainConfig) -> None:
    """Checks the settings of a run whose task makes its own data.

    Raises:
      ConfigError: a setting concerns a training set, or asks for several processes.
    """
    for name in ("eval_train_examples", "stream_above"):
        if (value := getattr(config, name)) is not None:
            raise ConfigError(
                f"`{name}` is about a training set, and task={config.task.name} has "
                f"none: it must be null, got {value}."
            )
    if config.distributed.num_processes > 1:
        raise ConfigError(
            f"`distributed.num_processes` must be 1 for task={config.task.name}, got "
            f"{config.distributed.num_processes}."
        )


def run_program(program: Callable[[], None]) -> None:
    """Runs a Hydra program; after a mistake in its settings prints one line."""
    # Hydra would print the error and exit; we want the exception.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        program()
    except Exception as error:
        if (message := describe_error(error)) is None:
            raise
        sys.exit(f"error: {message}")


def merge_resumed(recorded: DictConfig, tree: DictConfig, names: list[str]) -> None:
    """Copies into `recorded` the overrides that a resumed run may change.

    Args:
      recorded: the configuration in the folder of the run; changed in place.
      tree: the configuration composed from this command line.
      names: dotted names of the settings that the command line overrides.

    Raises:
      ConfigError: an override would make it a different run.
    """
    for name in names:
        if LOCATION_SETTINGS.fullmatch(name):
            continue
        new, old = _value(tree, name), _value(recorded, name)
        if name in RESUMABLE_OVERRIDES:
            OmegaConf.update(recorded, name, new)
        elif new != old:
            raise ConfigError(
                f"A resumed run cannot change `{name}` from {old} to {new}; it takes "
                f"only {', '.join(RESUMABLE_OVERRIDES)}."
            )


def describe_error(error: Exception) -> str | None:
    """Returns a line about a bad configuration or a failing disk, else None."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        where = "" if error.filename is None else f": {error.filename}"
        return f"{error.strerror}{where}"
    if isinstance(error, HydraException | OmegaConfBaseException) or _is_from_hydra(
        error
    ):
        return _explain(error)
    return None


def _value(tree: DictConfig, name: str) -> Any:
    value = OmegaConf.select(tree, name.replace("/", "."))
    if not isinstance(value, DictConfig):
        return value
    # A group was chosen: the command line gives its name.
    return value.get("name") or value.get("_target_")


def _explain(error: Exception) -> str:
    for unknown in (error, error.__cause__):
        if isinstance(unknown, ConfigKeyError | ConfigAttributeError):
            return _explain_unknown(unknown)
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is not an override such as name=value."
    name = getattr(error, "full_key", None)
    if isinstance(error, MissingMandatoryValue):
        return f"`{name}` has no value."
    # The rest of the message is about Hydra's internals.
    message = re.split(r" {4}full_key:|Config search path:|See https:", str(error))[0]
    message = re.sub(r"\s+", " ", message).strip()
    _, from_resolver, ours = message.partition("ConfigError raised while resolving ")
    if from_resolver:
        return ours.partition(": ")[2]
    return f"`{name}`: {message}" if name else message


def _explain_unknown(error: Any) -> str:
    there = list(error.parent_node or ())
    named = ", ".join(name for name in there if name not in ("hydra", "_target_"))
    message = f"`{error.full_key}` is not a setting; there are {named}"
    if "_target_" in there:
        target = error.parent_node["_target_"]
        message += f"; a + before it adds an argument of {target} that is not set here"
    return f"{message}."


def _is_from_hydra(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(
        Path(hydra.__file__).parent
    )
