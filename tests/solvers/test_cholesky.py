"""Cholesky: verified against the operator, right for every model, refined, jittered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax.coordinates import ravel_real
from tests import dense_models
from tests.test_dense import columns

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            "batch_norm_before_a_zero_head", "float64", marks=pytest.mark.long
        ),
        ("batch_norm_with_a_large_offset", "float32"),
        pytest.param("attention_over_examples", "float64", marks=pytest.mark.slow),
        pytest.param("output_mean", "float32", marks=pytest.mark.slow),
    ],
    indirect=["dtype"],
)
def test_models_that_mix_examples_are_solved(name, dtype, rng):
    model_fn = dense_models.MIXING[name]
    params, batch = dense_models.make(rng, dtype)
    root = columns(model_fn, params, batch, ngd.Gaussian()).astype(float)
    g = root.T @ rng.normal(size=len(root))

    @jax.jit
    def solve(g):
        fisher = ngd.linearize_fisher(model_fn, params, batch, ngd.Gaussian())
        d, info = ngd.Cholesky()(fisher, ravel_real(params)[1](g), damping=0.01)
        return ravel_real(d)[0], info

    d, info = solve(jnp.asarray(g, dtype))
    truth = np.linalg.solve(root.T @ root + 0.01 * np.eye(len(g)), g)
    tolerance = 1e-9 if dtype == np.float64 else 1e-3
    assert np.linalg.norm(d - truth) <= tolerance * np.linalg.norm(truth)
    assert int(info.status) == Status.CONVERGED


@pytest.mark.parametrize("verify", [True, False])
def test_a_singular_matrix_without_damping_is_jittered(verify, x64, rng):
    rows = rng.normal(size=(3, 6))

    @jax.jit
    def solve(g):
        fisher = ngd.linearize_fisher(
            lambda w, x: x @ w, jnp.zeros(6), rows, ngd.Gaussian(event_ndims=0)
        )
        return ngd.Cholesky(verify)(fisher, g, damping=0.0)

    g = rows.T @ rng.normal(size=3)
    d, info = solve(jnp.asarray(g))
    residual = np.linalg.norm(g - rows.T @ (rows @ d) / 3) / np.linalg.norm(g)
    assert residual < 1e-9
    assert abs(float(info.relative_residual) - residual) < 1e-12
    assert int(info.status) == Status.CONVERGED


def test_what_cannot_be_solved_is_reported(x64, rng):
    x = jnp.asarray(rng.normal(size=(9, 4)))

    @jax.jit
    def solve(g, x):
        fisher = ngd.linearize_fisher(
            lambda w, x: x @ w, jnp.zeros(4), x, ngd.LogAmplitude()
        )
        return ngd.Cholesky()(fisher, g, damping=0.1)

    ones = jnp.ones(4)
    for g, batch, status in [
        (ones.at[1].set(np.nan), x, Status.NON_FINITE),
        (ones, x.at[2].set(np.inf), Status.NON_FINITE),
        (0 * ones, x, Status.CONVERGED),
    ]:
        d, info = solve(g, batch)
        np.testing.assert_array_equal(d, np.zeros(4))
        assert int(info.status) == status


@pytest.mark.long
@pytest.mark.parametrize("kind", ["complex", "real"])
def test_models_that_are_not_holomorphic_are_solved(kind, x64, rng):
    x = jnp.asarray(rng.choice([-1.0, 1.0], (7, 3)))
    params = jnp.asarray(rng.normal(size=3) + 1j * rng.normal(size=3)) * 0.4

    def model_fn(w, x):
        if kind == "real":
            return jnp.log(jnp.cosh(x @ w)).real
        return jnp.log(jnp.cosh(x @ w)) + 0.3j * jnp.abs(x @ w) ** 2

    root = columns(model_fn, params, x, ngd.LogAmplitude())
    g = rng.normal(size=6)

    @jax.jit
    def solve(g):
        fisher = ngd.linearize_fisher(model_fn, params, x, ngd.LogAmplitude())
        solvers = (ngd.Cholesky(), ngd.SampleSpace())
        rhs = ravel_real(params)[1](g)
        return [ravel_real(s(fisher, rhs, damping=0.01)[0])[0] for s in solvers]

    truth = np.linalg.solve(root.T @ root + 0.01 * np.eye(6), g)
    for d in solve(g):
        np.testing.assert_allclose(d, truth, rtol=1e-9)
