"""The settings of the task `vmc`.

`configs/task/vmc.yaml`, `configs/model/` and `configs/sampler/` have the numbers.
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
      features: hidden units; widths of the hidden layers; channels of the layers; the
        one width of all layers of "transformer", as often as there are layers.
      kernel_size: sites that a convolution sees; null for the others.
      complex_parameters: of "rbm" only; log ψ is then complex too, and holomorphic.
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
      num_chains: Markov chains side by side, at least 2 of them, whose means tell the
        error of the energy; null for "exact", like the others.
      sweeps: moves for each spin between two samples of a chain.
      burn_in: sweeps before the first sample of all.
      eval_samples: of an evaluation, where there are too many configurations to list.
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
      num_spins: on the ring.
      field: h; null for what the Hamiltonian has by itself, 1 for "ising" and 0 for
        "heisenberg", which takes no other.
      precision: "float32" or "float64", of everything.
      last_max_kl: the radius of the last step, to which it goes from `optimizer.max_kl`
        by the same factor in every step; null: it stays.
      last_damping: likewise for λ of `optimizer.damping`.
      model: the network.
      sampler: of its configurations.
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
