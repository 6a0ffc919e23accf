"""The settings of the benchmark; `configs/benchmark.yaml` has the values."""

import dataclasses
from typing import Annotated

from experiments.benchmarks.nist import NAMES
from experiments.running.settings import (
    AT_LEAST_ONE,
    NON_NEGATIVE,
    POSITIVE,
    Rule,
    one_of,
)

__all__ = [
    "ACCELERATED",
    "NETWORKS",
    "TABLES",
    "AcceleratorSettings",
    "BenchmarkConfig",
    "CurveFitsSettings",
    "PoliciesSettings",
    "PriceSettings",
    "ProductsSettings",
    "SolversSettings",
    "WaveFunctionsSettings",
]

TABLES = ("products", "solvers", "trpo", "vmc", "price", "nist", "accelerator")

# The networks of the table `price`; `networks` makes them.
NETWORKS = (
    "mlp_small",
    "mlp",
    "mlp_large",
    "cnn",
    "transformer_2",
    "transformer_4",
    "transformer_8",
)

# The optimizers of the table `accelerator`, all but Adam to a radius of 0.1.
ACCELERATED = ("Adam", "default", "KFAC, momentum", "CG(10)", "SampleSpace")

TABLE = Rule(
    f"all or one of {', '.join(TABLES)}", lambda name: name in (*TABLES, "all")
)
WIDTHS = Rule(
    "lists of two or more positive widths",
    lambda widths: len(widths) >= 2 and all(width >= 1 for width in widths),
)
CELLS = Rule(
    "lists [parameters, examples, outputs] of positive numbers",
    lambda cell: len(cell) == 3 and all(number >= 1 for number in cell),
)

SAMPLES_AND_WIDTHS = Rule(
    "lists [samples, widths...] of positive numbers",
    lambda cell: len(cell) >= 2 and all(number >= 1 for number in cell),
)


@dataclasses.dataclass
class ProductsSettings:
    """Settings of the tables of products and whole steps.

    Attributes:
      networks: widths of the networks, inputs first and classes last.
      batch_size: examples in a batch.
      cg_steps: solver steps of the whole step that is timed.
      repeats: turns of each timing.
      compile_repeats: turns of each compilation.
      import_repeats: number of processes that import the library.
    """

    networks: Annotated[list[list[int]], WIDTHS]
    batch_size: Annotated[int, AT_LEAST_ONE]
    cg_steps: Annotated[int, AT_LEAST_ONE]
    repeats: Annotated[int, AT_LEAST_ONE]
    compile_repeats: Annotated[int, AT_LEAST_ONE]
    import_repeats: Annotated[int, AT_LEAST_ONE]


@dataclasses.dataclass
class SolversSettings:
    """Settings of the table of solvers.

    Attributes:
      cells: [P, N, K] of each row: parameters, examples, outputs of an example.
      steps: step budgets of the iterative solvers.
      repeats: turns of each timing.
      budget: largest expected number of seconds for one call; others are skipped.
      cholesky_limit: the largest P for the dense matrix.
    """

    cells: Annotated[list[list[int]], CELLS]
    steps: Annotated[list[int], AT_LEAST_ONE]
    repeats: Annotated[int, AT_LEAST_ONE]
    budget: Annotated[float, POSITIVE]
    cholesky_limit: Annotated[int, AT_LEAST_ONE]


@dataclasses.dataclass
class PoliciesSettings:
    """Settings of the tables of policies.

    Attributes:
      environments: names, with the threshold of the mean return for each.
      seeds: runs in each environment.
      peer_seeds: runs of the peer in each; one of them takes a minute.
      peer_python: the interpreter that has stable-baselines3-contrib; null for this
        one.
      num_agents: number of agents under `vmap` that are timed in the first environment;
        1 for none.
      dampings: λ of the table of residuals; an empty list leaves it out.
      solver_steps: its budgets of conjugate gradient steps.
      overrides: for `experiments.train`, as on its command line.
    """

    environments: dict[str, float]
    seeds: Annotated[int, AT_LEAST_ONE]
    peer_seeds: Annotated[int, AT_LEAST_ONE]
    peer_python: str | None
    num_agents: Annotated[int, AT_LEAST_ONE]
    dampings: Annotated[list[float], NON_NEGATIVE]
    solver_steps: Annotated[list[int], AT_LEAST_ONE]
    overrides: list[str]


@dataclasses.dataclass
class AcceleratorSettings:
    """Settings of the tables for an accelerator.

    Attributes:
      networks: see `NETWORKS`.
      precisions: of matrix products, as `jax.default_matmul_precision` names them.
      optimizers: see `ACCELERATED`.
      exact_network: the network whose digits are checked.
      steps: in a turn.
      repeats: number of turns.
      gram_limit: the largest number of outputs of a batch for `SampleSpace`.
      seconds: after this time, what has not begun is left out.
    """

    networks: Annotated[list[str], one_of(*NETWORKS)]
    precisions: Annotated[list[str], one_of("float32", "tensorfloat32", "bfloat16")]
    optimizers: Annotated[list[str], one_of(*ACCELERATED)]
    exact_network: Annotated[str, one_of(*NETWORKS)]
    steps: Annotated[int, AT_LEAST_ONE]
    repeats: Annotated[int, AT_LEAST_ONE]
    gram_limit: Annotated[int, AT_LEAST_ONE]
    seconds: Annotated[float, POSITIVE]


@dataclasses.dataclass
class WaveFunctionsSettings:
    """Settings of the table of wave functions.

    Attributes:
      cells: lists [samples, widths...]; one width is a restricted Boltzmann machine,
        more are a perceptron.
      damping: the diagonal shift.
      repeats: number of turns.
      peer_python: the interpreter that has NetKet; null for this one.
    """

    cells: Annotated[list[list[int]], SAMPLES_AND_WIDTHS]
    damping: Annotated[float, POSITIVE]
    repeats: Annotated[int, AT_LEAST_ONE]
    peer_python: str | None


@dataclasses.dataclass
class PriceSettings:
    """Settings of the table of prices.

    Attributes:
      networks: names of the networks.
      cached_network: the network whose first step is timed with and without a
        compilation cache on disk; null leaves this out.
      steps: number in a turn of each timing; equal to the steps between two inverses of
        `KFAC`, so that a turn includes everything that a step may do.
      repeats: turns of each timing.
    """

    networks: Annotated[list[str], one_of(*NETWORKS)]
    cached_network: Annotated[str | None, one_of(*NETWORKS)]
    steps: Annotated[int, AT_LEAST_ONE]
    repeats: Annotated[int, AT_LEAST_ONE]


@dataclasses.dataclass
class CurveFitsSettings:
    """Settings of the table of curve fits.

    Attributes:
      problems: names of NIST's problems.
      repeats: number of times that each fit is repeated after the first.
    """

    problems: Annotated[list[str], one_of(*NAMES)]
    repeats: Annotated[int, AT_LEAST_ONE]


@dataclasses.dataclass
class BenchmarkConfig:
    """Settings of `experiments.benchmark`.

    Attributes:
      table: which table, or "all".
      output: Markdown file to write; null to print only.
      products, solvers, trpo, vmc, price, nist, accelerator: settings of each table.
    """

    table: Annotated[str, TABLE]
    output: str | None
    products: ProductsSettings
    solvers: SolversSettings
    trpo: PoliciesSettings
    vmc: WaveFunctionsSettings
    price: PriceSettings
    nist: CurveFitsSettings
    accelerator: AcceleratorSettings
