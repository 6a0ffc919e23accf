"""What every solver promises: the solution, the report, and nothing that is not finite.

Operator kind × solver × dtype, against NumPy in float64.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax.contrib.lineax import Lineax
from tests import reference
from tests.marks import long_unless
from tests.solvers import systems

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus

SOLVERS = {
    "CG": ngd.CG(max_steps=200, rtol=1e-6),
    "LSMR": ngd.LSMR(max_steps=60, rtol=1e-6),
    "Cholesky": ngd.Cholesky(),
    "SampleSpace": ngd.SampleSpace(),
    "Lineax Cholesky": Lineax(lineax.Cholesky()),
    "Lineax LU": Lineax(lineax.LU()),
    "Lineax CG": Lineax(lineax.CG(1e-6, 1e-6)),
    "Lineax GMRES": Lineax(lineax.GMRES(1e-6, 1e-6, restart=30)),
}
OURS = {name: SOLVERS[name] for name in ("CG", "LSMR", "Cholesky", "SampleSpace")}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
every_own_solver = pytest.mark.parametrize("solver", OURS.values(), ids=OURS)
# Lineax's own solvers in float64 only where time does not matter.
PRECISIONS = [
    pytest.param(
        solver,
        dtype,
        id=f"{name}-{dtype}",
        marks=[]
        if dtype == "float32"
        else [pytest.mark.long if name in OURS else pytest.mark.slow],
    )
    for dtype in ("float32", "float64")
    for name, solver in SOLVERS.items()
]
KINDS = list(systems.matrices(np.random.default_rng(0)))


@functools.cache
def compiled(solver):
    """Root, right-hand side, damping -> solution and report; compiled by shape."""

    @jax.jit
    def solve(root, rhs, damping):
        return solver(systems.fisher_of(root, rhs), rhs, damping=damping)

    return solve


def solve(solver, matrix, rhs, damping=0.0, dtype="float32"):
    """On the Fisher of a linear Gaussian model, which is this matrix."""
    root = jnp.asarray(systems.root_of(matrix), dtype)
    return compiled(solver)(root, rhs, jnp.asarray(damping, dtype))


@pytest.mark.parametrize("kind", long_unless({*KINDS} - {"one-dimensional"}, KINDS))
@pytest.mark.parametrize(("solver", "dtype"), PRECISIONS, indirect=["dtype"])
def test_solution_equals_numpy(solver, kind, dtype, rng):
    matrix = systems.matrices(rng)[kind]
    g = rng.normal(size=len(matrix))
    rhs = systems.tree_like(g, dtype)
    solution, info = solve(solver, matrix, rhs, 0.3, dtype)
    truth = np.linalg.solve(matrix + 0.3 * np.eye(len(g)), systems.flat(rhs))
    np.testing.assert_allclose(
        systems.flat(solution), truth, rtol=0, atol=2e-5 * np.abs(truth).max()
    )
    assert int(info.status) == Status.CONVERGED
    assert jax.tree.map(lambda x: x.dtype, solution) == jax.tree.map(
        lambda x: x.dtype, rhs
    )
    assert info.status.dtype == info.num_steps.dtype == jnp.int32
    assert info.relative_residual.dtype == dtype
    np.testing.assert_allclose(
        info.relative_residual,
        systems.true_residual(matrix, 0.3, solution, rhs),
        atol=2e-6,
    )


@every_solver
def test_zero_right_hand_side_gives_zero(solver, rng):
    matrix = systems.matrices(rng)["dense"]
    rhs = systems.tree_like(np.zeros(12), "float32")
    solution, info = solve(solver, matrix, rhs, 0.1)
    assert not systems.flat(solution).any()
    assert float(info.relative_residual) == 0.0
    assert int(info.status) == Status.CONVERGED


@every_own_solver
@pytest.mark.parametrize("exponent", [-100, -66, -33, 0, 33, 66, 100])
def test_powers_of_two_in_the_right_hand_side_pass_through_exactly(
    solver, exponent, rng
):
    matrix = systems.matrices(rng)["dense"]
    g = rng.uniform(1.0, 2.0, size=12)
    one, info = solve(solver, matrix, systems.tree_like(g, "float32"), 0.1)
    scaled = jax.tree.map(
        lambda x: jnp.ldexp(x, exponent), systems.tree_like(g, "float32")
    )
    other, other_info = solve(solver, matrix, scaled, 0.1)
    expected = np.ldexp(np.float32(systems.flat(one)), exponent)
    np.testing.assert_array_equal(np.float32(systems.flat(other)), expected)
    assert int(other_info.num_steps) == int(info.num_steps)
    assert int(other_info.status) == int(info.status)


@every_own_solver
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_units_of_the_matrix_do_not_matter(solver, scale, rng):
    matrix = systems.matrices(rng)["dense"] * scale
    rhs = systems.tree_like(rng.normal(size=12), "float32")
    solution, info = solve(solver, matrix, rhs, 0.1 * scale)
    truth = np.linalg.solve(matrix + 0.1 * scale * np.eye(12), systems.flat(rhs))
    np.testing.assert_allclose(
        systems.flat(solution), truth, rtol=0, atol=2e-5 * np.abs(truth).max()
    )
    assert int(info.status) == Status.CONVERGED


@every_own_solver
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_right_hand_sides_are_solved(solver, scale, rng):
    matrix = systems.matrices(rng)["dense"]
    rhs = systems.tree_like(scale * rng.normal(size=12), "float32")
    solution, info = solve(solver, matrix, rhs, 0.1)
    assert systems.true_residual(matrix, 0.1, solution, rhs) < 1e-5
    assert int(info.status) == Status.CONVERGED


@every_solver
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_input_is_reported_and_never_returned(solver, bad, rng):
    matrix = systems.matrices(rng)["dense"]
    g = rng.normal(size=12)
    broken = g.copy()
    broken[3] = bad
    solution, info = solve(solver, matrix, systems.tree_like(broken, "float32"), 0.1)
    assert int(info.status) == Status.NON_FINITE
    assert not systems.flat(solution).any()
    assert float(info.relative_residual) == 1.0

    root = jnp.asarray(systems.root_of(matrix), "float32").at[2, 5].set(bad)
    rhs = systems.tree_like(g, "float32")
    solution, info = compiled(solver)(root, rhs, jnp.float32(0.1))
    assert int(info.status) != Status.CONVERGED
    assert np.isfinite(systems.flat(solution)).all()
    assert np.isfinite(info.relative_residual)


@pytest.mark.long
@every_own_solver
def test_mixed_dtypes_are_kept_and_solved_wide(solver, rng):
    matrix = systems.matrices(rng)["dense"]
    rhs = systems.tree_like(rng.normal(size=12), "float32")
    rhs["a"] = rhs["a"].astype(jnp.bfloat16)

    def model_fn(params, x):
        flat = jnp.concatenate([params["a"].astype(x.dtype), params["b"][0]])
        return x @ flat

    # F = XᵀX / N = matrix
    x = jnp.asarray(np.sqrt(12) * np.linalg.cholesky(matrix).T, jnp.float32)

    @jax.jit
    def solution_of(rhs):
        fisher = ngd.linearize_fisher(model_fn, rhs, x, ngd.Gaussian(event_ndims=0))
        return solver(fisher, rhs, damping=0.3)

    solution, _info = solution_of(rhs)
    assert solution["a"].dtype == jnp.bfloat16
    truth = np.linalg.solve(matrix + 0.3 * np.eye(12), systems.flat(rhs))
    np.testing.assert_allclose(
        systems.flat(solution), truth, rtol=0, atol=0.02 * np.abs(truth).max()
    )


@pytest.mark.long
@every_own_solver
def test_vmap_over_systems_equals_a_loop(solver, rng):
    if isinstance(solver, ngd.CG):  # round-off decides the status at ten ε
        solver = dataclasses.replace(solver, rtol=1e-5)
    # One is solved at once, one takes long: none disturbs another.
    matrices = [
        np.eye(12),
        systems.spectrum(rng, np.logspace(-3, 0, 12)),
        np.zeros((12, 12)),
        systems.matrices(rng)["dense"],
    ]
    roots = jnp.asarray([systems.root_of(matrix) for matrix in matrices], "float32")
    rhs = jax.vmap(lambda g: systems.tree_like(g, "float32"))(
        jnp.asarray(rng.normal(size=(4, 12)))
    )
    many, infos = jax.vmap(compiled(solver), in_axes=(0, 0, None))(
        roots, rhs, jnp.float32(0.01)
    )
    for i in range(4):
        one, info = solve(
            solver, matrices[i], jax.tree.map(lambda x, i=i: x[i], rhs), 0.01
        )
        expected = systems.flat(one)
        np.testing.assert_allclose(
            systems.flat(jax.tree.map(lambda x, i=i: x[i], many)),
            expected,
            atol=1e-4 * np.abs(expected).max(),
        )
        assert int(infos.status[i]) == int(info.status)


@pytest.mark.long
def test_solvers_agree_on_a_real_fisher(x64, rng):
    params = reference.network_params(rng, 3, dtype="float64")
    x = jnp.asarray(rng.normal(size=(9, 2)))
    rhs = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)

    @functools.partial(jax.jit, static_argnums=0)
    def solution_of(solver, params, rhs):
        fisher = ngd.linearize_fisher(reference.network, params, x, ngd.Categorical())
        return solver(fisher, rhs, damping=1e-2)

    outputs, jacobian = reference.jacobian(reference.network, params, x)
    fisher = reference.fisher_of(
        reference.categorical_metric(outputs), jacobian, np.full(9, 1 / 9)
    )
    truth = np.linalg.solve(fisher + 1e-2 * np.eye(len(fisher)), reference.flat(rhs))
    for solver in (
        ngd.CG(max_steps=100, rtol=1e-12),
        ngd.LSMR(max_steps=60, rtol=1e-12),
        ngd.Cholesky(),
        ngd.SampleSpace(),
        Lineax(lineax.Cholesky()),
    ):
        solution, info = solution_of(solver, params, rhs)
        np.testing.assert_allclose(reference.flat(solution), truth, rtol=1e-8)
        assert int(info.status) == Status.CONVERGED


@every_own_solver
@pytest.mark.parametrize("scale", long_unless([1e-3], [1e-3, 1.0]))
def test_complex_parameters_are_solved_over_the_reals(solver, scale, x64, rng):
    x = rng.normal(size=(20, 3)) + 1j * rng.normal(size=(20, 3))
    params = jnp.asarray(rng.normal(size=3) + 1j * rng.normal(size=3))
    rhs = jnp.asarray(rng.normal(size=3) + 1j * rng.normal(size=3))

    def not_holomorphic(params, x):
        return jnp.real(x @ params) * jnp.abs(params[:1])

    @jax.jit
    def run(params):
        fisher = ngd.linearize_fisher(
            not_holomorphic, params, jnp.asarray(x), ngd.Gaussian(event_ndims=0)
        )
        columns = [fisher.matvec(unit) for unit in jnp.eye(3, dtype=complex)]
        columns += [fisher.matvec(1j * unit) for unit in jnp.eye(3, dtype=complex)]
        return solver(fisher, rhs, damping=scale), jnp.stack(columns)

    (solution, info), columns = run(params)
    parts = [np.concatenate([v.real, v.imag]) for v in np.asarray([*columns, rhs])]
    matrix = np.stack(parts[:-1]) + scale * np.eye(6)
    truth = np.linalg.solve(matrix, parts[-1])
    np.testing.assert_allclose(
        np.asarray(solution),
        truth[:3] + 1j * truth[3:],
        atol=1e-4 * np.abs(truth).max(),
    )
    assert int(info.status) == Status.CONVERGED


@pytest.mark.parametrize("solver", long_unless({"CG"}, OURS))
def test_leaves_without_entries_are_no_obstacle(solver, rng):
    params = {"none": jnp.ones((0, 3)), "w": jnp.ones(4)}
    x = jnp.asarray(rng.normal(size=(9, 4)), jnp.float32)

    def model_fn(params, x):
        return x @ params["w"] + jnp.sum(params["none"])

    @jax.jit
    def run(params):
        likelihood = ngd.Gaussian(event_ndims=0)
        fisher = ngd.linearize_fisher(model_fn, params, x, likelihood)
        return solver(fisher, params, damping=0.1)

    solution, info = run(params)
    matrix = np.asarray(x).T @ np.asarray(x) / 9 + 0.1 * np.eye(4)
    truth = np.linalg.solve(matrix, np.ones(4))
    np.testing.assert_allclose(solution["w"], truth, rtol=1e-4)
    assert solution["none"].shape == (0, 3)
    assert int(info.status) == Status.CONVERGED


# --- Cholesky.


@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-8, 1e-4, 1e-2, 1.0])
def test_cholesky_reports_the_residual_of_the_system_asked_for(damping, rng):
    # Rank 4 of 12: without damping there is no solution, and the report must say so.
    matrix = systems.matrices(rng)["low rank"]
    rhs = systems.tree_like(rng.normal(size=12), "float32")
    solution, info = solve(ngd.Cholesky(), matrix, rhs, damping)
    assert np.isfinite(systems.flat(solution)).all()
    truth = systems.true_residual(np.float32(matrix), damping, solution, rhs)
    relative = float(info.relative_residual)
    # Both contain the round-off of the product with such a long solution.
    norm = np.linalg.norm(systems.flat(solution)) / np.linalg.norm(systems.flat(rhs))
    assert abs(relative - truth) <= 1e-5 * (1 + norm)
    converged = int(info.status) == Status.CONVERGED
    assert converged == (relative <= np.sqrt(np.finfo(np.float32).eps))
    if damping >= 1e-2:
        assert converged


def test_cholesky_of_a_consistent_singular_system_is_a_solution(rng):
    matrix = systems.matrices(rng)["low rank"]
    rhs = systems.tree_like(matrix @ rng.normal(size=12), "float32")
    solution, info = solve(ngd.Cholesky(), matrix, rhs, 0.0)
    assert np.isfinite(systems.flat(solution)).all()
    assert float(info.relative_residual) < 1e-2


def test_cholesky_of_the_zero_matrix_without_damping_is_finite():
    rhs = systems.tree_like(np.ones(4), "float32")
    solution, info = solve(ngd.Cholesky(), np.zeros((4, 4)), rhs, 0.0)
    assert np.isfinite(systems.flat(solution)).all()
    assert int(info.status) != Status.CONVERGED


# --- CG.


@pytest.mark.long
def test_well_conditioned_systems_of_network_size_converge(rng):
    size = 1_000_000
    diagonal = jnp.asarray(rng.uniform(0.5, 1.5, size=size), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=size), jnp.float32)
    solution, info = jax.jit(
        lambda rhs: ngd.CG(max_steps=30, rtol=1e-5)(
            systems.diagonal_fisher(diagonal), rhs, damping=0.0
        )
    )(rhs)
    np.testing.assert_allclose(solution, rhs / diagonal, atol=1e-3)
    assert int(info.status) == Status.CONVERGED
    assert float(info.relative_residual) <= 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_in_a_large_leaf_is_found(bad):
    """CPU programs of jaxlib 0.10.2 drop NaN in maxima of many numbers."""
    size = 100_000
    rhs = jnp.ones(size).at[size // 2].set(bad)
    solution, info = jax.jit(
        lambda rhs: ngd.CG(max_steps=3)(
            systems.diagonal_fisher(jnp.ones(size)), rhs, damping=0.1
        )
    )(rhs)
    assert not np.any(solution)
    assert int(info.status) == Status.NON_FINITE


# --- Input errors.


class Recorder(ngd.Solver):
    """Answers with ones, and keeps what it was asked."""

    def solve(self, fisher, rhs, *, damping, state=()):
        del fisher, state
        ones = jax.tree.map(jnp.ones_like, rhs.gradient)
        info = ngd.SolverInfo(jnp.int32(1), jnp.float32(0), jnp.int32(Status.CONVERGED))
        return ngd.Solution(ones, ones, info, (rhs[:3], damping))


@pytest.mark.parametrize("where", ["gradient", "coefficients", "guess"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_solver_is_never_asked_what_is_not_finite(where, bad):
    given = dict.fromkeys(("gradient", "coefficients", "guess"), jnp.ones(3))
    given[where] = jnp.array([1.0, bad, 2.0])
    rhs = ngd.RightHandSide(**given)
    found = jax.jit(lambda rhs: ngd.solve_scaled(Recorder(), None, rhs, damping=0.1))(
        rhs
    )
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found.state))
    assert not np.any(found.direction)
    assert not np.any(found.pushed)
    assert int(found.info.status) == Status.NON_FINITE


def test_a_direction_that_overflows_the_narrower_of_two_dtypes_is_refused(x64):
    """One in units of the wide leaf, which the narrow one cannot represent."""
    rhs = ngd.RightHandSide(
        {"wide": jnp.array([1e60]), "narrow": jnp.array([1.0], jnp.float32)}
    )
    found = ngd.solve_scaled(Recorder(), None, rhs, damping=0.1)
    assert not np.any(found.direction["wide"])
    assert not np.any(found.direction["narrow"])
    assert int(found.info.status) == Status.NON_FINITE


@every_own_solver
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"damping": -0.1}, "`damping` must not be negative, got -0.1"),
        ({"damping": float("nan")}, "`damping` must not be negative, got nan"),
        ({"damping": jnp.ones(2)}, "`damping` must be a scalar"),
        ({"damping": 0.1, "guess": {"a": jnp.ones(2)}}, "`guess` must have the tree"),
        (
            {"damping": 0.1, "guess": {"a": jnp.ones(3), "b": [jnp.ones(2)]}},
            "`guess` must have the shapes of `gradient`",
        ),
    ],
)
def test_arguments_that_no_solver_can_take_raise(solver, options, match):
    rhs = systems.tree_like(np.ones(4), "float32")
    with pytest.raises(ValueError, match=match):
        solver(systems.fisher_of(jnp.eye(4), rhs), rhs, **options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_steps": 0}, ValueError, "`max_steps` must be at least 1, got 0"),
        ({"max_steps": 2.5}, TypeError, "`max_steps` must be a Python int"),
        ({"max_steps": True}, TypeError, "`max_steps` must be a Python int"),
        ({"rtol": -1e-3}, ValueError, "`rtol` must not be negative, got -0.001"),
        ({"rtol": float("nan")}, ValueError, "`rtol` must not be negative, got nan"),
    ],
)
def test_budgets_that_cannot_work_raise_at_construction(options, error, match):
    construct = inspect.unwrap(ngd.CG.__init__)
    with pytest.raises(error, match=match):
        construct(object.__new__(ngd.CG), **options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_steps": -1}, ValueError, "`max_steps` must be at least 1"),
        ({"max_steps": jnp.int32(3)}, TypeError, "`max_steps` must be a Python int"),
        ({"max_steps": 3, "atol": -1.0}, ValueError, "`atol` must not be negative"),
        ({"max_steps": 3, "x0": jnp.ones(2)}, ValueError, "`x0` must have the shapes"),
    ],
)
def test_bare_loop_checks_its_arguments(options, error, match):
    loop = inspect.unwrap(ngd.conjugate_gradient)
    with pytest.raises(error, match=match):
        loop(lambda v: v, jnp.ones(3), **options)


def test_integer_right_hand_sides_raise():
    with pytest.raises(TypeError, match="`rhs` must hold floating point"):
        ngd.conjugate_gradient(lambda v: v, jnp.arange(3), max_steps=2)


def test_every_status_has_a_message():
    assert len({status.message for status in Status}) == len(Status)
    assert all(status.message.endswith(".") for status in Status)
