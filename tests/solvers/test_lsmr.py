"""LSMR on matrices: against SciPy step by step, and against the SVD in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from hypothesis import given
from hypothesis import strategies as st

import ngd_jax as ngd
from tests.marks import float64_is_long, long_unless
from tests.solvers.rectangular import (
    EPS,
    matrix_of,
    relative_error,
    solve,
    true_residual,
    truth,
)

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus


# --- Solutions.


@pytest.mark.parametrize("reorthogonalize", long_unless([True], [False, True]))
def test_iterates_are_those_of_scipy(reorthogonalize, x64, rng):
    matrix, rhs = rng.normal(size=(25, 20)), rng.normal(size=25)
    for budget, damping in itertools.product((2, 8), (0.0, 0.01)):
        expected, _, _, _, gradient_norm, *_ = scipy.sparse.linalg.lsmr(
            matrix,
            rhs,
            damp=np.sqrt(damping),
            atol=0,
            btol=0,
            conlim=0,
            maxiter=budget,
        )
        x, info = solve(
            matrix,
            rhs,
            damping,
            "float64",
            max_steps=budget,
            reorthogonalize=reorthogonalize,
        )
        assert int(info.num_steps) == budget
        assert int(info.status) == Status.MAX_STEPS
        np.testing.assert_allclose(x, expected, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(
            float(info.relative_residual) * np.linalg.norm(matrix.T @ rhs),
            gradient_norm,
            rtol=1e-9,
        )


MATRICES = {
    "tall": ((30, 12), np.geomspace(1, 0.1, 12)),
    "wide": ((12, 30), np.geomspace(1, 0.1, 12)),
    "rank 4": ((30, 12), np.geomspace(2, 0.5, 4)),
    "orthogonal": ((12, 12), np.ones(12)),
    "one row": ((1, 5), [3.0]),
    "one column": ((5, 1), [3.0]),
    "clustered": ((30, 12), [1.0] * 6 + [3.0] * 6),
}


@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-4, 1.0])
@pytest.mark.parametrize("kind", MATRICES)
@float64_is_long
def test_solution_is_that_of_the_svd(kind, damping, dtype, rng):
    (rows, columns), values = MATRICES[kind]
    matrix = matrix_of(rng, rows, columns, values)
    rhs = rng.normal(size=rows)
    x, info = solve(matrix, rhs, damping, dtype)
    # κ² ε for a right-hand side out of range (Higham 2002, theorem 20.1). Rounded, the
    # matrix of rank 4 has singular values of size ε more, for which λ is no match.
    eps = np.finfo(dtype).eps
    bound = 50 * (max(values) / min(values)) ** 2 * eps
    assert relative_error(x, truth(matrix, rhs, damping)) <= bound
    assert int(info.status) in (Status.CONVERGED, Status.STAGNATED)
    assert int(info.num_steps) <= len(values) + 1


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 24),
    condition=st.floats(0, 2),
    rank=st.integers(1, 24),
    damping_exponent=st.floats(-4, 0),
)
def test_any_small_matrix_is_solved(seed, rows, condition, rank, damping_exponent):
    rng = np.random.default_rng(seed)
    values = np.logspace(-condition, 0, min(rank, rows, 16))
    matrix = np.float32(matrix_of(rng, rows, 16, values))
    rhs = np.float32(rng.normal(size=rows))
    damping = np.float32(10.0**damping_exponent)
    x, info = solve(matrix, rhs, damping)
    expected = truth(matrix, rhs, damping, rcond=1e-5)
    # Higham 2002, theorem 20.1, for [A; √λ I], of norm 1 and condition number κ.
    condition = 1 / np.sqrt(damping)
    outside = np.linalg.norm(rhs - matrix @ expected)
    bound = condition * np.linalg.norm(expected) + condition**2 * outside
    assert np.linalg.norm(x - expected) <= 10 * EPS * bound
    assert int(info.status) in (Status.CONVERGED, Status.STAGNATED)


@pytest.mark.long
def test_complex_systems_are_solved_in_real_inner_products(rng):
    # A maps real parameters to complex coefficients: Aᵀ u = Re Aᴴ u.
    kind = "complex64"
    matrix = rng.normal(size=(20, 6)) + 1j * rng.normal(size=(20, 6))
    rhs = rng.normal(size=20) + 1j * rng.normal(size=20)
    a = jnp.asarray(matrix, kind)
    run = functools.partial(ngd.lsmr, max_steps=20)
    x, info = jax.jit(
        lambda b: run(
            lambda v: a @ v, lambda u: jnp.real(jnp.conj(a.T) @ u), b, damping=0.1
        )
    )(jnp.asarray(rhs, kind))
    stacked, padded = (np.concatenate([z.real, z.imag]) for z in (matrix, rhs))
    assert x.dtype == jnp.float32
    tolerance = 1e3 * EPS
    np.testing.assert_allclose(x, truth(stacked, padded, 0.1), rtol=tolerance)
    # And complex parameters.
    x, info = jax.jit(lambda b: run(lambda v: a @ v, lambda u: jnp.conj(a.T) @ u, b))(
        jnp.asarray(rhs, kind)
    )
    expected = np.linalg.lstsq(matrix, rhs)[0]
    np.testing.assert_allclose(x, expected, rtol=tolerance)
    assert int(info.num_steps) <= 13


def test_trees_of_small_and_large_leaves_are_one_system(rng):
    # Above 2**16 entries a leaf is kept as it is.
    diagonal = {
        "large": jnp.asarray(rng.uniform(1, 2, size=(300, 250)), jnp.float32),
        "small": [jnp.asarray(rng.uniform(1, 2, size=7), jnp.float32), jnp.float32(2)],
    }
    rhs = jax.tree.map(lambda d: jnp.asarray(rng.normal(size=d.shape), "f4"), diagonal)

    def multiply(v):
        return jax.tree.map(jnp.multiply, diagonal, v)

    x, info = jax.jit(
        lambda rhs: ngd.lsmr(multiply, multiply, rhs, max_steps=30, rtol=1e-5)
    )(rhs)
    assert int(info.status) == Status.CONVERGED
    assert jax.tree.structure(x) == jax.tree.structure(rhs)
    for leaf, b, d in zip(*map(jax.tree.leaves, (x, rhs, diagonal)), strict=True):
        np.testing.assert_allclose(leaf, b / d, atol=1e-3)


# --- The case for LSMR: where the square root of F still works, and F does not.


@jax.jit
def squared(matrix, g, damping):
    """CG on Aᵀ A."""
    return ngd.conjugate_gradient(
        lambda v: matrix.T @ (matrix @ v), g, damping=damping, max_steps=600
    )


@pytest.mark.parametrize("spectrum", ["few", "geometric"])
@pytest.mark.parametrize("relative_damping", [0.0, 1e-12, 1e-10])
def test_a_condition_number_of_1e10_is_solved_in_float32(spectrum, relative_damping):
    rng = np.random.default_rng(1)
    values = np.geomspace(1, 1e-5, 60)
    if spectrum == "few":
        values = np.concatenate([np.ones(50), np.geomspace(0.3, 1e-5, 10)])
    matrix = np.float32(matrix_of(rng, 150, 60, values))
    rhs = np.float32(matrix.astype(float) @ rng.normal(size=60))
    damping = np.float32(relative_damping)
    expected = truth(matrix, rhs, damping)
    # 1e5 ε = 1.2e-2 for the condition number of A (the right-hand side is in range) ...
    x, info = solve(matrix, rhs, damping, max_steps=80)
    assert relative_error(x, expected) <= 1e5 * EPS
    assert int(info.num_steps) <= 60
    assert int(info.status) in (Status.CONVERGED, Status.STAGNATED)
    np.testing.assert_allclose(
        float(info.relative_residual),
        true_residual(matrix, rhs, damping, x),
        rtol=0.2,
        atol=EPS,
    )
    # ... and 1e10 ε > 1 for that of F: with g = Aᵀ b no digit is left, at any budget.
    x, _ = squared(jnp.asarray(matrix), jnp.asarray(matrix.T @ rhs), damping)
    assert relative_error(np.asarray(x, float), expected) >= 0.1


def test_reorthogonalising_saves_most_of_the_steps(rng):
    matrix = np.float32(matrix_of(rng, 30, 30, np.geomspace(1, 1e-4, 30)))
    rhs = np.float32(matrix.astype(float) @ rng.normal(size=30))
    expected = truth(matrix, rhs)
    x, info = solve(matrix, rhs)
    assert int(info.num_steps) <= 30
    assert relative_error(x, expected) <= 1e4 * EPS
    x, _ = solve(matrix, rhs, reorthogonalize=False)
    assert relative_error(x, expected) >= 0.1


@pytest.mark.long
def test_without_reorthogonalising_it_gets_there_too(rng):
    matrix = np.float32(matrix_of(rng, 30, 30, [1.0] * 22 + [0.1] * 4 + [1e-4] * 4))
    rhs = np.float32(matrix.astype(float) @ rng.normal(size=30))
    x, _ = solve(matrix, rhs, max_steps=400, reorthogonalize=False)
    assert relative_error(x, truth(matrix, rhs)) <= 1e4 * EPS


# --- Scales.


@pytest.mark.long
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-80, 80))
def test_powers_of_two_in_the_right_hand_side_pass_through_exactly(seed, exponent):
    rng = np.random.default_rng(seed)
    matrix = matrix_of(rng, 24, 16, np.geomspace(1, 1e-2, 16))
    rhs = np.float32(rng.uniform(1, 2, size=24))
    one, info = solve(matrix, rhs, 1e-4, max_steps=8)
    other, other_info = solve(matrix, np.ldexp(rhs, exponent), 1e-4, max_steps=8)
    np.testing.assert_array_equal(other, np.ldexp(one, exponent))
    assert float(info.relative_residual) == float(other_info.relative_residual)


@pytest.mark.parametrize("rhs_scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_every_scale_converges_in_float32(scale, rhs_scale, rng):
    matrix = np.float32(scale * matrix_of(rng, 24, 16, np.geomspace(1, 0.03, 16)))
    rhs = np.float32(rhs_scale * rng.normal(size=24))
    damping = np.float32(1e-4 * scale**2)
    x, info = solve(matrix, rhs, damping, rtol=1e-5)
    assert int(info.status) == Status.CONVERGED
    assert relative_error(x, truth(matrix, rhs, damping)) <= 1e-2
