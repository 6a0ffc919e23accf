"""Linear systems for the solvers, with the truth from NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd


def root_of(matrix):
    """R with RᵀR = A, float64."""
    values, vectors = np.linalg.eigh(np.asarray(matrix, float))
    return (vectors * np.sqrt(np.maximum(values, 0))).T


def _linear(params, rows):
    return rows @ ravel_pytree(params)[0]


def fisher_of(root, like, **options):
    """The Fisher RᵀR of a linear Gaussian model, on trees like `like`."""
    params = jax.tree.map(jnp.zeros_like, like)
    rows = jnp.sqrt(jnp.asarray(len(root), root.dtype)) * root
    likelihood = ngd.Gaussian(event_ndims=0)
    return ngd.linearize_fisher(_linear, params, rows, likelihood, **options)


def diagonal_fisher(diagonal):
    """Of one example with as many outputs as parameters."""
    return ngd.linearize_fisher(
        lambda params, scale: (scale * params)[None],
        jnp.zeros_like(diagonal),
        jnp.sqrt(diagonal),
        ngd.Gaussian(),
    )


def tree_like(vector, dtype):
    """A vector as a tree of two leaves."""
    vector = jnp.asarray(vector, dtype)
    half = len(vector) // 2
    return {"a": vector[:half], "b": [vector[half:]]}


def spectrum(rng, eigenvalues):
    """A random symmetric matrix with these eigenvalues, float64."""
    size = len(eigenvalues)
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    matrix = (q * np.asarray(eigenvalues)) @ q.T
    return (matrix + matrix.T) / 2


def matrices(rng):
    """Kinds of systems that every solver must solve, float64, by name."""
    size = 12
    low_rank = rng.normal(size=(size, 4))
    diagonal = np.diag(np.linspace(0.5, 3.0, size))
    return {
        "identity": np.eye(size),
        "diagonal": diagonal,
        "dense": spectrum(rng, np.linspace(0.1, 2.0, size)),
        "clustered": spectrum(rng, [1.0] * 6 + [5.0] * 6),
        "low rank": low_rank @ low_rank.T / size,
        "zero": np.zeros((size, size)),
        "one-dimensional": np.array([[2.5]]),
    }


def flat(tree):
    leaves = [np.asarray(x, float).ravel() for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def true_residual(matrix, damping, solution, rhs):
    """‖g - (F + λI) d‖ / ‖g‖ in float64."""
    d, g = flat(solution), flat(rhs)
    residual = g - (np.asarray(matrix, float) @ d + damping * d)
    return np.linalg.norm(residual) / np.linalg.norm(g)


@functools.cache
def compiled(max_steps, rtol=0.0, atol=0.0, guess=False, preconditioned=False):
    @jax.jit
    def solve(matrix, rhs, x0=None, preconditioner=None):
        return ngd.conjugate_gradient(
            lambda v: matrix @ v,
            rhs,
            x0=x0 if guess else None,
            max_steps=max_steps,
            rtol=rtol,
            atol=atol,
            preconditioner=(lambda v: preconditioner @ v) if preconditioned else None,
        )

    return solve


def solve(
    matrix, rhs, *, max_steps=100, x0=None, preconditioner=None, dtype="f4", **options
):
    arguments = [matrix, rhs, x0, preconditioner]
    arguments = [None if a is None else jnp.asarray(a, dtype) for a in arguments]
    run = compiled(
        max_steps,
        guess=x0 is not None,
        preconditioned=preconditioner is not None,
        **options,
    )
    x, info = run(*arguments)
    assert np.isfinite(x).all()
    assert np.isfinite(info.relative_residual)
    return np.asarray(x, float), info


def residual_in_float32(matrix, x, rhs):
    """‖b - A x‖ / ‖b‖ in float64, of the system rounded to float32."""
    matrix, rhs = (np.asarray(np.float32(a), float) for a in (matrix, rhs))
    return np.linalg.norm(rhs - matrix @ x) / np.linalg.norm(rhs)


def energy(matrix, x, rhs):
    """½ xᵀAx - bᵀx, which CG minimises."""
    return 0.5 * x @ matrix @ x - rhs @ x
