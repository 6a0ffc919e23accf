"""Conjugate gradients: convergence, an honest report, safe results past convergence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
from hypothesis import given
from hypothesis import strategies as st

import ngd_jax as ngd
from ngd_jax import dense, tree
from tests import reference
from tests.solvers import systems
from tests.solvers.systems import compiled, energy, residual_in_float32, solve

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus


# --- Solutions.


def test_steps_and_solution_are_those_of_scipy(x64, rng):
    matrix = systems.spectrum(rng, np.logspace(-2, 0, 30))
    rhs = rng.normal(size=30)
    # Half-way between the residuals of two steps, and before round-off has grown: the
    # last digits decide nothing.
    steps, rtol = [], 3.5e-3
    truth, _ = scipy.sparse.linalg.cg(
        matrix, rhs, rtol=rtol, callback=lambda x: steps.append(x.copy())
    )
    x, info = solve(matrix, rhs, rtol=rtol, dtype="f8")
    assert int(info.num_steps) == len(steps)
    np.testing.assert_allclose(x, truth, rtol=1e-6, atol=1e-8 * np.abs(truth).max())
    tight, _ = solve(matrix, rhs, rtol=1e-6, dtype="f8")
    assert np.linalg.norm(rhs - matrix @ tight) <= 1e-6 * np.linalg.norm(rhs)
    for budget in (1, 10):
        iterate, _ = solve(matrix, rhs, max_steps=budget, dtype="f8")
        np.testing.assert_allclose(iterate, steps[budget - 1], rtol=1e-6, atol=1e-9)


def test_number_of_distinct_eigenvalues_is_the_number_of_steps(x64, rng):
    matrix = systems.spectrum(rng, [1.0] * 8 + [5.0] * 8 + [9.0] * 8)
    rhs = rng.normal(size=24)
    x, info = solve(matrix, rhs, rtol=1e-10, dtype="f8")
    assert int(info.num_steps) == 3
    np.testing.assert_allclose(x, np.linalg.solve(matrix, rhs), rtol=1e-8)


@given(
    seed=st.integers(0, 2**32 - 1),
    condition=st.floats(0, 2),
    rhs_exponent=st.floats(-30, 30),
    matrix_exponent=st.floats(-6, 6),
)
def test_well_conditioned_systems_converge_at_every_scale(
    seed, condition, rhs_exponent, matrix_exponent
):
    rng = np.random.default_rng(seed)
    matrix = systems.spectrum(rng, np.logspace(-condition, 0, 16))
    matrix = np.float32(10.0**matrix_exponent * matrix)
    rhs = np.float32(10.0**rhs_exponent * rng.normal(size=16))
    x, info = solve(matrix, rhs, rtol=1e-4)
    assert int(info.status) == Status.CONVERGED
    assert float(info.relative_residual) <= 1e-4
    # Entries of x that float32 cannot hold but as subnormal numbers lose digits.
    if np.abs(x).max() > 1e-34:
        assert residual_in_float32(matrix, x, rhs) <= 1.5e-4


@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-90, 90))
def test_powers_of_two_in_the_right_hand_side_pass_through_exactly(seed, exponent):
    rng = np.random.default_rng(seed)
    matrix = systems.spectrum(rng, np.logspace(-3, 0, 16))
    rhs = np.float32(rng.uniform(1, 2, size=16))
    one, info = solve(matrix, rhs, max_steps=40, rtol=1e-5)
    other, other_info = solve(matrix, np.ldexp(rhs, exponent), max_steps=40, rtol=1e-5)
    np.testing.assert_array_equal(other, np.ldexp(one, exponent))
    assert int(info.num_steps) == int(other_info.num_steps)


@pytest.mark.parametrize("size", [30_000, 1_000_000])
def test_well_conditioned_systems_of_network_size_converge_in_float32(size, rng):
    # lineax 0.1 calls a breakdown here from some size on, and returns NaN.
    diagonal = jnp.asarray(rng.uniform(0.1, 1.0, size=size), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=size), jnp.float32)
    x, info = jax.jit(
        lambda rhs: ngd.conjugate_gradient(
            lambda v: diagonal * v, rhs, max_steps=60, rtol=1e-5
        )
    )(rhs)
    assert int(info.status) == Status.CONVERGED
    np.testing.assert_allclose(x, rhs / diagonal, atol=2e-3)


@pytest.mark.parametrize("matrix", [np.eye(5), 3.0 * np.eye(5), [[2.0]]])
def test_multiples_of_the_identity_take_one_step(matrix, rng):
    matrix = np.asarray(matrix)
    rhs = rng.normal(size=len(matrix))
    x, info = solve(matrix, rhs, rtol=1e-6)
    assert int(info.num_steps) == 1
    np.testing.assert_allclose(x, rhs / matrix[0, 0], rtol=1e-6)


def test_absolute_tolerance_is_in_units_of_the_right_hand_side(rng):
    matrix = systems.spectrum(rng, np.logspace(-2, 0, 16))
    rhs = rng.normal(size=16) * 1e5
    x, info = solve(matrix, rhs, atol=10.0)
    assert int(info.status) == Status.CONVERGED
    assert 1e-2 < residual_in_float32(matrix, x, rhs) * np.linalg.norm(rhs) <= 10.1
    _, info = solve(matrix, rhs, atol=1e7)
    assert int(info.num_steps) == 0


# --- The report.


@pytest.mark.parametrize("condition", [1e3, 1e4, 1e5, 1e6, 1e7])
@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
def test_reported_residual_is_the_true_one_where_converged(condition, rtol, rng):
    matrix = systems.spectrum(rng, np.geomspace(1 / condition, 1, 200))
    for rhs in (rng.normal(size=200), matrix @ rng.normal(size=200)):
        x, info = solve(matrix, rhs, max_steps=500, rtol=rtol)
        truth = residual_in_float32(matrix, x, rhs)
        if int(info.status) == Status.CONVERGED:
            assert float(info.relative_residual) <= rtol
            # Evaluating b - A x in float32 has this error.
            size = np.linalg.norm(x) / np.linalg.norm(rhs)
            assert truth <= 1.5 * rtol + 4e-7 * (1 + size)
        else:
            assert int(info.status) in (Status.MAX_STEPS, Status.STAGNATED)


def test_residual_is_replaced_where_the_recurrence_drifts(rng):
    # Without replacement the recurrence says 1e-6 while the truth stays at 1e-4.
    matrix = systems.spectrum(rng, np.geomspace(1e-5, 1, 100))
    rhs = matrix @ rng.normal(size=100)
    matrix, rhs = jnp.asarray(matrix, jnp.float32), jnp.asarray(rhs, jnp.float32)
    products = []

    def matvec(v):
        jax.debug.callback(lambda: products.append(1))
        return matrix @ v

    x, info = jax.jit(
        lambda rhs: ngd.conjugate_gradient(matvec, rhs, max_steps=400, rtol=1e-6)
    )(rhs)
    jax.block_until_ready(x)
    jax.effects_barrier()
    assert len(products) > int(info.num_steps)


def test_unattainable_accuracy_is_stagnation(rng):
    # ‖A‖‖x‖ is 1e5 times ‖b‖: float32 cannot show a residual below 1e-2.
    matrix = systems.spectrum(rng, np.geomspace(1e-5, 1, 30))
    _, vectors = np.linalg.eigh(matrix)
    rhs = vectors[:, 0] + 1e-3 * vectors[:, -1]
    x, info = solve(matrix, rhs, max_steps=500, rtol=1e-6)
    assert int(info.status) in (Status.STAGNATED, Status.MAX_STEPS)
    assert residual_in_float32(matrix, x, rhs) > 1e-6


def test_budget_used_up_is_reported_with_the_true_residual(rng):
    matrix = systems.spectrum(rng, np.logspace(-4, 0, 30))
    rhs = rng.normal(size=30)
    x, info = solve(matrix, rhs, max_steps=5, rtol=1e-6)
    assert int(info.status) == Status.MAX_STEPS
    assert int(info.num_steps) == 5
    truth = residual_in_float32(matrix, x, rhs)
    np.testing.assert_allclose(info.relative_residual, truth, rtol=1e-3)


def test_relative_tolerance_of_zero_spends_the_budget_and_is_no_failure(rng):
    matrix = systems.spectrum(rng, np.logspace(-3, 0, 30))
    _, info = solve(matrix, rng.normal(size=30), max_steps=10)
    assert int(info.num_steps) == 10
    assert int(info.status) == Status.MAX_STEPS


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e5])
def test_iterating_far_beyond_convergence_does_no_harm(condition, rng):
    matrix = systems.spectrum(rng, np.geomspace(1 / condition, 1, 20))
    rhs = matrix @ rng.normal(size=20)
    short, _ = solve(matrix, rhs, max_steps=60)
    long, info = solve(matrix, rhs, max_steps=5000)
    assert int(info.status) in (Status.CONVERGED, Status.MAX_STEPS, Status.STAGNATED)
    noise = 1e-5 * abs(energy(matrix, short, rhs))
    assert energy(matrix, long, rhs) <= energy(matrix, short, rhs) + noise


@pytest.mark.parametrize(
    ("max_steps", "rtol"), [(10, 0.0), (50, 0.0), (51, 1e-4), (200, 0.0)]
)
def test_rounded_products_stall_at_their_rounding(max_steps, rtol, rng):
    # As those of a bfloat16 model: neither linear nor symmetric beyond three digits.
    matrix = systems.spectrum(rng, np.linspace(0.4, 2.3, 12))
    wide, rhs = jnp.asarray(matrix, jnp.float32), jnp.asarray(rng.normal(size=12), "f4")

    def matvec(v):
        image = wide @ v.astype(jnp.bfloat16).astype(jnp.float32)
        return image.astype(jnp.bfloat16).astype(jnp.float32)

    x, info = jax.jit(
        lambda rhs: ngd.conjugate_gradient(matvec, rhs, max_steps=max_steps, rtol=rtol)
    )(rhs)
    truth = np.linalg.solve(matrix, np.asarray(rhs, float))
    np.testing.assert_allclose(x, truth, atol=0.03 * np.abs(truth).max())
    assert float(info.relative_residual) < 0.03


@pytest.mark.long
def test_quadratic_falls_with_every_step(x64, rng):
    matrix = systems.spectrum(rng, np.logspace(-3, 0, 20))
    rhs = rng.normal(size=20)
    run = jax.jit(
        lambda matrix, rhs: [
            ngd.conjugate_gradient(lambda v: matrix @ v, rhs, max_steps=steps)[0]
            for steps in (1, 3, 8, 16)
        ]
    )
    values = [0.0] + [
        energy(matrix, np.asarray(x), rhs) for x in run(matrix, jnp.asarray(rhs))
    ]
    assert np.all(np.diff(values) < 0)


# --- Breakdown and bad numbers.


@pytest.mark.parametrize(
    "matrix",
    [
        np.zeros((3, 3)),
        np.diag([1.0, -1.0, 2.0]),
        -np.eye(3),
        np.diag([1.0, 1.0, 0.0]),
    ],
    ids=["zero", "indefinite", "negative", "singular and inconsistent"],
)
@pytest.mark.parametrize("rtol", [0.0, 1e-6])
def test_matrices_that_are_not_positive_definite_are_a_breakdown(matrix, rtol):
    # Of length 3 on the bad coordinates, so that no residual is within the tolerance.
    x, info = solve(matrix, np.array([1.0, 2.0, 3.0]), max_steps=50, rtol=rtol)
    assert int(info.status) == Status.BREAKDOWN
    assert float(info.relative_residual) > 0.1
    assert np.abs(x).max() < 1e3


def test_singular_consistent_systems_are_solved(rng):
    root = rng.normal(size=(20, 5))
    matrix = root @ root.T / 20
    rhs = matrix @ rng.normal(size=20)
    x, info = solve(matrix, rhs, rtol=1e-4)
    assert int(info.status) == Status.CONVERGED
    np.testing.assert_allclose(x, np.linalg.pinv(matrix) @ rhs, atol=1e-2)


@pytest.mark.parametrize("max_steps", [50, 300])
@pytest.mark.parametrize("seed", range(5))
def test_singular_systems_are_not_left_again_once_they_are_solved(max_steps, seed, x64):
    """Past convergence, what is left of the residual points out of the range of A."""
    rng = np.random.default_rng(seed)
    # The Fisher of a table of logits: a block for each state, each of them singular.
    probabilities = rng.dirichlet(np.ones(4), size=10)
    blocks = [np.diag(p) - np.outer(p, p) for p in probabilities]
    matrix = scipy.linalg.block_diag(*blocks)
    rhs = matrix @ rng.normal(size=40)
    truth = np.linalg.pinv(matrix, rcond=1e-13) @ rhs
    x, info = solve(matrix, rhs, max_steps=max_steps, dtype="f8")
    assert info.status in (Status.CONVERGED, Status.STAGNATED)
    assert info.relative_residual < 64 * np.finfo(float).eps
    eigenvalues = np.linalg.eigvalsh(matrix)
    condition = eigenvalues[-1] / eigenvalues[eigenvalues > 1e-12].min()
    error = np.linalg.norm(x - truth) / np.linalg.norm(truth)
    assert error < 64 * np.finfo(float).eps * condition


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["rhs", "x0", "matrix", "preconditioner"])
def test_non_finite_numbers_are_reported_with_a_finite_solution(bad, place, rng):
    inputs = {
        "matrix": systems.spectrum(rng, np.linspace(1, 2, 4)),
        "rhs": np.ones(4),
        "x0": np.ones(4),
        "preconditioner": np.eye(4),
    }
    inputs[place][..., 0] = bad
    x, info = solve(**inputs, max_steps=20, rtol=1e-5)
    expected = (
        (Status.NON_FINITE,)
        if place in ("rhs", "x0")
        else (Status.NON_FINITE, Status.BREAKDOWN)
    )
    assert int(info.status) in expected
    if place in ("rhs", "x0"):
        assert not x.any()


def test_product_that_overflows_late_keeps_the_last_finite_iterate(rng):
    # Finite along the first direction, NaN once x has moved there.
    matrix = jnp.asarray(np.diag([1.0, 2.0, 3.0]), jnp.float32)
    rhs = jnp.ones(3)

    def matvec(v):
        is_first = jnp.allclose(v, v[:1] * jnp.ones(3))
        return jnp.where(is_first, matrix @ v, jnp.nan)

    x, info = ngd.conjugate_gradient(matvec, rhs, max_steps=20)
    assert int(info.status) == Status.NON_FINITE
    assert int(info.num_steps) == 1
    np.testing.assert_allclose(x, 0.5 * np.ones(3), rtol=1e-6)


def test_solutions_that_overflow_are_not_returned():
    x, info = solve(1e-20 * np.eye(3), 1e30 * np.ones(3), rtol=1e-5)
    assert int(info.status) == Status.NON_FINITE
    assert not x.any()


# --- Transformations.


@pytest.mark.long
def test_forward_mode_equals_the_implicit_derivative(x64, rng):
    matrix = jnp.asarray(systems.spectrum(rng, np.linspace(0.5, 2, 10)))
    rhs, tangent = jnp.asarray(rng.normal(size=(2, 10)))

    def solution(rhs, scale):
        return ngd.conjugate_gradient(
            lambda v: scale * (matrix @ v), rhs, max_steps=30, rtol=1e-13
        )[0]

    _, derivative = jax.jvp(
        solution, (rhs, jnp.float64(2.0)), (tangent, jnp.float64(1.0))
    )
    truth = np.linalg.solve(2 * matrix, tangent - matrix @ solution(rhs, 2.0))
    np.testing.assert_allclose(derivative, truth, rtol=1e-6, atol=1e-8)


def test_reverse_mode_raises_an_error_that_says_what_to_do():
    def loss(rhs):
        x, _ = ngd.conjugate_gradient(lambda v: 2 * v, rhs, max_steps=3, rtol=1e-6)
        return x.sum()

    with pytest.raises(TypeError, match=r"conjugate_gradient.*stop_gradient"):
        jax.grad(loss)(jnp.ones(3))
    frozen = jax.grad(lambda rhs: (jax.lax.stop_gradient(loss(rhs)) * rhs).sum())
    np.testing.assert_allclose(frozen(jnp.ones(3)), 1.5 * np.ones(3), rtol=1e-6)


@pytest.mark.long
def test_converged_members_of_a_vmapped_batch_are_frozen(rng):
    matrices = jnp.asarray(
        [np.eye(16), systems.spectrum(rng, np.geomspace(1e-2, 1, 16))], jnp.float32
    )
    rhs = jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)
    run = compiled(200, rtol=1e-3)
    xs, infos = jax.vmap(run)(matrices, rhs)
    assert int(infos.num_steps[0]) == 1 < int(infos.num_steps[1])
    np.testing.assert_allclose(xs[0], rhs[0], rtol=1e-6)
    for i in range(2):
        x, info = run(matrices[i], rhs[i])
        np.testing.assert_allclose(xs[i], x, atol=1e-2 * float(jnp.abs(x).max()))
        assert abs(int(infos.num_steps[i]) - int(info.num_steps)) <= 2


@pytest.mark.long
def test_eager_and_scanned_solves_equal_jit(rng):
    matrix = jnp.asarray(systems.spectrum(rng, np.linspace(0.5, 2, 8)), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    run = compiled(20, rtol=1e-5)
    eager, _ = ngd.conjugate_gradient(
        lambda v: matrix @ v, rhs[0], max_steps=20, rtol=1e-5
    )
    np.testing.assert_allclose(eager, run(matrix, rhs[0])[0], rtol=1e-5, atol=1e-6)
    _, scanned = jax.lax.scan(lambda c, b: (c, run(matrix, b)[0]), 0, rhs)
    np.testing.assert_allclose(scanned[2], run(matrix, rhs[2])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_products_of_low_precision_cannot_make_a_long_solve_worse(rng):
    """A rounded to bfloat16 is not symmetric: the recurrence diverges in the end."""
    network = reference.network_params(rng, 4, num_hidden=16, dtype=jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(64, 2)), jnp.bfloat16)
    fisher = ngd.linearize_fisher(reference.network, network, x, ngd.Categorical())
    rhs = jax.tree.map(lambda p: p.astype(jnp.float32), network)
    damping = 0.1 * jnp.sum(dense.diagonal(fisher)) / tree.size(network)

    @functools.partial(jax.jit, static_argnums=0)
    def residual_of(max_steps):
        solution, info = ngd.CG(max_steps, rtol=0.0)(fisher, rhs, damping=damping)
        image = tree.axpy(damping, solution, fisher.matvec(solution))
        rest = tree.axpy(-1.0, image, rhs)
        size = jnp.sqrt(tree.vdot(rest, rest) / tree.vdot(rhs, rhs))
        return size, info.relative_residual

    # Compare 1 for no solution at all, and 18 without checking what became of φ.
    for max_steps in (40, 100, 500):
        true, reported = residual_of(max_steps)
        assert true < 0.5
        assert reported < 0.5
