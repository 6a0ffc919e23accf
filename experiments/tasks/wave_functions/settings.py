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
from experiments.tasks.wave_functions.chains import CHAINS

__all__ = ["ModelConfig", "SamplerConfig", "WaveFunctionConfig"]

AT_LEAST_TWO = Rule("at least 2", lambda value: value >= 2)
AT_LEAST_THREE = Rule("at least 3", lambda value: value >= 3)


@dataclasses.dataclass
class ModelConfig:
    """The network for log ψ; a group, `model=...`.

    Attributes:
      name: "rbm", "mlp", "cnn" or "transformer".
      features: number of hidden units; widths of the hidden layers; channels of the
        layers; for "transformer" the width of all layers, repeated once per layer.
      kernel_size: number of sites that a convolution sees; null for the other networks.
      complex_parameters: for "rbm" only; log ψ is then complex too, and holomorphic.
    """

    name: Annotated[str, one_of("rbm", "mlp", "cnn", "transformer")]
    features: Annotated[list[int], AT_LEAST_ONE]
    kernel_size: Annotated[int | None, AT_LEAST_ONE]
    complex_parameters: bool


@dataclasses.dataclass
class SamplerConfig:
    """How samples of |ψ|² are drawn; a group, `sampler=...`.

    Attributes:
      name: "exact", from all configurations, or "metropolis".
      num_chains: number of parallel Markov chains, at least 2, whose means determine
        the error of the energy; null for "exact", as are the others.
      sweeps: moves per spin between two samples of a chain.
      burn_in: sweeps before the very first sample.
      eval_samples: number of samples in an evaluation, if there are too many
        configurations to list.
    """

    name: Annotated[str, one_of("exact", "metropolis")]
    num_chains: Annotated[int | None, AT_LEAST_TWO]
    sweeps: Annotated[int | None, AT_LEAST_ONE]
    burn_in: Annotated[int | None, NON_NEGATIVE]
    eval_samples: Annotated[int | None, AT_LEAST_ONE]


@dataclasses.dataclass
class WaveFunctionConfig:
    """Settings of the ground state of a ring of spins.

    Attributes:
      name: "vmc".
      hamiltonian: "ising", -Σ σᶻσᶻ - h Σ σˣ, or "heisenberg", Σ σ·σ; or, as
        "module:function", a function (num_spins, field) that returns a `SpinChain`.
      num_spins: number of spins on the ring.
      field: h; null for the default of the Hamiltonian, 1 for "ising" and 0 for
        "heisenberg", which allows no other.
      precision: "float32" or "float64", for everything.
      last_max_kl: the radius of the last step, which is reached from `optimizer.max_kl`
        by the same factor in every step; null for a constant radius.
      last_damping: likewise for λ of `optimizer.damping`.
      model: the network.
      sampler: how configurations are sampled.
    """

    name: str
    hamiltonian: Annotated[str, one_of_or_own(*CHAINS)]
    num_spins: Annotated[int, AT_LEAST_THREE]
    field: Annotated[float | None, NON_NEGATIVE]
    precision: Annotated[str, one_of("float32", "float64")]
    last_max_kl: Annotated[float | None, POSITIVE]
    last_damping: Annotated[float | None, POSITIVE]
    model: ModelConfig
    sampler: SamplerConfig
