"""Every iterate of LSMR is the best of its Krylov space, by NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax.solvers.golub_kahan import LeastSquares, inverse, solve


def _solve(matrix, b, damping, max_steps):
    zeros = jnp.zeros(matrix.shape[1])
    system = LeastSquares(
        matvec=lambda v: matrix @ v,
        rmatvec=lambda u: matrix.T @ u,
        w=jnp.asarray(b),
        r=zeros,
        dropped=zeros,
        damping=jnp.asarray(damping),
        precision=float(np.finfo(float).eps),
        limits=ngd.LSMR(max_steps, 0.0),
    )
    return solve(system, jnp.asarray(matrix.T @ b))


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_iterates_minimise_the_residual_of_the_normal_equations(damping, rng, x64):
    matrix, b = rng.normal(size=(9, 6)), rng.normal(size=9)
    normal, gradient = matrix.T @ matrix + damping * np.eye(6), matrix.T @ b
    krylov = np.stack([np.linalg.matrix_power(normal, k) @ gradient for k in range(6)])
    for num_steps in (1, 3, 5):
        x, info = _solve(matrix, b, damping, num_steps)
        basis, _ = np.linalg.qr(krylov[:num_steps].T)
        best = basis @ np.linalg.lstsq(normal @ basis, gradient, rcond=None)[0]
        np.testing.assert_allclose(x, best, rtol=1e-7, atol=1e-9)
        left = np.linalg.norm(gradient - normal @ x) / np.linalg.norm(gradient)
        np.testing.assert_allclose(info.relative_residual, left, rtol=1e-6)
        assert info.num_steps == num_steps
    x, _ = _solve(matrix, b, damping, 6)
    np.testing.assert_allclose(x, np.linalg.solve(normal, gradient), rtol=1e-8)


def test_the_inverse_of_zero_is_zero():
    np.testing.assert_array_equal(inverse(jnp.array([0.0, 4.0])), [0.0, 0.25])
