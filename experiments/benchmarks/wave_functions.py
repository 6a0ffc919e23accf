"""The table of wave functions: gradient and solve by each solver, beside NetKet's.

Samples and local energies are given, and the same for both: those of the Ising ring of
16 spins at its critical field. Both use one thread and float64.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from experiments.benchmarks.clocks import interleaved_seconds
from experiments.benchmarks.markdown import Figure, Table
from experiments.benchmarks.settings import WaveFunctionsSettings
from experiments.tasks.wave_functions.ansatz import Perceptron, RestrictedBoltzmann
from experiments.tasks.wave_functions.energy import (
    energy_batch,
    energy_gradient,
    output_loss,
)
from experiments.tasks.wave_functions.hamiltonians import make_ising
from experiments.tasks.wave_functions.sampling import move_chains, start_chains
from ngd_jax import contrib

__all__ = ["wave_function_tables"]

_NUM_SPINS = 16
_DENSE_LIMIT = 2000  # largest number of parameters P for a P × P matrix
_ACCURATE = 1e-3  # largest direction error of a route that counts as a solution
_NOTE = (
    "The direction error is relative to `SampleSpace`, in the Euclidean norm; the "
    "residual is the relative one that the solver reports. Ratios are between the "
    f"fastest routes with an error of at most {_ACCURATE:g}."
)


def wave_function_tables(settings: WaveFunctionsSettings) -> list[Table]:
    """The table; NetKet's columns are empty if it is not installed."""
    with jax.enable_x64(True):
        rows, goals = [], []
        for cell in settings.cells:
            cell_rows, ratio, name = _measure(settings, cell[0], cell[1:])
            rows += cell_rows
            if ratio is not None:
                goals.append(Figure(f"{name}: best of ours over NetKet's", ratio, 0.5))
    head = ("P", "N", "who", "how", "CPU ms", "direction error", "residual", "status")
    return [
        Table(
            f"Gradient and solve, ring of {_NUM_SPINS} spins, shift "
            f"{settings.damping:g}",
            head,
            rows,
            goals,
            [_NOTE],
        )
    ]


def _measure(
    settings: WaveFunctionsSettings, num_samples: int, widths: list[int]
) -> tuple[list[list[str]], float | None, str]:
    module, params, batch = _problem(num_samples, widths)
    size = ravel_pytree(params)[0].size
    model_fn = functools.partial(_log_psi, module)
    solvers: dict[str, ngd.Solver] = {
        "SampleSpace": ngd.SampleSpace(),
        "Auto": ngd.Auto(),
        "CG(10)": ngd.CG(max_steps=10),
        "CG(500, rtol=1e-5)": ngd.CG(max_steps=500, rtol=1e-5),
    }
    if size <= _DENSE_LIMIT:
        solvers["Cholesky"] = ngd.Cholesky()
        factor = contrib.CholeskyFactor(jnp.float32)
        solvers["CG(20), CholeskyFactor(float32)"] = ngd.CG(20, 1e-14, factor)
    steps = {
        name: _make_step(model_fn, solver, settings.damping, params, batch)
        for name, solver in solvers.items()
    }
    found = {name: jax.block_until_ready(step()) for name, step in steps.items()}
    seconds = dict(
        zip(
            steps,
            interleaved_seconds(list(steps.values()), repeats=settings.repeats),
            strict=True,
        )
    )
    exact = found["SampleSpace"][0]

    def error_of(direction: Any) -> float:
        return float(jnp.linalg.norm(direction - exact) / jnp.linalg.norm(exact))

    where = [f"{size:,}", f"{num_samples:,}"]
    rows, ours, theirs = [], [], []
    for name, (direction, info) in found.items():
        error = error_of(direction)
        if error <= _ACCURATE:
            ours.append(seconds[name])
        rows.append(
            [
                *where,
                "ours",
                f"`{name}`",
                f"{1e3 * seconds[name]:.1f}",
                f"{error:.0e}",
                f"{float(info.relative_residual):.0e}",
                ngd.SolverStatus(int(info.status)).name.lower(),
            ]
        )
    peers = _run_peer(settings, params, batch, widths)
    for name, (taken, direction) in peers.items():
        error = error_of(direction)
        if error <= _ACCURATE:
            theirs.append(taken)
        cells = [f"{1e3 * taken:.1f}", f"{error:.0e}"]
        rows.append([*where, "NetKet", name, *cells, "", ""])
    ratio = min(ours) / min(theirs) if theirs else None
    return rows, ratio, f"P = {size:,}, N = {num_samples:,}"


def _problem(
    num_samples: int, widths: list[int]
) -> tuple[nn.Module, Any, dict[str, jax.Array]]:
    system = make_ising(_NUM_SPINS, 1.0)
    module: nn.Module = Perceptron(tuple(widths), float)
    if len(widths) == 1:
        module = RestrictedBoltzmann(widths[0], float, scale=0.1)
    key, start_key, move_key = jax.random.split(jax.random.key(0), 3)
    start = start_chains(system, start_key, num_samples)

    @jax.jit
    def build(key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        params = module.init(key, start[:1])["params"]
        model_fn = functools.partial(_log_psi, module)
        spins, _ = move_chains(
            system, lambda s: model_fn(params, {"spins": s}), move_key, start, 200
        )
        return params, energy_batch(system, model_fn, params, spins)

    params, batch = build(key)
    return module, params, batch


def _log_psi(module: nn.Module, params: Any, batch: Any) -> Any:
    return module.apply({"params": params}, batch["spins"])


def _make_step(
    model_fn: Any, solver: ngd.Solver, damping: float, params: Any, batch: Any
) -> Any:
    tx = ngd.scale_by_natural_gradient(
        model_fn,
        ngd.LogAmplitude(),
        damping=damping,
        solver=solver,
        loss_fn=output_loss if solver.uses_coefficients else None,
    )

    @jax.jit
    def step(params: Any, batch: Any) -> Any:
        grads = energy_gradient(model_fn, params, batch)
        state: Any
        updates, state = tx.update(grads, tx.init(params), params, batch=batch)
        return ravel_pytree(updates)[0], state.info.solver

    return lambda: step(params, batch)


def _run_peer(
    settings: WaveFunctionsSettings,
    params: Any,
    batch: dict[str, jax.Array],
    widths: list[int],
) -> dict[str, tuple[float, np.ndarray]]:
    """CPU seconds and directions of NetKet by route; none if it is not installed."""
    python = settings.peer_python
    if python is None:
        if importlib.util.find_spec("netket") is None:
            return {}
        python = sys.executable
    arguments = {
        "widths": widths,
        "damping": settings.damping,
        "repeats": settings.repeats,
    }
    named: dict[str, Any] = {
        "/".join(("params", *path)): np.asarray(leaf)
        for path, leaf in flatten_dict(params).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.npz"
        np.savez(path, spins=batch["spins"], energies=batch["energies"], **named)
        command = [python, "-m", "experiments.benchmarks.wave_function_peer"]
        subprocess.run(  # noqa: S603 (our own program)
            [*command, str(path), json.dumps(arguments)],
            check=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        found = dict(np.load(path.with_name("found.npz")))
    return {
        name.removeprefix("seconds/"): (
            float(value),
            found[name.replace("seconds/", "direction/")],
        )
        for name, value in found.items()
        if name.startswith("seconds/")
    }
