"""Solutions of equations that have no short formula: points `[N, d]` -> u `[N]`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft

__all__ = ["allen_cahn_solution", "burgers_solution"]


def burgers_solution(
    points: jax.Array, viscosity: float, num_nodes: int = 200
) -> jax.Array:
    """u(x, t) of u_t + u uₓ = ν uₓₓ from u(x, 0) = -sin πx, by the Cole-Hopf transform.

    u = -∫ sin π(x-η) f(x-η) e^(-η²/4νt) dη / ∫ f(x-η) e^(-η²/4νt) dη with
    f(y) = e^(-cos(πy)/2πν), by Gauss-Hermite quadrature.

    References:
      Basdevant et al., Spectral and finite difference solutions of the Burgers
      equation, 1986, equations 2.2 and 2.3.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(num_nodes)
    x, t = points[:, :1], points[:, 1:]
    y = x - jnp.sqrt(4 * viscosity * t) * nodes
    exponent = -jnp.cos(jnp.pi * y) / (2 * jnp.pi * viscosity)
    # Only the ratio matters: divide out the largest exponential to avoid overflow.
    factor = weights * jnp.exp(exponent - exponent.max(axis=1, keepdims=True))
    return -(factor * jnp.sin(jnp.pi * y)).sum(axis=1) / factor.sum(axis=1)


def allen_cahn_solution(points: jax.Array) -> jax.Array:
    """u(x, t) of u_t = 0.001 uₓₓ + 5 (u - u³), u(x, 0) = cos πx (1 - cos πx) / 2.

    u = Σ cₖⱼ cos(kπx) Tⱼ(2t - 1), for t in [0, 1] and with period 2 in x.
    """
    coefficients = jnp.asarray(_allen_cahn_coefficients())
    waves, powers = (jnp.arange(n) for n in coefficients.shape)
    in_space = jnp.cos(jnp.pi * points[:, :1] * waves)
    in_time = jnp.cos(jnp.arccos(2 * points[:, 1:] - 1) * powers)
    return jnp.sum((in_space @ coefficients) * in_time, axis=1)


@functools.cache
def _allen_cahn_coefficients(num_waves: int = 288, num_times: int = 48) -> np.ndarray:
    """c, `[num_waves, num_times]`: cosines in space, Runge-Kutta steps in time.

    The series in time goes through its values at Chebyshev's points.
    """
    x = np.arange(num_waves) / (num_waves - 1)
    decay = 0.001 * (np.pi * np.arange(num_waves)) ** 2
    u = np.cos(np.pi * x) * (1 - np.cos(np.pi * x)) / 2

    def slope(u: np.ndarray) -> np.ndarray:
        spectrum = np.asarray(scipy.fft.dct(u, type=1))
        diffusion = np.asarray(scipy.fft.idct(-decay * spectrum, type=1))
        return diffusion + 5 * (u - u**3)

    times = (1 - np.cos(np.pi * np.arange(num_times) / (num_times - 1))) / 2
    values = [u]
    for span in np.diff(times):
        num_steps = int(np.ceil(2000 * span))
        h = span / num_steps
        for _ in range(num_steps):
            k1 = slope(u)
            k2 = slope(u + h / 2 * k1)
            k3 = slope(u + h / 2 * k2)
            u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(u + h * k3))
        values.append(u)
    spectrum = np.asarray(scipy.fft.dct(np.asarray(values), type=1)) / (num_waves - 1)
    spectrum[:, [0, -1]] /= 2
    at_times = np.polynomial.chebyshev.chebvander(2 * times - 1, num_times - 1)
    return np.linalg.solve(at_times, spectrum).T
