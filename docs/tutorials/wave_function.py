"""Your wave function in 30 lines: stochastic reconfiguration of a spin chain.

    python docs/tutorials/wave_function.py [--quick]

You have samples of |ψ|², local energies and a function log ψ. What you write by hand
otherwise, the matrix S = Cov(∂ log ψ), its solve, the trick for many parameters (minSR)
and for momentum (SPRING), is one Optax transformation. The ring of spins below, H = -Σ
σᶻσᶻ - Σ σˣ, stands for your Hamiltonian, and all its configurations for your sampler.
"""

import itertools
import sys

import jax
import jax.numpy as jnp
import optax

import ngd_jax as ngd

jax.config.update("jax_enable_x64", True)
NUM_SPINS, NUM_HIDDEN, NUM_SAMPLES = 10, 20, 256
NUM_STEPS = 60 if "--quick" in sys.argv else 300

# --- What you have already: log ψ, a sampler, and local energies. ---------------------

SPINS = jnp.array(list(itertools.product([1.0, -1.0], repeat=NUM_SPINS)))
FLIPS = 1 - 2 * jnp.eye(NUM_SPINS)


def log_psi(params, spins):
    angles = spins @ params["w"] + params["b"]
    return spins @ params["a"] + jnp.log(jnp.cosh(angles)).sum(-1)


def sample(key, params):
    return SPINS[
        jax.random.categorical(key, 2 * log_psi(params, SPINS), shape=(NUM_SAMPLES,))
    ]


def local_energies(params, spins):
    flipped = log_psi(params, spins[:, None] * FLIPS)
    ratios = jnp.exp(flipped - log_psi(params, spins)[:, None])
    return -(spins * jnp.roll(spins, 1, axis=-1)).sum(-1) - ratios.sum(-1)


# --- What is new: the model as a function of a batch, its likelihood, and the step. ---


def model_fn(params, batch):
    return log_psi(params, batch["spins"])


def output_loss_fn(outputs, batch):  # its gradient is that of the energy
    deviations = batch["energies"] - batch["energies"].mean()
    return 2 * (deviations * outputs).mean()


tx = ngd.natural_gradient(
    0.05,
    model_fn,
    ngd.LogAmplitude(),
    damping=0.01,
    momentum=0.8,  # SPRING; 0 for plain stochastic reconfiguration
    max_kl=0.1,  # no step changes |ψ|² by more, however bad the samples are
    solver=ngd.SampleSpace(),  # minSR: the solve has the size of the samples
    loss_fn=output_loss_fn,
)


@jax.jit
def step(params, opt_state, key):
    spins = sample(key, params)
    batch = {"spins": spins, "energies": local_energies(params, spins)}
    grads = jax.grad(lambda p: output_loss_fn(model_fn(p, batch), batch))(params)
    updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
    return optax.apply_updates(params, updates), opt_state, batch["energies"].mean()


def main():
    a_key, b_key, w_key, run_key = jax.random.split(jax.random.key(0), 4)
    params = {
        "a": 0.01 * jax.random.normal(a_key, (NUM_SPINS,)),
        "b": 0.01 * jax.random.normal(b_key, (NUM_HIDDEN,)),
        "w": 0.01 * jax.random.normal(w_key, (NUM_SPINS, NUM_HIDDEN)),
    }
    opt_state = tx.init(params)
    for number, key in enumerate(jax.random.split(run_key, NUM_STEPS), start=1):
        params, opt_state, energy = step(params, opt_state, key)
        if number % 50 == 0 or number == NUM_STEPS:
            info = optax.tree.get(opt_state, "NaturalGradientInfo")
            print(
                f"step {number}: energy {energy:.4f}, KL of |ψ|² {info.measured_kl:.1e}"
            )

    # The ring is a system of free fermions, whose energy is known.
    momenta = (2 * jnp.arange(NUM_SPINS) + 1) * jnp.pi / NUM_SPINS
    ground = -jnp.sqrt(2 - 2 * jnp.cos(momenta)).sum()
    weights = jax.nn.softmax(2 * log_psi(params, SPINS))
    energy = (weights * local_energies(params, SPINS)).sum()
    print(f"relative error of the energy: {(energy - ground) / abs(ground):.1e}")


if __name__ == "__main__":
    main()
