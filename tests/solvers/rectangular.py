"""Rectangular matrices with given singular values, their truth, and LSMR on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import ngd_jax as ngd

__all__ = [
    "EPS",
    "matrix_of",
    "relative_error",
    "solve",
    "true_residual",
    "truth",
]

EPS = float(np.finfo(np.float32).eps)
_SIZE = 30


def matrix_of(rng, rows, columns, singular_values):
    """A random matrix with these singular values, float64."""
    count = len(singular_values)
    u, _ = np.linalg.qr(rng.normal(size=(rows, count)))
    v, _ = np.linalg.qr(rng.normal(size=(columns, count)))
    return (u * np.asarray(singular_values)) @ v.T


def truth(matrix, rhs, damping=0.0, rcond=1e-10):
    """V σ/(σ² + λ) Uᵀ b, with σ below rcond·max σ taken for zero."""
    u, values, vt = np.linalg.svd(np.asarray(matrix, float), full_matrices=False)
    is_used = values > rcond * values.max()
    square = np.where(is_used, values**2 + float(damping), 1)
    filtered = np.where(is_used, values, 0) / square
    return vt.T @ (filtered * (u.T @ np.asarray(rhs, float)))


def true_residual(matrix, rhs, damping, x):
    matrix, rhs, x = (np.asarray(a, float) for a in (matrix, rhs, x))
    residual = matrix.T @ (rhs - matrix @ x) - float(damping) * x
    return np.linalg.norm(residual) / np.linalg.norm(matrix.T @ rhs)


def relative_error(x, expected):
    return np.linalg.norm(x - expected) / np.linalg.norm(expected)


@functools.cache
def compiled(**options):
    @jax.jit
    def solve(matrix, rhs, damping):
        return ngd.lsmr(
            lambda v: matrix @ v,
            lambda u: matrix.T @ u,
            rhs,
            damping=damping,
            **options,
        )

    return solve


def solve(matrix, rhs, damping=0.0, dtype="float32", **options):
    options = {"max_steps": 40} | options
    rows, columns = np.shape(matrix)
    # One compilation for all small shapes: rows and columns of zeros change nothing.
    more = [max(0, _SIZE - rows), max(0, _SIZE - columns)]
    matrix, rhs = np.pad(matrix, [(0, n) for n in more]), np.pad(rhs, (0, more[0]))
    arguments = (jnp.asarray(a, dtype) for a in (matrix, rhs, damping))
    x, info = compiled(**options)(*arguments)
    assert np.isfinite(x).all()
    assert not x[columns:].any()
    assert np.isfinite(info.relative_residual)
    return np.asarray(x[:columns], float), info
