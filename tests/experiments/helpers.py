"""Small runs of the real program, inside this process and as a process of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments.running.checkpoints import Checkpoints
from experiments.running.config import TrainConfig, compose_config, read_config
from experiments.running.loop import Result, run_training
from experiments.running.optimizers import make_optimizer
from experiments.tasks import make_task
from experiments.tasks.supervised.training import TrainState, init_state

REPOSITORY = Path(__file__).resolve().parents[2]

# A network of a few neurons and batches of a few digits.
SMALL = (
    "task.hidden_sizes=[8]",
    "batch_size=64",
    "steps=6",
    "steps_per_dispatch=2",
    "eval_every=3",
    "checkpoint_every=4",
)


# The files in `configs/optimizer/` that train on any data set.
OPTIMIZERS = (
    *("adam", "adamw", "lbfgs", "muon", "natural_gradient"),
    *("natural_gradient_defaults", "sgd"),
)


def make_config(*overrides: str) -> TrainConfig:
    return read_config(compose_config([*SMALL, *overrides]))


def train(folder: Path, *overrides: str, console: Console | None = None) -> Result:
    console = console or Console(quiet=True)
    return run_training(make_config(*overrides), folder, console)


def train_config(config: TrainConfig, folder: Path) -> Result:
    return run_training(config, folder, Console(quiet=True))


def start_program(
    *overrides: str, module: str = "experiments.train", within: tuple[str, ...] = ()
) -> subprocess.Popen:
    """Starts `python -m` a program in the repository root, as a command of `within`."""
    return subprocess.Popen(
        [*within, sys.executable, "-m", module, *overrides],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "NGD_JAX_CACHE": os.environ["NGD_JAX_TESTS_COMPILED"],
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_program(*overrides: str, **arguments: Any) -> tuple[int, str]:
    """Runs the program to its end; returns its exit status and all that it printed."""
    process = start_program(*overrides, **arguments)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Returns once `path` exists; fails if the process ends before."""
    while not path.exists():
        if process.poll() is not None:
            raise AssertionError(f"ended before {path}: {process.stdout.read()}")
        time.sleep(0.005)


def first_state(config: TrainConfig) -> TrainState:
    task = make_task(config.task)
    return init_state(task, make_optimizer(config.optimizer, task), config.seed)


def last_state(config: TrainConfig, folder: Path) -> TrainState:
    state = Checkpoints(folder / "checkpoints").restore_latest(first_state(config))
    assert state is not None
    return state


def assert_same_bits(tree: object, other: object) -> None:
    """Every leaf of the two trees has the same dtype and the same bytes."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, other_leaf in zip(
        jax.tree.leaves(tree), jax.tree.leaves(other), strict=True
    ):
        array, other_array = _raw(leaf), _raw(other_leaf)
        assert array.dtype == other_array.dtype
        assert array.tobytes() == other_array.tobytes()


def _raw(leaf: jax.Array) -> np.ndarray:
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)
