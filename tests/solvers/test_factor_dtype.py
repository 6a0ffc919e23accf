"""Factors of lower precision against singular values in float64, at easy and hard λ.

A = U σ Vᵀ:    (F + λI)⁻¹ Aᵀ w = V σ / (σ² + λ) Uᵀ w
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from tests import reference

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus


def make_problem(rng, num_examples, dtype="float64"):
    """A network, a solve of it by any factor dtype and λ, and the truth."""
    params = reference.network_params(rng, 1, num_inputs=9, num_hidden=12, dtype=dtype)
    x = jnp.asarray(rng.normal(size=(num_examples, 9)), dtype)

    def model_fn(params, x):
        return reference.network(params, x)[..., 0]

    def linearize():
        return ngd.linearize_fisher(model_fn, params, x, ngd.LogAmplitude())

    root = np.asarray(jax.jit(lambda: linearize().dense_root())(), float)
    u, s, v = np.linalg.svd(root, full_matrices=False)
    w = rng.normal(size=len(root))
    unravel = ravel_pytree(params)[1]

    def solver_of(factor_dtype):
        @jax.jit
        def solve(g, damping):
            solver = ngd.Cholesky(factor_dtype=factor_dtype)
            d, info = solver(linearize(), unravel(g), damping=damping)
            return ravel_pytree(d)[0], info

        return lambda damping: solve(jnp.asarray(root.T @ w, dtype), damping)

    def error(d, damping):
        truth = v.T @ (s / (s**2 + damping) * (u.T @ w))
        return np.linalg.norm(d - truth) / np.linalg.norm(truth)

    def round_off(d, damping):
        """(‖g‖ + ‖F + λI‖ ‖d‖) / ‖g‖ in units of ε, the norm that of Frobenius."""
        squares = np.zeros(len(d))
        squares[: len(s)] = s**2
        size = np.linalg.norm(squares + damping)
        return 1 + size * np.linalg.norm(d) / np.linalg.norm(root.T @ w)

    return solver_of, error, round_off, s[0] ** 2


# Regular, and singular.
@pytest.mark.parametrize(
    "num_examples", [pytest.param(400, marks=pytest.mark.slow), 60]
)
@pytest.mark.usefixtures("optimized")
def test_a_float32_factor_is_as_good_as_a_float64_one(num_examples, x64, rng):
    solver_of, error, round_off, largest = make_problem(rng, num_examples)
    full, low = solver_of(None), solver_of(jnp.float32)
    for relative in (1.0, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12):
        damping = relative * largest
        errors, infos = [], []
        for solve in (full, low):
            d, info = solve(damping)
            errors.append(error(np.asarray(d), damping))
            infos.append(info)
            assert int(info.status) == Status.CONVERGED
        # Backward stable: the round-off times the condition number.
        assert errors[1] <= max(2 * errors[0], 32 * 2e-16 / relative)
        # What is documented, with a tenth for the norm of a float32 matrix.
        bound = 1.1 * 16 * 2.3e-16 * round_off(np.asarray(d), damping)
        assert float(infos[1].relative_residual) <= bound
        assert int(infos[0].num_steps) == 0
        if relative >= 1e-4:
            assert 1 <= int(infos[1].num_steps) <= 8
        # At 1e-8 it depends on round-off whether 20 steps get there.
        if num_examples == 60 and relative <= 1e-10:
            assert int(infos[1].num_steps) == 0  # done again in float64
            assert errors[1] == errors[0]


def test_what_is_no_narrower_changes_nothing(rng):
    solver_of, error, _, largest = make_problem(rng, 60, "float32")
    damping = 1e-3 * largest
    d, info = solver_of(jnp.float32)(damping)
    assert int(info.num_steps) == 0
    assert error(np.asarray(d), damping) < 1e-3


def test_where_columns_are_cheaper_only_the_factor_is_of_lower_precision(x64, rng):
    x, w = jnp.asarray(rng.normal(size=(9, 4))), jnp.asarray(rng.normal(size=(4, 6)))
    g = jnp.asarray(rng.normal(size=(4, 6)))

    @jax.jit
    def solve(w):
        fisher = ngd.linearize_fisher(lambda w, x: x @ w, w, x, ngd.Categorical())
        found = ngd.Cholesky(factor_dtype="float32")(fisher, g, damping=0.1)
        return fisher.dense(), *found

    dense, d, info = solve(w)
    truth = np.linalg.solve(dense + 0.1 * np.eye(24), g.ravel())
    np.testing.assert_allclose(d.ravel(), truth, rtol=1e-11)
    assert int(info.status) == Status.CONVERGED
    assert int(info.num_steps) > 0


def test_models_that_mix_examples_are_solved_all_the_same(x64, rng):
    x, g = jnp.asarray(rng.normal(size=(9, 4))), jnp.asarray(rng.normal(size=4))

    def model_fn(w, x):
        return jnp.tanh(x - jnp.mean(x, axis=0, keepdims=True)) @ w

    @jax.jit
    def solve(w):
        fisher = ngd.linearize_fisher(model_fn, w, x, ngd.LogAmplitude())
        return ngd.Cholesky(factor_dtype=jnp.float32)(fisher, g, damping=0.1)

    d, info = solve(jnp.ones(4))
    root = np.asarray(x)
    root = root - root.mean(0)
    root = np.tanh(root)
    root = (root - root.mean(0)) / 3
    truth = np.linalg.solve(root.T @ root + 0.1 * np.eye(4), g)
    np.testing.assert_allclose(d, truth, rtol=1e-12)
    assert int(info.status) == Status.CONVERGED


def test_what_cannot_be_solved_is_told_and_zero_is_solved_by_zero(x64, rng):
    x = jnp.asarray(rng.normal(size=(9, 4)))

    @jax.jit
    def solve(g, x):
        fisher = ngd.linearize_fisher(
            lambda w, x: x @ w, jnp.zeros(4), x, ngd.LogAmplitude()
        )
        return ngd.Cholesky(factor_dtype=jnp.float32)(fisher, g, damping=0.1)

    ones = jnp.ones(4)
    for g, batch, status in [
        (ones.at[1].set(np.nan), x, Status.NON_FINITE),
        (ones, x.at[2].set(np.inf), Status.NON_FINITE),
        (0 * ones, x, Status.CONVERGED),
    ]:
        d, info = solve(g, batch)
        np.testing.assert_array_equal(d, np.zeros(4))
        assert int(info.status) == status


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, "half a number"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="`factor_dtype` must be None"):
        ngd.Cholesky(factor_dtype=dtype)
