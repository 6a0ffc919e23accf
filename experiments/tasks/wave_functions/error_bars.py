"""The error of the mean of Markov chain samples, and how much the samples are worth.

    x̄ = Σ x(t, c) / (N C),   Var x̄ = τ Var x / (N C),   τ = 1 + 2 Σ_t ρ(t)

over N successive draws t of each of C independent chains c; ρ(t) is the correlation of
draws t steps apart. Independent samples are chains of a single draw.
"""

import math

import jax
import jax.numpy as jnp

__all__ = ["autocorrelation_time", "standard_error", "v_score"]

# If ρ is exponential, the lags beyond this multiple of τ are e⁻⁶ of its sum.
WINDOW = 3.0


def standard_error(draws: jax.Array) -> jax.Array:
    """The standard deviation of the mean, from the spread of the chains' means.

    Each chain is one block, so this is valid however the draws of a chain depend on
    each other; its own relative error is 1/√(2(C - 1)).

    Args:
      draws: x, `[N, C]` with C > 1.
    """
    means = jnp.mean(draws, axis=0)
    return jnp.std(means, ddof=1) / math.sqrt(len(means))


def autocorrelation_time(draws: jax.Array) -> jax.Array:
    """The integrated autocorrelation time τ, in draws; 1 for independent draws.

    ρ(t) is estimated from the pairs of all chains around their common mean, and summed
    up to the first t ≥ 3 max(τ(t), 1), since later lags only add noise. N draws give at
    most N - 1 lags: if none is late enough, all of them are summed, and a τ above N/3
    is underestimated. NaN if all draws are equal.

    Args:
      draws: x, `[N, C]`.

    References:
      Sokal, Monte Carlo methods in statistical mechanics: foundations and new
      algorithms, 1997, section 3; his τ is half of this one, and c = 6.
    """
    num_draws = len(draws)
    deviations = draws - jnp.mean(draws)
    # By Fourier transforms, padded with enough zeros that the ends do not wrap around.
    spectrum = jnp.fft.rfft(deviations, 2 * num_draws, axis=0)
    power = jnp.sum(jnp.abs(spectrum) ** 2, axis=1)
    lags = jnp.arange(num_draws)
    covariances = jnp.fft.irfft(power)[:num_draws] / (num_draws - lags)
    times = 2 * jnp.cumsum(covariances / covariances[0]) - 1
    # At least three, or the first negative ρ would end an alternating sum.
    is_late = lags >= WINDOW * jnp.maximum(times, 1)
    return times[jnp.where(jnp.any(is_late), jnp.argmax(is_late), num_draws - 1)]


def v_score(energy: jax.Array, variance: jax.Array, num_spins: int) -> jax.Array:
    """L Var H / E²: comparable between systems, and 0 for an eigenstate.

    Args:
      energy: E of the whole system, of an H without trace.
      variance: ⟨H²⟩ - E², the mean of |e - E|² over local energies e.
      num_spins: L.

    References:
      Wu et al., Variational benchmarks for quantum many-body problems, 2024.
    """
    return num_spins * variance / energy**2
