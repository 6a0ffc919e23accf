"""Gradient and solve of NetKet on given samples.

    python -m experiments.benchmarks.wave_function_peer case.npz '{"repeats": ...}'

This is a separate program, for an interpreter that has NetKet; it writes `found.npz`
beside the case. Its times include neither sampling nor local energies.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One thread, before JAX starts its own.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.flatten_util import ravel_pytree

from experiments.tasks.wave_functions.ansatz import Perceptron, RestrictedBoltzmann

__all__ = ["DENSE_LIMIT", "run"]

# Largest number of parameters P for which a P × P matrix is formed.
DENSE_LIMIT = 2000


def run(
    case: dict[str, np.ndarray], *, widths: list[int], damping: float, repeats: int
) -> dict[str, tuple[float, np.ndarray]]:
    """Times every method of NetKet on one system.

    Args:
      case: "spins", "energies", and the parameters by name.
      widths: of the perceptron; one number for a restricted Boltzmann machine.
      damping: the diagonal shift.
      repeats: number of turns.

    Returns:
      Median CPU seconds and the direction, by method.
    """
    jax.config.update("jax_enable_x64", True)
    params = unflatten_dict(
        {
            tuple(name.split("/")[1:]): jnp.asarray(leaf)
            for name, leaf in case.items()
            if name.startswith("params/")
        }
    )
    module: Any = Perceptron(tuple(widths), float)
    if len(widths) == 1:
        module = RestrictedBoltzmann(widths[0], float)
    spins, energies = jnp.asarray(case["spins"]), jnp.asarray(case["energies"])
    routes = {
        **_dense_routes(module, params, spins, energies, damping),
        "CG on the fly": _iterative_route(module, params, spins, energies, damping),
    }
    directions = {name: _flat(route()) for name, route in routes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(repeats):
        for name, route in routes.items():
            start = time.process_time()
            jax.block_until_ready(route())
            seconds[name].append(time.process_time() - start)
    return {
        name: (statistics.median(seconds[name]), directions[name]) for name in routes
    }


def _dense_routes(
    module: Any, params: Any, spins: jax.Array, energies: jax.Array, damping: float
) -> dict[str, Callable[[], Any]]:
    """The functions behind `VMC_SR`, in sample space and in parameter space."""
    from netket._src.ngd.sr_srt_common import sr, srt  # pyright: ignore[reportMissingImports]
    from netket._src.ngd.srt_onthefly import srt_onthefly  # pyright: ignore[reportMissingImports]
    from netket.optimizer.solver import cholesky_with_fallback  # pyright: ignore[reportMissingImports]

    def route(solve: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: solve(
            module.apply,
            energies,
            params,
            {},
            spins,
            diag_shift=damping,
            solver_fn=cholesky_with_fallback,
            mode="real",
        )[0]

    routes = {"samples": srt, "samples, on the fly": srt_onthefly}
    if _flat(params).size <= DENSE_LIMIT:
        routes["parameters"] = sr
    return {name: route(solve) for name, solve in routes.items()}


def _iterative_route(
    module: Any, params: Any, spins: jax.Array, energies: jax.Array, damping: float
) -> Callable[[], Any]:
    """The preconditioner `SR` with its defaults: conjugate gradients on products."""
    import netket as nk  # pyright: ignore[reportMissingImports]

    num_chains = 16
    space = nk.hilbert.Spin(0.5, N=spins.shape[1])
    state: Any = nk.vqs.MCState(
        nk.sampler.MetropolisLocal(space, n_chains=num_chains),
        model=module,
        n_samples=len(spins),
        variables={"params": params},
    )
    state._samples = spins.reshape(num_chains, -1, spins.shape[1])  # noqa: SLF001
    precondition = nk.optimizer.SR(
        qgt=nk.optimizer.qgt.QGTOnTheFly(), diag_shift=damping
    )

    @jax.jit
    def gradient(params: Any) -> Any:
        _, pull = jax.vjp(lambda p: module.apply({"params": p}, spins), params)
        return pull(2 * (energies - energies.mean()) / len(spins))[0]

    return lambda: precondition(state, gradient(params))


def _flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


if __name__ == "__main__":
    path, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
    found = run(dict(np.load(path)), **arguments)
    named: dict[str, Any] = {}
    for name, (seconds, direction) in found.items():
        named |= {f"seconds/{name}": seconds, f"direction/{name}": direction}
    np.savez(path.with_name("found.npz"), **named)
