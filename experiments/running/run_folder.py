"""The folder of one run: where it is, what it holds, and how to reopen it.

config.yaml       the resolved configuration
environment.json  versions and devices
metrics.jsonl     one line for each step; the same bytes each time a run is repeated
timings.jsonl     one line for each dispatch: seconds of training so far
result.json       losses and metrics after the last step, and seconds
curves.png        the curves; tensorboard/ has them too
checkpoints/      the training state, through Orbax, with checksums
.lock             held by the process that trains here

Files that were damaged from outside are reported, and kept as `<name>.damaged`.
"""

import contextlib
import dataclasses
import datetime as dt
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import yaml
from omegaconf import DictConfig, OmegaConf

from experiments.running.config import TrainConfig, merge_resumed, read_config
from experiments.running.settings import ConfigError

__all__ = [
    "CHECKSUMS",
    "choose_folder",
    "config_text",
    "describe_resumption",
    "find_run",
    "hydra_override",
    "latest_step",
    "locked",
    "open_run",
    "plain_name",
    "read_json_lines",
    "remove",
    "removed_if_empty",
    "set_aside",
    "shorten",
    "write_atomically",
    "write_config",
    "write_environment",
    "write_json",
]

CONFIG_FILE = "config.yaml"
CHECKSUMS = ".sha256"  # appended to the step; a checkpoint without it is incomplete
PACKAGES = ("jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "numpy")


def choose_folder(
    resume: str | None,
    runs_dir: str,
    task: str,
    optimizer: str,
    seed: int,
    process_id: int | None = None,
) -> str:
    """Returns the folder of the run to resume, or a new one named after the run.

    If there are several processes, the first one chooses for all; the others make none.
    This is the resolver `run_folder` of `configs/train.yaml`.
    """
    if process_id:
        return runs_dir
    if resume is not None:
        return str(find_run(resume, Path(runs_dir)))
    now = dt.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    name = f"{task}-{optimizer}-{now}"
    folder, number = Path(runs_dir) / name / f"seed{seed}", 2
    while folder.exists():
        folder = Path(runs_dir) / f"{name}-{number}" / f"seed{seed}"
        number += 1
    return str(folder)


def plain_name(text: str) -> str:
    """Replaces by dashes the characters of `text` that a command line must quote.

    This is the resolver `plain_name` of `configs/train.yaml`.
    """
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)


def find_run(resume: str, runs_dir: Path) -> Path:
    """Returns the run folder that `resume` names: a path, or "latest".

    Raises:
      ConfigError: there is no such run.
    """
    if resume == "latest":
        found = sorted(
            runs_dir.glob(f"**/{CONFIG_FILE}"), key=lambda path: path.stat().st_mtime
        )
        if not found:
            raise ConfigError(f"`resume=latest`: {runs_dir} holds no run.")
        return found[-1].parent
    if not (Path(resume) / CONFIG_FILE).is_file():
        raise ConfigError(
            f"`resume` must be the folder of a run, with its {CONFIG_FILE}, or latest; "
            f"got {resume!r}."
        )
    return Path(resume)


def open_run(
    tree: DictConfig, folder: Path, overrides: list[str], is_sweep: bool = False
) -> TrainConfig:
    """Returns the checked configuration of the run in `folder`, new or resumed.

    Args:
      tree: the configuration composed from this command line.
      folder: the run folder.
      overrides: the command line's overrides, such as "optimizer.max_kl=0.1".
      is_sweep: whether the command line starts several runs.

    Raises:
      ConfigError: the configuration is bad, or overrides do not suit the resumed run.
    """
    if tree.resume is None:
        if (folder / CONFIG_FILE).exists():
            raise ConfigError(
                f"{folder} already holds a run; resume={folder} continues."
            )
        return read_config(tree)
    if is_sweep:
        raise ConfigError("`resume` continues one run: leave out --multirun.")
    recorded = _load_config(folder / CONFIG_FILE)
    names = [override.lstrip("+~").partition("=")[0] for override in overrides]
    merge_resumed(recorded, tree, names)
    recorded.distributed = tree.distributed
    return read_config(recorded)


def _load_config(path: Path) -> DictConfig:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    with contextlib.suppress(ValueError, OSError, yaml.YAMLError):
        tree = OmegaConf.load(path)
        # A file that was cut short lacks its final newline or a setting.
        is_whole = path.read_bytes().endswith(b"\n")
        if isinstance(tree, DictConfig) and names <= tree.keys() and is_whole:
            return tree
    raise ConfigError(
        f"{path} is damaged. To restore it, run the command in environment.json again, "
        f"with `--cfg job > {path}` appended."
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes and locks `folder`; the lock ends with the process, however it ends.

    Raises:
      ConfigError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"Another process is training in {folder}.") from None
        except OSError:
            pass  # Some network file systems have no locks; train without one.
        yield


def latest_step(folder: Path) -> int | None:
    """Returns the step of the newest checkpoint in a run folder, if any."""
    names = (path.stem for path in (folder / "checkpoints").glob("*" + CHECKSUMS))
    return max((int(name) for name in names if name.isdecimal()), default=None)


def describe_resumption(folder: Path, num_processes: int = 1) -> str:
    """Returns the command that continues the run in `folder`."""
    resume = hydra_override("resume", str(folder))
    words = ["python", "-m", "experiments.train", resume]
    if num_processes > 1:
        words.append(f"distributed.num_processes={num_processes}")
    return shlex.join(words)


def hydra_override(name: str, value: str) -> str:
    """Returns `name=value`, quoted for Hydra unless the value is plain."""
    if re.fullmatch(r"[\w./+-]+", value, re.ASCII):
        return f"{name}={value}"
    escaped = value.replace('"', r"\"")
    return f'{name}="{escaped}"'


def shorten(path: Path) -> Path:
    """Returns `path` relative to the working directory if it lies within it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


@contextlib.contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Removes `folder` on exit if nothing was written there.

    Hydra makes the folder before anyone has checked the configuration.
    """
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
            folder.parent.rmdir()


def config_text(config: TrainConfig) -> str:
    """Returns the resolved configuration, the same for all processes of a run."""
    tree = OmegaConf.structured(config)
    tree.resume = None
    tree.distributed.process_id = tree.distributed.coordinator_address = None
    return OmegaConf.to_yaml(tree)


def write_config(config: TrainConfig, folder: Path) -> None:
    """Writes the resolved configuration."""
    write_atomically(folder / CONFIG_FILE, config_text(config).encode())


def write_environment(folder: Path) -> list[str]:
    """Writes versions and devices; returns a line for each difference from before."""
    path = folder / "environment.json"
    environment = {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "cpu_count": os.cpu_count(),
        "jax_enable_x64": bool(jax.config.jax_enable_x64),  # pyright: ignore[reportAttributeAccessIssue]
        "jax_default_matmul_precision": str(jax.config.jax_default_matmul_precision),  # pyright: ignore[reportAttributeAccessIssue]
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "command": sys.argv,
    }
    notices = []
    try:
        earlier = dict(json.loads(path.read_text())) if path.exists() else environment
    except (ValueError, TypeError):
        earlier = environment
        notices = [f"environment.json was damaged: it is kept as {set_aside(path)}."]
    write_json(path, environment)
    return notices + [
        f"The environment has changed: {name} was {earlier.get(name)}, is {value}."
        for name, value in environment.items()
        if name != "command" and earlier.get(name) != value
    ]


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, completely or not at all."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file with one JSON object per line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` completely or not at all, even if the power fails meanwhile."""
    draft = path.with_name(path.name + ".draft")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def set_aside(path: Path) -> Path:
    """Renames a damaged file or folder, and returns its new path."""
    target = path.with_name(path.name + ".damaged")
    remove(target)
    return path.replace(target)


def remove(path: Path) -> None:
    """Removes a file, or a folder with everything in it, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
