"""SVD against the singular values of A known from NumPy, and what it promises.

A = U σ Vᵀ:    (F + λI)⁻¹ (Aᵀ w + z) = V σ / (σ² + λ) Uᵀ w + z / λ,    Vᵀ z = 0
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax.contrib import SVD
from ngd_jax.coordinates import ravel_real
from tests import dense_models, reference
from tests.test_dense import RESIDUALS, columns, residual_case, residuals

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus


class Problem:
    """A model on a batch, its A in float64, and solves that are compiled once."""

    def __init__(self, model_fn, params, batch, likelihood):
        arguments = (model_fn, params, batch, likelihood)
        self.params = params
        self.root = columns(*arguments)
        self.u, self.s, vt = np.linalg.svd(self.root, full_matrices=False)
        self.v = vt.T

        @functools.partial(jax.jit, static_argnames=("rcond", "is_known"))
        def solve(g, w, damping, rcond, is_known):
            fisher = ngd.linearize_fisher(*arguments)
            like = jax.eval_shape(lambda: fisher.sqrt_matvec(params))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            coefficients = ravel_real(zeros)[1](w) if is_known else None
            rhs = ngd.RightHandSide(ravel_real(params)[1](g), coefficients=coefficients)
            solution = ngd.solve_scaled(SVD(rcond), fisher, rhs, damping=damping)
            return ravel_real(solution.direction)[0], solution.info

        self._solve = solve

    def solve(self, g, w=None, damping=0.0, rcond=1e-10):
        is_known = w is not None
        w = np.zeros(len(self.root)) if w is None else w
        solution, info = self._solve(
            jnp.asarray(g), jnp.asarray(w), damping, rcond, is_known
        )
        return np.asarray(solution), info


@functools.cache
def problem(name):
    rng = np.random.default_rng(2)

    def network(num_outputs, num_examples, num_hidden):
        params = reference.network_params(
            rng, num_outputs, num_inputs=4, num_hidden=num_hidden
        )
        params = jax.tree.map(lambda p: jnp.asarray(p, "float64"), params)
        return params, jnp.asarray(rng.normal(size=(num_examples, 4)))

    def amplitude(params, x):
        z = reference.network(params, x)
        return jax.lax.complex(z[..., 0], z[..., 1])

    net = reference.network
    make = {
        "many samples": lambda: (net, *network(3, 40, 2), ngd.Categorical()),
        "many parameters": lambda: (net, *network(2, 6, 8), ngd.Gaussian()),
        "complex": lambda: (amplitude, *network(2, 7, 8), ngd.LogAmplitude()),
        "residuals": lambda: (residuals, *residual_case(rng, num_hidden=9), RESIDUALS),
    }
    return Problem(*make[name]())


PROBLEMS = [
    "many samples",
    "many parameters",
    pytest.param("complex", marks=pytest.mark.slow),
    pytest.param("residuals", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", PROBLEMS)
def test_solution_with_coefficients_equals_numpy(name, x64, rng):
    p = problem(name)
    rank = int((p.s > 1e-10 * p.s[0]).sum())
    w = rng.normal(size=len(p.root))
    for damping in (0.0, 1e-12, 1e-3, 1.0):
        values = p.s[:rank]
        factors = values / (values**2 + damping)
        truth = p.v[:, :rank] @ (factors * (p.u[:, :rank].T @ w))
        solution, info = p.solve(p.root.T @ w, w, damping)
        error = np.linalg.norm(solution - truth) / np.linalg.norm(truth)
        # Never the square of the condition number of the part that is kept.
        assert error <= 100 * np.finfo(float).eps * p.s[0] / values[-1]
        assert int(info.status) == Status.CONVERGED
        assert int(info.num_steps) == 0


@pytest.mark.parametrize("name", ["many samples", "many parameters"])
def test_solution_without_coefficients_equals_numpy(name, x64, rng):
    p = problem(name)
    g = rng.normal(size=p.root.shape[1])
    fisher = p.root.T @ p.root
    for damping in (1e-2, 1.0):
        truth = np.linalg.solve(fisher + damping * np.eye(len(g)), g)
        solution, info = p.solve(g, damping=damping)
        np.testing.assert_allclose(solution, truth, rtol=1e-9, atol=1e-11)
        assert int(info.status) == Status.CONVERGED
    # Without damping: of all closest solutions, the shortest.
    truth = np.linalg.pinv(p.root, rcond=1e-10) @ np.linalg.pinv(p.root.T) @ g
    solution, info = p.solve(g)
    np.testing.assert_allclose(solution, truth, rtol=1e-6, atol=1e-8 * abs(truth).max())
    outside = g - p.root.T @ np.linalg.lstsq(p.root.T, g, rcond=1e-13)[0]
    np.testing.assert_allclose(
        info.relative_residual,
        np.linalg.norm(outside) / np.linalg.norm(g),
        rtol=1e-5,
        atol=1e-7,
    )


def test_small_singular_values_are_left_out(x64, rng):
    p = problem("many samples")
    w = rng.normal(size=len(p.root))
    rcond = float(p.s[5] + p.s[6]) / 2 / p.s[0]
    truth = p.v[:, :6] @ ((p.u[:, :6].T @ w) / p.s[:6])
    solution, info = p.solve(p.root.T @ w, w, rcond=rcond)
    np.testing.assert_allclose(solution, truth, rtol=0, atol=1e-10 * abs(truth).max())
    left_out = p.v[:, 6:] @ (p.s[6:] * (p.u[:, 6:].T @ w))
    np.testing.assert_allclose(
        info.relative_residual,
        np.linalg.norm(left_out) / np.linalg.norm(p.root.T @ w),
        rtol=1e-6,
    )
    assert int(info.status) == Status.STAGNATED


def test_a_gradient_beside_the_rows_is_divided_by_the_damping(x64, rng):
    p = problem("many parameters")
    z = rng.normal(size=p.root.shape[1])
    for _ in range(2):
        z -= p.v @ (p.v.T @ z)
    w = rng.normal(size=len(p.root))
    factors = p.s / (p.s**2 + 0.1)
    truth = p.v @ (factors * (p.u.T @ w)) + z / 0.1
    solution, info = p.solve(p.root.T @ w + z, w, 0.1)
    np.testing.assert_allclose(solution, truth, rtol=0, atol=1e-10 * abs(truth).max())
    assert int(info.status) == Status.CONVERGED


def test_zero_and_non_finite_right_hand_sides(x64, rng):
    p = problem("many samples")
    zero = np.zeros(p.root.shape[1])
    solution, info = p.solve(zero, damping=0.1)
    assert not solution.any()
    assert int(info.status) == Status.CONVERGED
    for bad in (np.nan, np.inf):
        broken = zero.copy()
        broken[1] = bad
        solution, info = p.solve(broken, damping=0.1)
        assert not solution.any()
        assert int(info.status) == Status.NON_FINITE
        assert float(info.relative_residual) == 1.0


@pytest.mark.parametrize("exponent", [-80, 80])
def test_powers_of_two_pass_through_exactly(exponent, x64, rng):
    p = problem("many samples")
    g = p.root.T @ rng.normal(size=len(p.root))
    one, _ = p.solve(g, damping=0.1)
    other, _ = p.solve(np.ldexp(g, exponent), damping=0.1)
    np.testing.assert_array_equal(other, np.ldexp(one, exponent))


def test_what_makes_no_sense_is_refused():
    for rcond in (-1e-3, 1.0):
        with pytest.raises(ValueError, match="`rcond` must be None or in"):
            SVD(rcond)

    def solve(params):
        fisher = ngd.linearize_fisher(
            lambda w, x: x @ w, params, jnp.eye(2), ngd.Gaussian()
        )
        rhs = ngd.RightHandSide(params, coefficients=jnp.ones(3))
        return ngd.solve_scaled(SVD(), fisher, rhs, damping=0.0).direction

    with pytest.raises(ValueError, match="coefficients"):
        jax.eval_shape(solve, jnp.ones((2, 1)))


def test_models_that_mix_examples_are_solved_all_the_same(x64, rng):
    params, batch = dense_models.make(rng)
    arguments = (dense_models.batch_norm, params, batch, ngd.Gaussian())
    root = columns(*arguments)
    g = rng.normal(size=root.shape[1])

    @jax.jit
    def solve(g):
        fisher = ngd.linearize_fisher(*arguments)
        d, info = SVD()(fisher, ravel_real(params)[1](g), damping=0.1)
        return ravel_real(d)[0], info

    d, info = solve(g)
    truth = np.linalg.solve(root.T @ root + 0.1 * np.eye(len(g)), g)
    np.testing.assert_allclose(d, truth, rtol=1e-9, atol=1e-10)
    assert int(info.status) == Status.CONVERGED
