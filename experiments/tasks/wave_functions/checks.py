"""Checks that the settings of the task `vmc` are consistent."""

from typing import Any

import ngd_jax as ngd
from experiments.running.build import build
from experiments.running.config import TrainConfig, check_without_data
from experiments.running.settings import ConfigError
from experiments.tasks.wave_functions.exact import MAX_SPINS
from experiments.tasks.wave_functions.settings import (
    ModelConfig,
    SamplerConfig,
    WaveFunctionConfig,
)

__all__ = ["check"]


def check(config: TrainConfig) -> None:
    """Checks the settings against each other.

    Raises:
      ConfigError: names the setting that does not fit.
    """
    check_without_data(config)
    task: WaveFunctionConfig = config.task
    if (config.batch_size is None) != (task.sampler.name == "all"):
        raise ConfigError(
            f"`batch_size` must be the number of samples of a step, and null with "
            f"sampler=all, got {config.batch_size} with sampler={task.sampler.name}."
        )
    _check_optimizer(config.optimizer)
    _check_annealing(config.optimizer, task)
    _check_model(task.model)
    if config.batch_size is None or task.sampler.name == "exact":
        _check_listed(task)
    else:
        _check_metropolis(task.sampler, config.batch_size)


def _check_optimizer(optimizer: dict[str, Any]) -> None:
    # The surrogate of the outputs gives the energy's gradient at fixed local energies,
    # not its value.
    solver = build(optimizer.get("solver"), "optimizer.solver")
    if isinstance(solver, ngd.Solver) and solver.uses_objective:
        raise ConfigError(
            f"`optimizer.solver` must not use the loss of outputs with task=vmc, whose "
            f"energy is only known from samples, got {solver}."
        )


def _check_annealing(optimizer: dict[str, Any], task: WaveFunctionConfig) -> None:
    for name in ("max_kl", "damping"):
        last, first = getattr(task, f"last_{name}"), optimizer.get(name)
        if last is not None and not (isinstance(first, int | float) and first > 0):
            raise ConfigError(
                f"`task.last_{name}` needs a number optimizer.{name} to start from, "
                f"got {first} with optimizer={optimizer['name']}."
            )


def _check_model(model: ModelConfig) -> None:
    owners = {"kernel_size": ("cnn", "gcnn"), "patch_size": ("transformer",)}
    for setting, names in owners.items():
        if (getattr(model, setting) is None) == (model.name in names):
            raise ConfigError(
                f"`task.model.{setting}` is for model={','.join(names)}, and null for "
                f"the others, got {getattr(model, setting)} with model={model.name}."
            )
    if model.name == "gcnn" and (model.kernel_size or 0) % 2 == 0:
        raise ConfigError(
            f"`task.model.kernel_size` must be odd with model=gcnn, whose kernels turn "
            f"around their middle, got {model.kernel_size}."
        )
    if model.name == "gcnn" and model.symmetries:
        raise ConfigError(
            f"`task.model.symmetries` must be empty with model=gcnn, which has all of "
            f"them, got {list(model.symmetries)}."
        )
    if model.name == "rbm" and len(model.features) != 1:
        raise ConfigError(
            f"`task.model.features` must be one number of hidden units with model=rbm, "
            f"got {model.features}."
        )
    widths = model.features
    if model.name == "transformer" and (len(set(widths)) > 1 or widths[0] % 4):
        raise ConfigError(
            f"`task.model.features` must repeat one width, a multiple of 4, with "
            f"model=transformer, got {widths}."
        )
    if model.name != "rbm" and model.complex_parameters:
        raise ConfigError(
            f"`task.model.complex_parameters` is for model=rbm, got model={model.name}."
        )
    if model.name == "rbm" and model.phase:
        raise ConfigError(
            "`task.model.phase` is not for model=rbm, whose log ψ is complex with "
            "task.model.complex_parameters=true."
        )


def _check_listed(task: WaveFunctionConfig) -> None:
    sampler = task.sampler.name
    if task.num_spins > MAX_SPINS:
        raise ConfigError(
            f"`task.num_spins` must be at most {MAX_SPINS} with sampler={sampler}, got "
            f"{task.num_spins}; sampler=metropolis takes more."
        )
    for name in ("num_chains", "sweeps", "burn_in", "eval_samples"):
        if (value := getattr(task.sampler, name)) is not None:
            raise ConfigError(
                f"`task.sampler.{name}` is for sampler=metropolis: it must be null "
                f"with sampler={sampler}, got {value}."
            )


def _check_metropolis(sampler: SamplerConfig, batch_size: int) -> None:
    for name in ("num_chains", "sweeps", "burn_in", "eval_samples"):
        if getattr(sampler, name) is None:
            raise ConfigError(
                f"`task.sampler.{name}` must be a number with sampler=metropolis, got "
                f"null."
            )
    sizes = {
        "batch_size": batch_size,
        "task.sampler.eval_samples": sampler.eval_samples,
    }
    for name, size in sizes.items():
        if size % sampler.num_chains:
            raise ConfigError(
                f"`{name}` must be a multiple of the task.sampler.num_chains="
                f"{sampler.num_chains} Markov chains, got {size}."
            )
