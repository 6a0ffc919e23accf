"""Conjugate gradients: first guesses and preconditioners."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from tests import reference
from tests.solvers import systems
from tests.solvers.systems import energy, residual_in_float32, solve

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus


# --- First guesses.


def test_exact_first_guess_takes_no_step(rng):
    matrix = systems.spectrum(rng, np.linspace(0.5, 2, 16))
    x0 = rng.normal(size=16)
    x, info = solve(matrix, matrix @ x0, x0=x0, rtol=1e-4)
    assert int(info.num_steps) == 0
    assert int(info.status) == Status.CONVERGED
    np.testing.assert_allclose(x, x0, rtol=1e-5)


def test_good_first_guess_saves_steps(rng):
    matrix = systems.spectrum(rng, np.geomspace(1e-2, 1, 40))
    truth = rng.normal(size=40)
    rhs = matrix @ truth
    _, cold = solve(matrix, rhs, rtol=1e-3)
    x0 = truth + 1e-2 * rng.normal(size=40)
    x, warm = solve(matrix, rhs, x0=x0, rtol=1e-3)
    assert int(warm.num_steps) < int(cold.num_steps)
    assert residual_in_float32(matrix, x, rhs) <= 1.1e-3


def guess(kind, rhs, truth, rng):
    noise = rng.normal(size=rhs.shape)
    return {
        "huge": 1e15 * noise,
        "tiny": 1e-15 * noise,
        "opposite": -truth,
        "too long": 1e3 * truth,
        "orthogonal": noise - rhs * (noise @ rhs) / (rhs @ rhs),
        "zero": np.zeros_like(rhs),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["huge", "tiny", "opposite", "too long", "orthogonal", "zero"]
)
@pytest.mark.parametrize("max_steps", [1, 3])
def test_first_guess_is_never_worse_than_zero_in_the_norm_of_the_matrix(
    kind, max_steps, rng
):
    matrix = systems.spectrum(rng, np.geomspace(1e-2, 1, 16))
    truth = rng.normal(size=16)
    rhs = matrix @ truth
    x, _ = solve(matrix, rhs, x0=guess(kind, rhs, truth, rng), max_steps=max_steps)
    zero_step = energy(matrix, np.zeros(16), rhs)
    assert energy(matrix, x, rhs) < zero_step
    assert energy(matrix, x, rhs) >= energy(matrix, truth, rhs) * (1 + 1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_first_guesses_work_at_every_scale(scale, rng):
    matrix = systems.spectrum(rng, np.linspace(0.5, 2, 16))
    x0 = rng.normal(size=16)
    rhs = matrix @ x0
    x, info = solve(matrix, scale * rhs, x0=scale * x0, rtol=1e-4)
    assert int(info.num_steps) == 0
    np.testing.assert_allclose(x, scale * x0, rtol=1e-5)


def test_first_guess_with_zero_right_hand_side_gives_zero():
    x, info = solve(np.eye(4), np.zeros(4), x0=np.ones(4), rtol=1e-4)
    assert not x.any()
    assert int(info.status) == Status.CONVERGED


# --- Preconditioners.


def test_exact_inverse_as_preconditioner_takes_one_step(x64, rng):
    matrix = systems.spectrum(rng, np.geomspace(1e-4, 1, 30))
    rhs = rng.normal(size=30)
    x, info = solve(
        matrix, rhs, preconditioner=np.linalg.inv(matrix), rtol=1e-6, dtype="f8"
    )
    assert int(info.num_steps) == 1
    np.testing.assert_allclose(x, np.linalg.solve(matrix, rhs), rtol=1e-6)


def test_diagonal_preconditioner_saves_steps(rng):
    scales = np.geomspace(1e-2, 1, 40)
    matrix = scales[:, None] * systems.spectrum(rng, np.linspace(0.5, 2, 40)) * scales
    rhs = rng.normal(size=40)
    _, plain = solve(matrix, rhs, rtol=1e-3, max_steps=300)
    x, info = solve(
        matrix,
        rhs,
        preconditioner=np.diag(1 / np.diag(matrix)),
        rtol=1e-3,
        max_steps=300,
    )
    assert int(info.num_steps) < int(plain.num_steps) / 2
    assert residual_in_float32(matrix, x, rhs) <= 1.5e-3


def test_indefinite_preconditioner_is_a_breakdown(rng):
    x, info = solve(np.eye(4), np.ones(4), preconditioner=-np.eye(4), rtol=1e-5)
    assert int(info.status) == Status.BREAKDOWN
    assert not x.any()


def test_preconditioner_is_built_from_the_fisher_once_for_each_solve(rng):
    params = reference.network_params(rng, 3)
    x = jnp.asarray(rng.normal(size=(9, 2)), jnp.float32)
    calls = []

    def jacobi(fisher, damping):
        calls.append(1)
        _, unravel = jax.flatten_util.ravel_pytree(params)
        inverse = unravel(1 / (fisher.diagonal() + damping))
        return lambda v: jax.tree.map(jnp.multiply, inverse, v)

    @jax.jit
    def both(params):
        fisher = ngd.linearize_fisher(reference.network, params, x, ngd.Categorical())
        return [
            ngd.CG(max_steps=100, rtol=1e-5, preconditioner=preconditioner)(
                fisher, params, damping=1e-2
            )
            for preconditioner in (None, jacobi)
        ]

    (plain, plain_info), (preconditioned, info) = both(params)
    assert len(calls) == 1
    assert int(info.status) == int(plain_info.status) == Status.CONVERGED
    np.testing.assert_allclose(
        reference.flat(preconditioned), reference.flat(plain), rtol=1e-2, atol=1e-3
    )
