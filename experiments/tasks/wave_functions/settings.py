"""The settings of the task `vmc`.

`configs/task/vmc.yaml`, `configs/model/` and `configs/sampler/` have the values.
"""

import dataclasses
from typing import Annotated

from experiments.running.settings import (
    AT_LEAST_ONE,
    NON_NEGATIVE,
    POSITIVE,
    Rule,
    one_of,
    one_of_or_own,
)
from experiments.tasks.wave_functions.hamiltonians import HAMILTONIANS

__all__ = ["SYMMETRIES", "ModelConfig", "SamplerConfig", "WaveFunctionConfig"]

SYMMETRIES = ("translations", "point_group", "flip")
AT_LEAST_TWO = Rule("at least 2", lambda value: value >= 2)
AT_LEAST_THREE = Rule("at least 3", lambda value: value >= 3)


@dataclasses.dataclass
class ModelConfig:
    """The network for log ψ; a group, `model=...`.

    Attributes:
      name: "rbm", "mlp", "cnn", "gcnn" (group convolutions) or "transformer".
      features: number of hidden units; widths of the hidden layers; channels of the
        layers, with "gcnn" for each element of the point group; for "transformer" the
        width of all layers, repeated once per layer.
      kernel_size: side of the cube of sites that a convolution sees, odd with "gcnn";
        null for the other networks.
      patch_size: side of the cube of sites that "transformer" takes as one; null for
        the other networks.
      complex_parameters: for "rbm" only; log ψ is then complex too, and holomorphic.
      phase: for the others: log ψ is complex, of real parameters.
      symmetries: ψ is averaged over these, "translations", "point_group" (reflections,
        and rotations of a square) or "flip" (of all spins). "cnn" has all translations
        already and "transformer" those by patches, so they average over the rest;
        "gcnn" has them all.
    """

    name: Annotated[str, one_of("rbm", "mlp", "cnn", "gcnn", "transformer")]
    features: Annotated[list[int], AT_LEAST_ONE]
    kernel_size: Annotated[int | None, AT_LEAST_ONE]
    patch_size: Annotated[int | None, AT_LEAST_ONE]
    complex_parameters: bool
    phase: bool
    symmetries: Annotated[list[str], one_of(*SYMMETRIES)]


@dataclasses.dataclass
class SamplerConfig:
    """How samples of |ψ|² are drawn; a group, `sampler=...`.

    Attributes:
      name: "exact", from all configurations; "all", every configuration in every step,
        weighted by |ψ|², so that nothing is random; or "metropolis".
      num_chains: number of parallel Markov chains, at least 2, whose means determine
        the error of the energy; null but for "metropolis", as are the others.
      sweeps: moves per spin between two samples of a chain.
      burn_in: sweeps before the very first sample.
      eval_samples: number of samples in an evaluation, if there are too many
        configurations to list.
    """

    name: Annotated[str, one_of("exact", "all", "metropolis")]
    num_chains: Annotated[int | None, AT_LEAST_TWO]
    sweeps: Annotated[int | None, AT_LEAST_ONE]
    burn_in: Annotated[int | None, NON_NEGATIVE]
    eval_samples: Annotated[int | None, AT_LEAST_ONE]


@dataclasses.dataclass
class WaveFunctionConfig:
    """Settings of the ground state of spins on a lattice.

    Attributes:
      name: "vmc".
      hamiltonian: of a ring, "ising", -Σ σᶻσᶻ - h Σ σˣ, or "heisenberg", Σ σ·σ; of a
        periodic square "square_ising" or "square_heisenberg"; or, as
        "module:function", a function that returns a `SpinSystem`, of num_spins and of
        those of the next two that are not null.
      num_spins: number of spins, for a square the square of an even number.
      field: h; null for the default of the Hamiltonian: 1 for "ising", 3 for
        "square_ising", and 0 for the others, which allow no other.
      coupling: J2 of "square_heisenberg", between second neighbours; null for 0.
      precision: "float32" or "float64", for everything.
      last_max_kl: the radius of the last step, which is reached from `optimizer.max_kl`
        by the same factor in every step; null for a constant radius.
      last_damping: likewise for λ of `optimizer.damping`.
      model: the network.
      sampler: how configurations are sampled.
    """

    name: str
    hamiltonian: Annotated[str, one_of_or_own(*HAMILTONIANS)]
    num_spins: Annotated[int, AT_LEAST_THREE]
    field: Annotated[float | None, NON_NEGATIVE]
    coupling: Annotated[float | None, NON_NEGATIVE]
    precision: Annotated[str, one_of("float32", "float64")]
    last_max_kl: Annotated[float | None, POSITIVE]
    last_damping: Annotated[float | None, POSITIVE]
    model: ModelConfig
    sampler: SamplerConfig
