"""CG with a float32 factor against singular values in float64, at easy and hard λ.

A = U σ Vᵀ:    (F + λI)⁻¹ Aᵀ w = V σ / (σ² + λ) Uᵀ w
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax.contrib import CholeskyFactor
from ngd_jax.coordinates import ravel_real
from tests import dense_models, reference
from tests.test_dense import columns

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus


# Regular, and singular.
@pytest.mark.parametrize(
    "num_examples", [pytest.param(400, marks=pytest.mark.slow), 60]
)
def test_a_float32_factor_is_as_good_as_a_float64_one(num_examples, x64, rng):
    params = reference.network_params(
        rng, 1, num_inputs=9, num_hidden=12, dtype="float64"
    )
    x = jnp.asarray(rng.normal(size=(num_examples, 9)))

    def model_fn(params, x):
        return reference.network(params, x)[..., 0]

    root = columns(model_fn, params, x, ngd.LogAmplitude())
    u, s, v = np.linalg.svd(root, full_matrices=False)
    w = rng.normal(size=len(root))

    @jax.jit
    def solve(g, damping):
        fisher = ngd.linearize_fisher(model_fn, params, x, ngd.LogAmplitude())
        solvers = (
            ngd.Cholesky(),
            ngd.CG(30, rtol=2e-15, preconditioner=CholeskyFactor()),
        )
        rhs = ravel_real(params)[1](g)
        found = [solver(fisher, rhs, damping=damping) for solver in solvers]
        return [(ravel_real(d)[0], info) for d, info in found]

    for relative in (1.0, 1e-2, 1e-4, 1e-6):
        damping = relative * s[0] ** 2
        truth = v.T @ (s / (s**2 + damping) * (u.T @ w))
        errors = []
        found = solve(root.T @ w, damping)
        for d, _ in found:
            errors.append(np.linalg.norm(d - truth) / np.linalg.norm(truth))
        # Backward stable: the round-off times the condition number.
        assert errors[1] <= max(2 * errors[0], 64 * 2e-16 / relative)
        if relative >= 1e-4:
            assert int(found[1][1].num_steps) <= 8


def test_models_that_mix_examples_are_solved_all_the_same(x64, rng):
    params, batch = dense_models.make(rng)
    arguments = (dense_models.batch_norm, params, batch, ngd.Gaussian())
    root = columns(*arguments)
    g = rng.normal(size=root.shape[1])

    @jax.jit
    def solve(g):
        fisher = ngd.linearize_fisher(*arguments)
        solver = ngd.CG(20, rtol=1e-13, preconditioner=CholeskyFactor())
        return ravel_real(solver(fisher, ravel_real(params)[1](g), damping=0.1)[0])[0]

    truth = np.linalg.solve(root.T @ root + 0.1 * np.eye(len(g)), g)
    np.testing.assert_allclose(solve(g), truth, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, "half a number"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="`dtype` must be"):
        CholeskyFactor(dtype)
