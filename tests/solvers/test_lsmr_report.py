"""What LSMR reports, even when it fails; the transformations of JAX; mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from tests.conftest import unchecked
from tests.marks import long_unless
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


# --- The report.


@pytest.mark.parametrize("reorthogonalize", long_unless([True], [False, True]))
@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e7])
def test_the_reported_residual_is_the_true_one(
    condition, damping, reorthogonalize, rng
):
    matrix = np.float32(matrix_of(rng, 30, 20, np.geomspace(1, 1 / condition, 20)))
    damping = np.float32(damping)
    for noise in (0.0, 1.0):
        rhs = matrix @ rng.normal(size=20) + noise * rng.normal(size=30)
        rhs = np.float32(rhs)
        # What evaluating the residual at x rounds, relative to ‖Aᵀ b‖.
        for options in ({"max_steps": 8}, {"rtol": 1e-4}):
            x, info = solve(
                matrix, rhs, damping, reorthogonalize=reorthogonalize, **options
            )
            size = np.linalg.norm(matrix.T.astype(float) @ rhs)
            floor = 10 * EPS * (np.linalg.norm(rhs) + np.linalg.norm(x)) / size
            residual = true_residual(matrix, rhs, damping, x)
            assert abs(float(info.relative_residual) - residual) <= floor
            if int(info.status) == Status.CONVERGED:
                assert residual <= 1e-4 + floor
            else:
                assert int(info.status) in (Status.MAX_STEPS, Status.STAGNATED)


@pytest.mark.long
def test_the_residual_never_grows_with_the_budget(rng):
    matrix = matrix_of(rng, 30, 30, np.geomspace(1, 1e-2, 30))
    rhs = rng.normal(size=30)
    residuals = [
        float(solve(matrix, rhs, max_steps=budget)[1].relative_residual)
        for budget in (1, 8, 40)
    ]
    assert residuals == sorted(residuals, reverse=True)


def test_more_budget_than_needed_changes_nothing(rng):
    matrix, rhs = matrix_of(rng, 24, 16, np.geomspace(1, 0.1, 16)), rng.normal(size=24)
    x, info = solve(matrix, rhs)
    more, more_info = solve(matrix, rhs, max_steps=80)
    np.testing.assert_array_equal(x, more)
    assert int(info.num_steps) == int(more_info.num_steps) <= 17


def test_zero_right_hand_side_is_exactly_zero(rng):
    x, info = solve(rng.normal(size=(6, 4)), np.zeros(6))
    assert not x.any()
    assert [float(field) for field in info] == [0, 0, Status.CONVERGED]


def test_right_hand_side_across_the_range_is_zero_or_nearly(rng):
    x, info = solve(np.eye(6, 4), np.eye(6)[5])
    assert not x.any()
    assert int(info.status) == Status.CONVERGED


def test_zero_matrix_has_the_solution_zero():
    x, info = solve(np.zeros((6, 4)), np.ones(6), 1.0)
    assert not x.any()
    assert int(info.status) == Status.CONVERGED


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_reported_and_not_returned(bad, rng):
    matrix, rhs = rng.normal(size=(6, 4)), rng.normal(size=6)
    spoilt = rhs.copy()
    spoilt[2] = bad
    x, info = solve(matrix, spoilt)
    assert not x.any()
    assert int(info.status) == Status.NON_FINITE
    assert float(info.relative_residual) == 1
    for where in [(0, 0), (5, 3)]:
        spoilt = matrix.copy()
        spoilt[where] = bad
        _, info = solve(spoilt, rhs)
        assert int(info.status) == Status.NON_FINITE
    _, info = solve(matrix, rhs, bad)
    assert int(info.status) == Status.NON_FINITE


def test_a_product_that_fails_midway_leaves_the_last_iterate(rng):
    matrix = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=6), jnp.float32)
    start = matrix.T @ rhs / jnp.linalg.norm(matrix.T @ rhs)

    def matvec(v):
        # The second v is orthogonal to the first; the iterate after one step is not.
        return jnp.where(jnp.abs(v @ start) < 1e-3, jnp.nan, matrix @ v)

    run = jax.jit(lambda: ngd.lsmr(matvec, lambda u: matrix.T @ u, rhs, max_steps=5))
    x, info = run()
    expected, _ = solve(matrix, rhs, max_steps=1)
    np.testing.assert_allclose(x, expected, rtol=1e-5)
    assert int(info.status) == Status.NON_FINITE
    np.testing.assert_allclose(
        info.relative_residual, true_residual(matrix, rhs, 0.0, x), rtol=1e-4
    )


def test_a_solution_too_large_for_its_dtype_is_reported():
    x, info = solve(1e-18 * np.eye(4), np.full(4, 1e30))
    assert not x.any()
    assert int(info.status) == Status.NON_FINITE


# --- Under the transformations of JAX.


@pytest.mark.long
def test_jit_vmap_and_scan_agree_with_one_by_one(rng):
    matrix = matrix_of(rng, 30, 30, np.geomspace(1, 0.1, 30))
    matrix = jnp.asarray(matrix, jnp.float32)
    rhs = jnp.asarray(rng.normal(size=(3, 30)), jnp.float32)
    dampings = jnp.asarray([0.0, 1e-3, 1.0], jnp.float32)

    def one(rhs, damping):
        return ngd.lsmr(
            lambda v: matrix @ v,
            lambda u: matrix.T @ u,
            rhs,
            damping=damping,
            max_steps=40,
        )

    batched, infos = jax.jit(jax.vmap(one))(rhs, dampings)
    _, (scanned, _) = jax.lax.scan(
        lambda carry, each: (carry, one(*each)), None, (rhs, dampings)
    )
    for i in range(3):
        x, _ = solve(matrix, rhs[i], dampings[i])
        np.testing.assert_allclose(batched[i], x, atol=1e-4)
        np.testing.assert_allclose(scanned[i], x, atol=1e-4)
        assert int(infos.status[i]) in (Status.CONVERGED, Status.STAGNATED)
        assert relative_error(x, truth(matrix, rhs[i], dampings[i])) <= 1e-3


@pytest.mark.long
def test_forward_mode_is_the_derivative_and_reverse_mode_says_why_not(x64, rng):
    matrix, rhs = jnp.asarray(rng.normal(size=(8, 4))), jnp.asarray(rng.normal(size=8))

    def solution(damping):
        return ngd.lsmr(
            lambda v: matrix @ v,
            lambda u: matrix.T @ u,
            rhs,
            damping=damping,
            max_steps=4,
        )[0]

    tangent = jax.jit(lambda at: jax.jvp(solution, (at,), (1.0,))[1])(0.3)
    inverse = np.linalg.inv(np.asarray(matrix.T @ matrix) + 0.3 * np.eye(4))
    expected = -inverse @ inverse @ np.asarray(matrix.T @ rhs)
    np.testing.assert_allclose(tangent, expected, rtol=1e-8)
    with pytest.raises(TypeError, match="Reverse-mode differentiation through lsmr"):
        jax.grad(lambda damping: solution(damping).sum())(0.3)


# --- Mistakes.


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_steps": 0}, ValueError, "`max_steps` must be at least 1, got 0"),
        ({"max_steps": 2.0}, TypeError, "Python int"),
        ({"max_steps": 2, "rtol": -1.0}, ValueError, "`rtol` must not be negative"),
        ({"max_steps": 2, "damping": -1.0}, ValueError, "`damping` must not be neg"),
        ({"max_steps": 2, "damping": np.ones(2)}, ValueError, "must be a scalar"),
    ],
)
def test_mistakes_are_named(options, error, match, monkeypatch):
    a = jnp.eye(3)
    monkeypatch.setattr(ngd.LSMR, "__init__", unchecked(ngd.LSMR.__init__))
    with pytest.raises(error, match=match):
        unchecked(ngd.lsmr)(lambda v: a @ v, lambda u: a @ u, jnp.ones(3), **options)


def test_products_that_do_not_fit_are_named():
    with pytest.raises(
        ValueError, match=r"`matvec\(v\)` must have the shapes of `rhs`"
    ):
        ngd.lsmr(lambda v: v[:2], lambda u: u, jnp.ones(3), max_steps=2)
    with pytest.raises(TypeError, match="`rhs` must hold floating point"):
        ngd.lsmr(lambda v: v, lambda u: u, jnp.arange(3), max_steps=2)
