"""The network for log ψ that the settings describe, with its symmetries."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.running.settings import ConfigError
from experiments.tasks.wave_functions.ansatz import (
    Convolutional,
    GroupConvolutional,
    Perceptron,
    RestrictedBoltzmann,
    Transformer,
    symmetrized,
)
from experiments.tasks.wave_functions.hamiltonians import SpinSystem
from experiments.tasks.wave_functions.lattices import Lattice
from experiments.tasks.wave_functions.settings import SYMMETRIES, ModelConfig

__all__ = ["make_model", "symmetries"]

PyTree = Any


def make_model(
    config: ModelConfig, system: SpinSystem
) -> tuple[Callable[[jax.Array], PyTree], Callable[[PyTree, PyTree], jax.Array]]:
    """The functions key -> params and (params, {"spins": `[N, L]`}) -> log ψ `[N]`.

    Raises:
      ConfigError: the patches do not fit the lattice.
    """
    lattice = system.sites
    if config.patch_size is not None:
        try:
            lattice.coarse(config.patch_size)
        except ValueError as error:
            raise ConfigError(f"`task.model={config.name}`: {error}") from error
    module = _module(config, lattice)
    images = _images(config, lattice)

    def init_fn(key: jax.Array) -> PyTree:
        return module.init(key, jnp.ones((1, system.num_spins)))["params"]

    def model_fn(params: PyTree, batch: PyTree) -> jax.Array:
        log_psi_fn = functools.partial(module.apply, {"params": params})
        if config.symmetries:
            flip = "flip" in config.symmetries
            log_psi_fn = symmetrized(log_psi_fn, images, flip=flip)
        return log_psi_fn(batch["spins"])

    return init_fn, model_fn


def _module(config: ModelConfig, lattice: Lattice) -> Any:
    dtype = jnp.result_type(complex if config.complex_parameters else float)
    features = tuple(config.features)
    match config.name:
        case "rbm":
            return RestrictedBoltzmann(features[0], dtype)
        case "mlp":
            return Perceptron(features, dtype, config.phase)
        case "transformer":
            assert config.patch_size is not None
            return Transformer(
                len(features),
                features[0],
                dtype,
                lattice=lattice,
                patch=config.patch_size,
                phase=config.phase,
            )
        case name:
            assert config.kernel_size is not None
            width = config.kernel_size
            kind = GroupConvolutional if name == "gcnn" else Convolutional
            return kind(features, width, dtype, lattice, config.phase)


def symmetries(config: ModelConfig, lattice: Lattice) -> tuple[np.ndarray, bool]:
    """The group that ψ is invariant to: permutations `[G, L]`, and whether it flips."""
    names = SYMMETRIES if config.name == "gcnn" else config.symmetries
    steps = _own_translations(config, lattice)
    if "translations" in names:
        steps = tuple(1 for _ in lattice.shape)
    translations = lattice.translations(tuple(lattice.shape), steps)
    return _with_point_group(names, lattice, translations), "flip" in names


def _images(config: ModelConfig, lattice: Lattice) -> np.ndarray:
    """The permutations to average over, `[G, L]`."""
    ends = tuple(1 for _ in lattice.shape)
    if "translations" in config.symmetries:
        # Beyond these are those that the network has.
        ends = _own_translations(config, lattice)
    return _with_point_group(config.symmetries, lattice, lattice.translations(ends))


def _own_translations(config: ModelConfig, lattice: Lattice) -> tuple[int, ...]:
    """The steps of the translations that the network itself is invariant to."""
    own = {"cnn": 1, "transformer": config.patch_size}.get(config.name)
    return lattice.shape if own is None else tuple(own for _ in lattice.shape)


def _with_point_group(
    names: Sequence[str], lattice: Lattice, translations: np.ndarray
) -> np.ndarray:
    if "point_group" not in names:
        return translations
    return lattice.point_group[:, translations].reshape(-1, lattice.num_sites)
