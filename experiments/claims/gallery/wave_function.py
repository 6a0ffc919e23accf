"""Stochastic reconfiguration: the natural gradient of a wave function.

    S = ⟨D* Dᵀ⟩ - ⟨D*⟩⟨D⟩ᵀ,   f = ⟨D* E⟩ - ⟨D*⟩⟨E⟩,   θ ← θ - η (S + λI)⁻¹ f

with D = ∂ log ψ / ∂θ and the local energy E = (Hψ)/ψ, averaged over |ψ|².
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import ngd_jax as ngd
from experiments.claims.claim import check, theory
from experiments.claims.gallery.identity import (
    Identity,
    compiled,
    descend,
    equal,
    text_of,
    unequal,
)

__all__ = ["reconfiguration"]

_RATE, _DAMPING = 1e-3, 1e-3


def log_amplitude(params, batch):
    """A restricted Boltzmann machine: log ψ = a·s + Σ log cosh(b + Ws)."""
    angles = batch["spins"] @ params["w"] + params["b"]
    return batch["spins"] @ params["a"] + jnp.sum(jnp.log(jnp.cosh(angles)), axis=1)


def half_the_energy(params, batch):
    """½ ⟨ψ|H|ψ⟩ / ⟨ψ|ψ⟩, over all configurations."""
    psi = jnp.exp(log_amplitude(params, batch))
    energy = jnp.vdot(psi, batch["hamiltonian"] @ psi) / jnp.vdot(psi, psi)
    return jnp.real(energy) / 2


def natural_reconfiguration(params, batch):
    """S⁻¹f; samples of |ψ|², instead of all configurations, would need no weights."""
    tx = ngd.natural_gradient(
        _RATE,
        log_amplitude,
        ngd.LogAmplitude(),
        damping=_DAMPING,
        solver=ngd.Cholesky(),
        metric=ngd.Metric(weights_fn=lambda batch: batch["probabilities"]),
    )
    moved, state = descend(tx, half_the_energy, params, batch)
    step = jax.tree.map(lambda before, after: before - after[-1], params, moved)
    direction = jax.tree.map(lambda leaf: leaf / _RATE, step)
    return direction, jax.tree.map(lambda leaf: leaf[-1], state.info)


def reconfiguration_direction(params, batch):
    """S and f from their definitions, with derivatives by hand."""
    spins, p = batch["spins"], batch["probabilities"]
    a, b, w = params["a"], params["b"], params["w"]
    tangents = np.tanh(spins @ w + b)
    by_w = spins[:, :, None] * tangents[:, None, :]
    D = np.concatenate([spins, tangents, by_w.reshape(len(spins), -1)], axis=1)
    psi = np.exp(spins @ a) * np.prod(np.cosh(spins @ w + b), axis=1)
    energy = batch["hamiltonian"] @ psi / psi
    mean = p @ D
    S = (D.conj().T * p) @ D - np.outer(mean.conj(), mean)
    f = D.conj().T @ (p * energy) - mean.conj() * (p @ energy)
    direction = np.linalg.solve(S + _DAMPING * np.eye(len(S)), f)
    by_a, by_b, by_w = np.split(direction, np.cumsum([a.size, b.size]))
    return {"a": by_a, "b": by_b, "w": by_w.reshape(w.shape)}, S


def reconfiguration(quick: bool) -> Identity:
    """On a chain of spins in a transverse field: real and complex, and the KL.

    Condition: The outputs are log ψ at samples of |ψ|² (here all configurations,
    weighted), and the gradient is that of half the energy; for complex parameters, log
    ψ must be holomorphic, and JAX's gradient is conjugated. S is the metric of ψ, not
    of |ψ|²: the KL of a step is 4 times ½dᵀSd for real ψ, which a radius takes into
    account here.

    Source: Sorella 1998; Stokes et al. 2020

    Measured on: a restricted Boltzmann machine with {num_hidden} hidden units on a ring
    of {num_spins} spins in a transverse field, rate {_RATE:g}, λ = {_DAMPING:g}
    """
    num_spins, num_hidden = (4, 4) if quick else (8, 8)
    random = np.random.default_rng(0)
    real = {
        "a": 0.2 * random.normal(size=num_spins),
        "b": 0.2 * random.normal(size=num_hidden),
        "w": 0.2 * random.normal(size=(num_spins, num_hidden)),
    }
    phased = jax.tree.map(lambda x: x + 0.2j * random.normal(size=x.shape), real)
    # The quick run also uses complex numbers, so there is only one program to compile.
    start = jax.tree.map(lambda x: x + 0j, real) if quick else real
    problems = [
        (params, _configurations(num_spins, params)) for params in (start, phased)
    ]
    run = compiled(natural_reconfiguration)
    (found, info), (phased_found, _) = (run(*problem) for problem in problems)
    (truth, S), (phased_truth, phased_S) = (
        reconfiguration_direction(*problem) for problem in problems
    )
    damped = [matrix + _DAMPING * np.eye(len(S)) for matrix in (S, phased_S)]
    condition = float(max(np.linalg.cond(matrix) for matrix in damped))
    size = {"num_rounded": len(S), "condition": condition}
    # For the real one, whose KL is entirely in |ψ|².
    step = _RATE * np.concatenate([np.real(truth[name]).ravel() for name in "abw"])
    quadratic, kl = float(step @ np.real(S) @ step) / 2, float(info.measured_kl)
    name = "stochastic reconfiguration"
    return Identity(
        algorithm=name,
        ours=natural_reconfiguration,
        textbook=reconfiguration_direction,
        equality=equal(f"{name}, complex", phased_found, phased_truth, **size),
        limit=unequal(
            f"{name}, KL of |ψ|² and ½ dᵀSd: difference",
            quadratic,
            kl,
            "S is the metric of ψ: the Fisher of |ψ|² is 4 times as large",
        ),
        others=[
            equal(f"{name}, real", found, truth, **size),
            check(
                f"{name}, KL of a step over ½ dᵀSd",
                kl / quadratic,
                theory(3.9, 4.1, "4, but for the third order of a small step"),
            ),
        ],
        text=text_of(reconfiguration, num_hidden=num_hidden, num_spins=num_spins),
    )


def _configurations(num_spins: int, params: dict) -> dict[str, np.ndarray]:
    """All spins up and down, |ψ|² of each, and H = -Σ σᶻσᶻ - Σ σˣ on the ring."""
    spins = np.array(list(itertools.product([1.0, -1.0], repeat=num_spins)))
    flips = np.sum(spins[:, None] != spins[None], axis=2)
    bonds = np.sum(spins * np.roll(spins, 1, axis=1), axis=1)
    angles = spins @ params["w"] + params["b"]
    psi = np.exp(spins @ params["a"]) * np.prod(np.cosh(angles), axis=1)
    return {
        "spins": spins,
        "hamiltonian": -np.diag(bonds) - (flips == 1),
        "probabilities": np.abs(psi) ** 2 / np.sum(np.abs(psi) ** 2),
    }
