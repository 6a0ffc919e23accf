"""The energy of a wave function on samples of |ψ|²: its gradient, and values nearby.

    E = mean(w e),   ∂E/∂θ = 2 Re mean(w conj(e - E) ∂ log ψ/∂θ)

with the local energies e, and weights w of mean 1 where a batch has `weights`. This is
also the gradient of a function of the outputs, log ψ, at fixed e; an optimizer that
works on outputs uses that function.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.tasks.wave_functions.hamiltonians import SpinSystem, local_energies

__all__ = ["energy_batch", "energy_gradient", "output_loss", "reweighted_energy"]

PyTree = Any
Batch = dict[str, jax.Array]
ModelFn = Callable[[PyTree, Batch], jax.Array]


def energy_batch(
    system: SpinSystem,
    model_fn: ModelFn,
    params: PyTree,
    spins: jax.Array,
    batch_size: int | None = None,
) -> Batch:
    """Samples, log ψ there, and local energies: `spins`, `log_psi`, `energies`.

    Args:
      system: H.
      model_fn: (params, {"spins": `[N, L]`}) -> log ψ `[N]`.
      params: of the model from which the samples were drawn.
      spins: the samples, `[N, L]`.
      batch_size: see `local_energies`.
    """

    def log_psi_fn(spins: jax.Array) -> jax.Array:
        return model_fn(params, {"spins": spins})

    log_psi = log_psi_fn(spins)
    energies = local_energies(system, log_psi_fn, spins, log_psi, batch_size)
    return {"spins": spins, "log_psi": log_psi, "energies": energies}


def output_loss(log_psi: jax.Array, batch: Batch) -> jax.Array:
    """2 Re mean(w conj(e - E) log ψ), whose gradient is that of the energy."""
    weights = batch.get("weights", 1.0)
    deviations = batch["energies"] - jnp.mean(weights * batch["energies"])
    return 2 * jnp.mean(weights * jnp.real(jnp.conj(deviations) * log_psi))


def energy_gradient(model_fn: ModelFn, params: PyTree, batch: Batch) -> PyTree:
    """∂E/∂θ on the samples; for complex θ = x + iy, ∂E/∂x + i ∂E/∂y."""
    grads = jax.grad(lambda p: output_loss(model_fn(p, batch), batch))(params)
    # JAX uses the opposite sign of i.
    return jax.tree.map(jnp.conj, grads)


def reweighted_energy(
    system: SpinSystem,
    model_fn: ModelFn,
    params: PyTree,
    batch: Batch,
    batch_size: int | None = None,
) -> jax.Array:
    """The energy of other parameters on the same samples, by reweighting.

        E(θ') = Σ w' e(θ') / Σ w',   w' = w |ψ'(s)/ψ(s)|²

    This is the loss for a line search or an adaptive damping. Accurate only near θ.
    """
    moved = energy_batch(system, model_fn, params, batch["spins"], batch_size)
    log_weights = 2 * jnp.real(moved["log_psi"] - batch["log_psi"])
    log_weights += jnp.log(batch.get("weights", 1.0))
    weights = jax.nn.softmax(log_weights)
    return jnp.sum(weights * jnp.real(moved["energies"]))
