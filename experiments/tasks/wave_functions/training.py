"""A step towards the ground state: samples, local energies, gradient, update.

Stochastic reconfiguration is `natural_gradient` with the likelihood `LogAmplitude`; any
other optimizer of the programs can take the same steps.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import ngd_jax as ngd
from experiments.running.dispatch import fix_types, match_types, take_steps
from experiments.running.optimizers import read_step_info
from experiments.tasks import Task
from experiments.tasks.wave_functions.energy import (
    energy_gradient,
    output_loss,
    reweighted_energy,
)
from experiments.tasks.wave_functions.error_bars import (
    standard_error,
    v_score,
)
from experiments.tasks.wave_functions.hamiltonians import SpinSystem

__all__ = [
    "Parts",
    "Samples",
    "WaveFunctionState",
    "init_state",
    "make_train_chunk",
    "model_task",
]

PyTree = Any
Records = dict[str, jax.Array]


class WaveFunctionState(NamedTuple):
    """Everything that the next step needs.

    Attributes:
      step: int32, steps taken.
      key: typed PRNG key for all samples.
      params: of log ψ.
      chains: the current state of the Markov chains, `[C, L]`; an empty tuple for exact
        samples.
      opt_state: state of the optimizer.
    """

    step: jax.Array
    key: jax.Array
    params: PyTree
    chains: PyTree
    opt_state: PyTree


class Samples(NamedTuple):
    """Configurations of C independent chains.

    Attributes:
      spins: `[draws, C, L]`.
      energies: local energies, `[draws, C]`.
      chains: the new state of the chains.
      records: the sampler's own.
      weights: of mean 1, `[draws, C]`, of configurations that are no samples but all
        that there are; None for samples of |ψ|².
    """

    spins: jax.Array
    energies: jax.Array
    chains: PyTree
    records: Records
    weights: jax.Array | None = None


# Of (key, params, chains).
Sampler = Callable[[jax.Array, PyTree, PyTree], Samples]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run.

    Attributes:
      system: the Hamiltonian.
      model: log ψ in the form that optimizers expect.
      tx: the optimizer.
      start: (key, params) -> chains before the first step.
      sample: draws the configurations of a step.
      measure_kl: whether to measure the KL of a step if `tx` does not.
      batch_size: number of configurations of a forward pass.
      radius: steps taken -> `max_kl`; None for a constant one.
    """

    system: SpinSystem
    model: Task
    tx: optax.GradientTransformationExtraArgs
    start: Callable[[jax.Array, PyTree], PyTree]
    sample: Sampler
    measure_kl: bool
    batch_size: int
    radius: optax.Schedule | None = None


def model_task(
    init_fn: Callable[[jax.Array], PyTree],
    model_fn: Callable[[PyTree, PyTree], jax.Array],
    *,
    is_weighted: bool = False,
) -> Task:
    """Log ψ in the form that optimizers expect: a task whose data are its samples."""
    return Task(
        name="wave function",
        train={},
        test={},
        init_fn=lambda key: (init_fn(key), {}),
        model_fn=model_fn,
        likelihood=ngd.LogAmplitude(),
        output_loss_fn=output_loss,
        weights_fn=(lambda batch: batch["weights"]) if is_weighted else None,
    )


def take_step(
    parts: Parts, state: WaveFunctionState
) -> tuple[WaveFunctionState, Records]:
    """One step, on samples of the current model."""
    model_fn, params = parts.model.model_fn, state.params
    key = jax.random.fold_in(state.key, state.step)
    samples = parts.sample(key, params, state.chains)
    system, batch_size = parts.system, parts.batch_size
    spins, local = samples.spins.reshape(-1, system.num_spins), samples.energies
    log_psi = model_fn(params, {"spins": spins})
    batch = {"spins": spins, "log_psi": log_psi, "energies": local.ravel()}
    if samples.weights is None:
        weights, error = 1.0, standard_error(jnp.real(local))
    else:
        weights, error = samples.weights, jnp.zeros(())
        batch["weights"] = weights.ravel()
    mean = jnp.mean(weights * local)
    energy, variance = jnp.real(mean), jnp.mean(weights * jnp.abs(local - mean) ** 2)
    grads = energy_gradient(model_fn, params, batch)
    updates, opt_state = parts.tx.update(
        grads,
        state.opt_state,
        params,
        batch=batch,
        value=energy,
        grad=grads,
        value_fn=functools.partial(
            reweighted_energy, system, model_fn, batch_size=batch_size
        ),
    )
    new_params = optax.apply_updates(params, updates)
    record = {
        "loss": energy / system.num_spins,
        "loss_standard_error": error / system.num_spins,
        "energy_variance": variance,
        "v_score": v_score(energy, variance, system.num_spins),
        **samples.records,
        **read_step_info(opt_state),
    }
    if parts.radius is not None:
        # A refused step leaves the count, and so the radius, as it was.
        count = optax.tree.get(state.opt_state, "NaturalGradientState").count
        record["max_kl"] = jnp.asarray(parts.radius(count))
    if parts.measure_kl and "measured_kl" not in record:
        record["measured_kl"] = ngd.mean_kl(
            model_fn, params, new_params, batch, parts.model.likelihood
        )
    chains = samples.chains
    new = WaveFunctionState(state.step + 1, state.key, new_params, chains, opt_state)
    # The loop over steps needs types that do not change.
    return match_types(new, state), record


def init_state(parts: Parts, seed: int) -> WaveFunctionState:
    """The state before the first step; all randomness comes from `seed`."""

    @jax.jit  # so that every leaf gets a buffer of its own, as donation demands
    def init(key: jax.Array) -> WaveFunctionState:
        init_key, chain_key, sample_key = jax.random.split(key, 3)
        params, _ = parts.model.init_fn(init_key)
        return WaveFunctionState(
            step=jnp.zeros((), jnp.int32),
            key=sample_key,
            params=params,
            chains=parts.start(chain_key, params),
            opt_state=parts.tx.init(params),
        )

    return fix_types(init(jax.random.key(seed)))


def make_train_chunk(parts: Parts, capacity: int) -> jax.stages.Wrapped:
    """Builds `train_chunk(state, num_steps) -> (state, records)`, jitted.

    It donates `state`, takes `num_steps <= capacity` steps, and returns records with a
    leading axis of length `capacity`, of which only the first `num_steps` are valid.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_chunk(
        state: WaveFunctionState, num_steps: jax.Array
    ) -> tuple[WaveFunctionState, Records]:
        return take_steps(
            lambda state, _: take_step(parts, state), state, num_steps, capacity
        )

    return train_chunk
