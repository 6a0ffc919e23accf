"""The learner of the task `vmc`: the ground state of spins on a lattice."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.running.config import TrainConfig
from experiments.running.learner import Advance, Records, Rows
from experiments.running.optimizers import make_optimizer
from experiments.running.screen import Column
from experiments.tasks.wave_functions.checks import check
from experiments.tasks.wave_functions.energy import energy_batch
from experiments.tasks.wave_functions.error_bars import (
    autocorrelation_time,
    standard_error,
    v_score,
)
from experiments.tasks.wave_functions.exact import (
    MAX_SPINS,
    Configurations,
    enumerate_configurations,
    exact_energy,
    exact_variance,
    exact_weights,
    ground_energy,
    ising_energy,
    listed_energies,
    one_of_each_orbit,
)
from experiments.tasks.wave_functions.hamiltonians import SpinSystem, make_system
from experiments.tasks.wave_functions.models import make_model, symmetries
from experiments.tasks.wave_functions.pictures import draw_curves
from experiments.tasks.wave_functions.sampling import (
    move_chains,
    sample_exactly,
    start_chains,
)
from experiments.tasks.wave_functions.settings import (
    SamplerConfig,
    WaveFunctionConfig,
)
from experiments.tasks.wave_functions.training import (
    Parts,
    Samples,
    WaveFunctionState,
    init_state,
    make_train_chunk,
    model_task,
)

__all__ = ["WaveFunctionLearner", "annealed", "make_parts"]

# Folded into the key of a run for evaluations; step numbers never reach it.
EVALUATION_STREAM = 2**31 - 1
MARKOV_COLUMNS = (
    Column("moves", "moves_taken", ".0%"),
    Column("autocorr", "autocorrelation_time", ".1f"),
)

PyTree = Any


class WaveFunctionLearner:
    """Finds a ground state as `config` says; see `Learner`.

    Raises:
      ConfigError: settings that contradict each other.
    """

    train_data = None

    def __init__(self, config: TrainConfig):
        check(config)
        task: WaveFunctionConfig = config.task
        self._config = config
        system = make_system(
            task.hamiltonian, task.num_spins, task.field, task.coupling
        )
        can_list = task.num_spins <= MAX_SPINS
        every = enumerate_configurations(system) if can_list else None
        self._ground = _ground_energy(task, every)
        if every is not None:
            images, flip = symmetries(task.model, system.sites)
            every = one_of_each_orbit(every, images, flip=flip)
        self._all = every
        self._parts = make_parts(config, system, self._all)
        self._train_chunk = make_train_chunk(self._parts, config.steps_per_dispatch)
        self._measure = self._make_measure_fn()
        self.first_state = init_state(self._parts, config.seed)
        last = "test_energy" if self._ground is None else "test_energy_error"
        self.columns = (
            Column("E per spin", "loss", ".5f"),
            Column("std error", "loss_standard_error", ".1e"),
            Column("V-score", "v_score", ".2e"),
            *(MARKOV_COLUMNS if task.sampler.name == "metropolis" else ()),
            Column("residual", "solver_residual", ".1e"),
            Column(last.replace("_", " "), last, ".2e"),
        )

    @contextlib.contextmanager
    def start(self, state: WaveFunctionState) -> Iterator[Advance]:
        """Yields the compiled `advance(state, num_steps)`."""
        train_chunk = self._train_chunk.lower(state, np.int32(0)).compile()

        def advance(
            state: WaveFunctionState, num_steps: int
        ) -> tuple[WaveFunctionState, Records]:
            return train_chunk(state, np.int32(num_steps))

        yield advance

    def evaluate(self, state: WaveFunctionState) -> dict[str, Any]:
        """The energy, and its relative error if the ground state's is known.

        Over all configurations if they can be listed; otherwise on new samples, with
        the standard error of their mean.
        """
        values = {name: float(value) for name, value in self._measure(state).items()}
        if self._ground is not None:
            error = values["test_energy"] - self._ground
            values["test_energy_error"] = error / abs(self._ground)
        return values

    def draw(
        self, state: WaveFunctionState, records: Rows, folder: Path, title: str
    ) -> None:
        """Draws the curves of the run."""
        del state
        task: WaveFunctionConfig = self._config.task
        ground = None if self._ground is None else self._ground / task.num_spins
        name = f"{task.hamiltonian}, {task.num_spins} spins, {task.model.name}"
        draw_curves(records, folder / "curves.png", f"{name}; {title}", ground)

    def _make_measure_fn(self) -> Any:
        parts, task = self._parts, self._config.task
        model_fn, batch_size = parts.model.model_fn, self._config.eval_batch_size
        if self._all is not None:
            all_of_them = self._all

            @jax.jit
            def measure_all(state: WaveFunctionState) -> Records:
                log_psi = _log_psi_of(
                    model_fn, state.params, all_of_them.spins, batch_size
                )
                energy = exact_energy(all_of_them, log_psi)
                variance = exact_variance(all_of_them, log_psi)
                score = v_score(energy, variance, task.num_spins)
                return {"test_energy": energy, "test_v_score": score}

            return measure_all
        sampler: SamplerConfig = task.sampler
        assert sampler.eval_samples is not None
        samples = _metropolis(
            parts.system, model_fn, sampler, sampler.eval_samples, parts.batch_size
        )

        @jax.jit
        def measure_samples(state: WaveFunctionState) -> Records:
            key = jax.random.fold_in(state.key, EVALUATION_STREAM)
            key = jax.random.fold_in(key, state.step)
            drawn = samples(key, state.params, state.chains)
            energies, mixing = drawn.energies, drawn.records
            energy, variance = jnp.mean(jnp.real(energies)), jnp.var(energies)
            return {
                "test_energy": energy,
                "test_energy_standard_error": standard_error(jnp.real(energies)),
                "test_v_score": v_score(energy, variance, task.num_spins),
            } | {f"test_{name}": value for name, value in mixing.items()}

        return measure_samples


def make_parts(
    config: TrainConfig, system: SpinSystem, all_of_them: Configurations | None
) -> Parts:
    """Assembles the parts of a run."""
    task: WaveFunctionConfig = config.task
    num_samples, batch_size = config.batch_size, config.eval_batch_size
    init_fn, model_fn = make_model(task.model, system)
    sampler = task.sampler
    model = model_task(init_fn, model_fn, is_weighted=sampler.name == "all")
    if sampler.name in ("exact", "all"):
        assert all_of_them is not None
        listed, start = all_of_them, _no_chains

        def sample(key: jax.Array, params: PyTree, chains: tuple[()]) -> Samples:
            log_psi = _log_psi_of(model_fn, params, listed.spins, batch_size)
            counts = jnp.asarray(listed.counts)
            if num_samples is None:
                chosen, weights = slice(None), exact_weights(counts, log_psi)[None]
            else:
                chosen = sample_exactly(key, counts, log_psi, num_samples)
                weights = None
            spins = jnp.asarray(listed.spins)[None, chosen]
            energies = listed_energies(listed, log_psi, chosen)[None]
            return Samples(spins, energies, chains, {}, weights)
    else:
        assert num_samples is not None
        start = functools.partial(_burn_in, system, model_fn, sampler)
        sample = _metropolis(system, model_fn, sampler, num_samples, batch_size)
    optimizer = annealed(config.optimizer, task, config.steps)
    return Parts(
        system=system,
        model=model,
        tx=make_optimizer(optimizer, model),
        start=start,
        sample=sample,
        measure_kl=config.measure_kl,
        batch_size=batch_size,
        radius=None if task.last_max_kl is None else optimizer["max_kl"],
    )


def annealed(optimizer: Any, task: WaveFunctionConfig, num_steps: int) -> Any:
    """The settings of the optimizer, with schedules if the task asks for them."""
    schedules = {}
    for name in ("max_kl", "damping"):
        last = getattr(task, f"last_{name}")
        if last is not None:
            first = optimizer[name]
            schedules[name] = optax.exponential_decay(first, num_steps, last / first)
    return optimizer | schedules


def _log_psi_of(
    model_fn: Any, params: PyTree, spins: np.ndarray, batch_size: int
) -> jax.Array:
    """Log ψ of many configurations, at most `batch_size` at once."""
    return jax.lax.map(
        lambda spin: model_fn(params, {"spins": spin[None]})[0],
        jnp.asarray(spins),
        batch_size=batch_size,
    )


def _no_chains(key: jax.Array, params: PyTree) -> PyTree:
    del key, params
    return ()


def _burn_in(
    system: SpinSystem,
    model_fn: Any,
    sampler: SamplerConfig,
    key: jax.Array,
    params: PyTree,
) -> PyTree:
    assert sampler.num_chains is not None
    assert sampler.burn_in is not None
    start_key, move_key = jax.random.split(key)
    spins = start_chains(system, start_key, sampler.num_chains)
    num_moves = sampler.burn_in * system.num_spins
    spins, _ = move_chains(
        system, lambda s: model_fn(params, {"spins": s}), move_key, spins, num_moves
    )
    return spins


def _metropolis(
    system: SpinSystem,
    model_fn: Any,
    sampler: SamplerConfig,
    num_samples: int,
    batch_size: int,
) -> Any:
    """`num_samples` from Markov chains that continue from their state; a `Sampler`."""
    assert sampler.num_chains is not None
    assert sampler.sweeps is not None
    draws = num_samples // sampler.num_chains
    num_moves = sampler.sweeps * system.num_spins

    def sample(key: jax.Array, params: PyTree, chains: jax.Array) -> Samples:
        def draw(chains: jax.Array, key: jax.Array) -> Any:
            chains, moved = move_chains(
                system, lambda s: model_fn(params, {"spins": s}), key, chains, num_moves
            )
            batch = energy_batch(system, model_fn, params, chains, batch_size)
            return chains, (chains, batch["energies"], moved)

        keys = jax.random.split(key, draws)
        chains, (drawn, energies, moved) = jax.lax.scan(draw, chains, keys)
        records = {"moves_taken": jnp.mean(moved)}
        if draws > 1:
            time = autocorrelation_time(jnp.real(energies))
            records["autocorrelation_time"] = time
        return Samples(drawn, energies, chains, records)

    return sample


def _ground_energy(
    task: WaveFunctionConfig, all_of_them: Configurations | None
) -> float | None:
    if all_of_them is not None:
        return ground_energy(all_of_them)
    if task.hamiltonian == "ising" and task.num_spins % 2 == 0:
        return ising_energy(task.num_spins, 1.0 if task.field is None else task.field)
    return None
