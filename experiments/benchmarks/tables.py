"""All tables of the benchmark by name."""

from collections.abc import Callable, Sequence

from experiments.benchmarks.accelerator import accelerator_tables
from experiments.benchmarks.curve_fits import curve_fit_tables
from experiments.benchmarks.markdown import Table, describe_environment, write_table
from experiments.benchmarks.policies import policy_tables
from experiments.benchmarks.price import price_tables
from experiments.benchmarks.products import product_tables
from experiments.benchmarks.settings import TABLES, BenchmarkConfig
from experiments.benchmarks.solvers import solver_tables
from experiments.benchmarks.wave_functions import wave_function_tables

__all__ = ["measure_tables", "select", "write_tables"]


def select(name: str) -> Sequence[str]:
    """The tables selected by `table=name`."""
    return TABLES if name == "all" else (name,)


def measure_tables(name: str, config: BenchmarkConfig) -> list[Table]:
    """Measures one of `TABLES`."""
    measure: dict[str, Callable[[], list[Table]]] = {
        "products": lambda: product_tables(config.products),
        "solvers": lambda: solver_tables(config.solvers),
        "trpo": lambda: policy_tables(config.trpo),
        "vmc": lambda: wave_function_tables(config.vmc),
        "price": lambda: price_tables(config.price),
        "accelerator": lambda: accelerator_tables(config.accelerator),
        "nist": lambda: curve_fit_tables(config.nist),
    }
    return measure[name]()


def write_tables(tables: Sequence[Table]) -> str:
    """All tables, below a line about where and how they were measured."""
    where = (
        f"{describe_environment()}, one thread, float32 unless stated otherwise; "
        f"medians of interleaved CPU times."
    )
    return "\n".join([where + "\n", *map(write_table, tables)])
