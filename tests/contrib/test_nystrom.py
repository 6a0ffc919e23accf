"""The sketch of F: positive definite, below F, and as good as the theory says."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from ngd_jax.contrib.nystrom import Nystrom
from tests.solvers import systems
from tests.solvers.problems import (
    KEY,
    linearize,
    matrix_of,
    network_problem,
)

pytestmark = pytest.mark.usefixtures("strict_ranks")


@functools.partial(jax.jit, static_argnames=("rank", "size"))
def nystrom_of(root, damping, key, rank, size):
    """The state and M⁻¹ as a matrix, for RᵀR."""
    fisher = matrix_of(root, root.dtype)
    nystrom = Nystrom(rank, key)
    state = nystrom.init(fisher.params)
    precondition, state = nystrom.prepare(fisher, state, damping)
    flat, unravel = ravel_pytree(fisher.params)
    eye = jnp.eye(size, dtype=flat.dtype)
    return state, jax.vmap(lambda v: ravel_pytree(precondition(unravel(v)))[0])(eye)


def approximation(state):
    vectors = [
        np.asarray(leaf, float).reshape(len(leaf), -1)
        for leaf in jax.tree.leaves(state.eigenvectors)
    ]
    basis = np.concatenate(vectors, axis=1)
    return (basis.T * np.asarray(state.eigenvalues, float)) @ basis, basis


SPECTRA = {
    "fast decay": np.logspace(0, -12, 40),
    "slow decay": np.linspace(1, 0.1, 40),
    "low rank": np.r_[np.logspace(0, -2, 5), np.zeros(35)],
    "zero": np.zeros(40),
    "identity": np.ones(40),
    "small": 1e-22 * np.logspace(0, -6, 40),
    "large": 1e18 * np.logspace(0, -6, 40),
}


@pytest.mark.parametrize("rank", [3, 40])
def test_nystrom_is_symmetric_positive_definite(dtype, rank, rng):
    for values, relative_damping in itertools.product(SPECTRA.values(), (0.0, 1e-5)):
        root = systems.root_of(systems.spectrum(rng, values))
        damping = jnp.asarray(relative_damping * max(values.max(), 1e-30), dtype)
        state, inverse = nystrom_of(jnp.asarray(root, dtype), damping, KEY, rank, 40)
        inverse = np.asarray(inverse, float)
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(inverse, inverse.T, atol=20 * eps)
        spectrum = np.linalg.eigvalsh((inverse + inverse.T) / 2)
        assert spectrum[0] > eps
        assert spectrum[-1] <= 1 + 100 * eps
        _, basis = approximation(state)
        assert np.linalg.norm(basis, 2) <= 1 + 100 * eps


def test_nystrom_is_below_the_matrix_and_near_it(x64, rng):
    values = np.logspace(0, -8, 40)
    matrix = systems.spectrum(rng, values)
    for rank in (5, 20):
        state, _ = nystrom_of(jnp.asarray(systems.root_of(matrix)), 0.0, KEY, rank, 40)
        estimate, basis = approximation(state)
        np.testing.assert_allclose(basis @ basis.T, np.eye(rank), atol=1e-12)
        assert (np.diff(state.eigenvalues) <= 0).all()
        error = np.linalg.eigvalsh(matrix - estimate)
        assert error[0] >= -1e-14
        assert error[-1] <= 20 * values[rank - rank // 4]


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6])
def test_preconditioned_condition_number_is_within_the_bound(damping, x64, rng):
    # Proposition 5.3 of Frangella, Tropp and Udell: κ ≤ (λᵣ + λ + ‖F - F̂‖) / λ.
    matrix = systems.spectrum(rng, np.logspace(0, -10, 40))
    for rank in (4, 12):
        state, inverse = nystrom_of(
            jnp.asarray(systems.root_of(matrix)), damping, KEY, rank, 40
        )
        estimate, _ = approximation(state)
        error = np.linalg.norm(matrix - estimate, 2)
        root = np.linalg.cholesky(np.asarray(inverse))
        spectrum = np.linalg.eigvalsh(root.T @ (matrix + damping * np.eye(40)) @ root)
        bound = (state.eigenvalues[-1] + damping + error) / damping
        assert spectrum[-1] / spectrum[0] <= bound * (1 + 1e-8)


def test_nystrom_of_full_rank_is_the_inverse_up_to_a_factor(x64, rng):
    matrix = systems.spectrum(rng, np.linspace(0.1, 2.0, 12))
    # More vectors than dimensions: the rank is cut to the dimension.
    state, inverse = nystrom_of(jnp.asarray(systems.root_of(matrix)), 0.5, KEY, 99, 12)
    assert state.eigenvalues.shape == (12,)
    np.testing.assert_allclose(state.eigenvalues, np.linspace(2.0, 0.1, 12))
    np.testing.assert_allclose(
        inverse @ (matrix + 0.5 * np.eye(12)), 0.6 * np.eye(12), atol=1e-10
    )


def test_rank_of_the_matrix_is_enough_for_two_steps(dtype, rng):
    params, x, _ = network_problem(rng, dtype)
    rhs = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), params)

    @jax.jit
    def solve(params, rhs):
        # Two outputs that matter for each of 9 examples: rank 18 of 22 parameters.
        solver = ngd.CG(50, rtol=1e-3, preconditioner=Nystrom(19, KEY))
        return solver(linearize(params, x), rhs, damping=1e-3)

    _, info = solve(params, rhs)
    assert int(info.status) == ngd.SolverStatus.CONVERGED
    assert int(info.num_steps) <= 2


def test_leaves_without_entries_are_no_obstacle(rng):
    params = {"none": jnp.ones((0, 3)), "w": jnp.ones(4)}
    x = jnp.asarray(rng.normal(size=(9, 4)), jnp.float32)

    @jax.jit
    def solve(params):
        fisher = ngd.linearize_fisher(
            lambda params, x: x @ params["w"], params, x, ngd.Gaussian(event_ndims=0)
        )
        solver = ngd.CG(10, rtol=1e-5, preconditioner=Nystrom(4, KEY))
        return solver(fisher, params, damping=0.1)

    solution, info = solve(params)
    matrix = np.asarray(x).T @ np.asarray(x) / 9 + 0.1 * np.eye(4)
    truth = np.linalg.solve(matrix, np.ones(4))
    np.testing.assert_allclose(solution["w"], truth, rtol=1e-4)
    assert int(info.num_steps) <= 2
