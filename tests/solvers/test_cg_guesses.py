"""Conjugate gradients: first guesses, preconditioners, and the state of `CG`."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax import dense
from ngd_jax.contrib.jacobi import Jacobi
from ngd_jax.contrib.nystrom import Nystrom
from tests import reference
from tests.marks import long_unless
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


@pytest.mark.parametrize("preconditioned", [False, True])
def test_from_a_guess_it_takes_a_step_for_each_eigenvalue(preconditioned, x64, rng):
    # Only if later directions exclude the guess, which is conjugate to nothing.
    eigenvalues = np.repeat([0.5, 1.0, 3.0], 4)
    matrix, inverse = systems.spectrum(rng, eigenvalues), None
    if preconditioned:  # M⁻¹ A is similar to the matrix
        scales = np.geomspace(0.1, 10, 12)
        matrix = scales[:, None] * matrix * scales
        inverse = np.diag(scales**-2.0)
    truth, x0 = rng.normal(size=(2, 12))
    x, info = solve(
        matrix,
        matrix @ truth,
        x0=x0,
        preconditioner=inverse,
        max_steps=5,
        rtol=1e-9,
        dtype="f8",
    )
    assert int(info.num_steps) == 3
    assert int(info.status) == Status.CONVERGED
    np.testing.assert_allclose(x, truth, rtol=1e-6)


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


@pytest.mark.long
def test_preconditioner_is_built_from_the_fisher_once_for_each_solve(rng):
    params = reference.network_params(rng, 3)
    x = jnp.asarray(rng.normal(size=(9, 2)), jnp.float32)
    calls = []

    def jacobi(fisher, damping):
        calls.append(1)
        _, unravel = jax.flatten_util.ravel_pytree(params)
        inverse = unravel(1 / (dense.diagonal(fisher) + damping))
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


# --- The solver and its state.


def quadratic_problem(rng):
    root = systems.root_of(systems.spectrum(rng, np.geomspace(1e-3, 1, 12)))
    return jnp.asarray(root, "f4"), systems.tree_like(rng.normal(size=12), "float32")


def test_cg_without_preconditioner_keeps_nothing():
    solver = ngd.CG()
    assert isinstance(solver, ngd.Solver)
    assert solver.init({"w": jnp.ones(3)}) == ()
    assert solver == ngd.CG()
    builder = ngd.CG(preconditioner=lambda _fisher, _damping: lambda v: v)
    assert builder.init({"w": jnp.ones(3)}) == ()


@pytest.mark.long
@pytest.mark.parametrize(
    "preconditioner",
    [Jacobi(refresh_every=3), Nystrom(3, jax.random.key(0), refresh_every=3)],
    ids=["Jacobi", "Nystrom"],
)
def test_state_is_reused_refreshed_and_never_recompiled(preconditioner, rng):
    root, rhs = quadratic_problem(rng)
    solver = ngd.CG(40, rtol=1e-4, preconditioner=preconditioner)

    @jax.jit
    def solve(root, rhs, damping, state):
        fisher, system = systems.fisher_of(root, rhs), ngd.RightHandSide(rhs)
        return ngd.solve_scaled(solver, fisher, system, damping=damping, state=state)

    state = solver.init(rhs)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    builds = []
    for step in range(5):
        damping, scale = jnp.float32(0.1 / (step + 1)), 1.0 + step
        solution = solve(root * jnp.sqrt(scale), rhs, damping, state)
        state = solution.state
        assert int(solution.info.status) == Status.CONVERGED
        matrix = scale * np.asarray(root, float).T @ np.asarray(root, float)
        truth = np.linalg.solve(matrix + float(damping) * np.eye(12), systems.flat(rhs))
        direction = systems.flat(solution.direction)
        np.testing.assert_allclose(direction, truth, rtol=0.02, atol=1e-2)
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state) == shapes
        builds.append(int(state.num_builds))
    assert builds == [1, 1, 1, 2, 2]
    assert solve._cache_size() == 1


@pytest.mark.long
def test_calling_the_solver_is_solving_with_nothing_kept(rng):
    root, rhs = quadratic_problem(rng)
    solver = ngd.CG(preconditioner=Jacobi())
    fisher = systems.fisher_of(root, rhs)
    one, one_info = solver(fisher, rhs, damping=0.1)
    two = ngd.solve_scaled(solver, fisher, ngd.RightHandSide(rhs), damping=0.1)
    assert two.state == ()
    same = (two.direction, two.info)
    jax.tree.map(np.testing.assert_array_equal, (one, one_info), same)


@pytest.mark.parametrize("max_steps", [3, 20, 60])
@pytest.mark.parametrize("guess", long_unless([True], [False, True]))
def test_pushed_is_the_pushforward_of_the_direction(max_steps, guess, rng):
    root, rhs = quadratic_problem(rng)
    system = ngd.RightHandSide(
        jax.tree.map(lambda g: 1e5 * g, rhs), guess=rhs if guess else None
    )

    @jax.jit
    def solve(root):
        fisher = systems.fisher_of(root, rhs)
        solver = ngd.CG(max_steps, rtol=0.0)
        solution = ngd.solve_scaled(solver, fisher, system, damping=1e-3)
        return solution.pushed, fisher.pushforward(solution.direction)

    pushed, truth = solve(root)
    error = np.linalg.norm(pushed - truth) / np.linalg.norm(truth)
    assert error <= 1e-5


def test_in_microbatches_nothing_is_pushed_along(rng):
    root, rhs = quadratic_problem(rng)
    fisher = systems.fisher_of(root, rhs, microbatch_size=5)
    system = ngd.RightHandSide(rhs)
    solution = ngd.solve_scaled(ngd.CG(), fisher, system, damping=0.1)
    assert solution.pushed is None
    whole, _ = ngd.CG()(systems.fisher_of(root, rhs), rhs, damping=0.1)
    error = systems.flat(solution.direction) - systems.flat(whole)
    assert np.abs(error).max() <= 1e-4 * np.abs(systems.flat(whole)).max()


@pytest.mark.parametrize(("max_steps", "copies"), [(50, 1), (51, 2)])
@pytest.mark.parametrize("guess", [False, True])
def test_short_solves_compile_one_product(guess, max_steps, copies):
    # Even with a guess: the step along it is one of the loop's steps.
    @jax.jit
    def solve(rhs, x0):
        return ngd.conjugate_gradient(
            jnp.tan, rhs, x0=x0 if guess else None, max_steps=max_steps
        )

    text = solve.lower(jnp.ones(3), jnp.ones(3)).as_text()
    assert len(re.findall(r"\btan", text)) == copies


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_warm_starts_that_cannot_work_raise(value):
    construct = inspect.unwrap(ngd.CG.__init__)
    with pytest.raises(ValueError, match=r"`warm_start` must be in \[0, 1\]"):
        construct(object.__new__(ngd.CG), warm_start=value)
