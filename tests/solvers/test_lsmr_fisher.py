"""LSMR on the Fisher of models: every likelihood, right-hand sides of every kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from ngd_jax import tree
from ngd_jax.coordinates import ravel_real
from ngd_jax.dense import dense
from tests import reference
from tests.fisher_cases import CASES
from tests.marks import long_unless

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus
EPS = float(np.finfo(np.float32).eps)
SOLVER = ngd.LSMR(max_steps=60, rtol=0.0)


def draw_like(rng, tree):
    """Numbers of size one; complex where the leaf is."""

    def draw(leaf):
        values = rng.normal(size=leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            values = values + 1j * rng.normal(size=leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(draw, tree)


def solve_with(solver, fisher, g, w, damping, x0=None):
    """Direction and report for g known as coefficients w too, or w = None."""
    rhs = ngd.RightHandSide(tree.widen(g), coefficients=w, guess=x0)
    solution = ngd.solve_scaled(solver, fisher, rhs, damping=damping)
    assert solution.state == ()
    return solution.direction, solution.info


# --- Every likelihood.


# One for each way to average and to factor; the others take their time.
MARKS = dict.fromkeys(("categorical", "complex amplitude", "product"), pytest.mark.long)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=MARKS.get(name, pytest.mark.slow)) for name in CASES],
)
def test_solution_is_that_of_the_dense_system_for_every_likelihood(name, x64, rng):
    case = CASES[name]
    params, batch = case.make(rng, "float64")
    jacobian = reference.jacobian(case.model_fn, params, batch)
    dense = case.true_fisher(*jacobian)

    def linearize(params):
        return ngd.linearize_fisher(case.model_fn, params, batch, case.likelihood)

    @jax.jit
    def solve(params, w, damping):
        fisher = linearize(params)
        g = fisher.sqrt_rmatvec(w)
        return g, *solve_with(SOLVER, fisher, g, w, damping)

    image = jax.eval_shape(lambda params: linearize(params).sqrt_matvec(params), params)
    w = draw_like(rng, image)
    for damping in (1.0, 1e-4):
        g, d, info = solve(params, w, damping)
        expected = np.linalg.solve(
            dense + damping * np.eye(len(dense)), reference.flat(g)
        )
        assert int(info.status) in (Status.CONVERGED, Status.STAGNATED)
        np.testing.assert_allclose(reference.flat(d), expected, rtol=1e-7, atol=1e-7)


# --- Right-hand sides: w, a rest, and neither.


class Root:
    """A matrix with the interface of a Fisher, on parameters in two leaves."""

    def __init__(self, matrix):
        self.matrix = matrix
        flat = jnp.zeros(matrix.shape[1], matrix.dtype)
        self.params = self.tree(flat)
        self.outputs = jnp.zeros(len(matrix), matrix.dtype)

    @staticmethod
    def tree(flat):
        return {"a": flat[:3], "b": [flat[3:]]}

    def sqrt_matvec(self, vector):
        return self.matrix @ ravel_pytree(vector)[0]

    def sqrt_rmatvec(self, coefficients):
        return self.tree(self.matrix.T @ coefficients)


@functools.cache
def compiled(solver, knows_w=True, warm=False):
    @jax.jit
    def solve(matrix, g, w, damping, x0):
        fisher = Root(matrix)
        d, info = solve_with(
            solver,
            fisher,
            fisher.tree(g),
            w if knows_w else None,
            damping,
            fisher.tree(x0) if warm else None,
        )
        return ravel_pytree(d)[0], info

    return solve


def solve(matrix, g, w=None, damping=0.0, x0=None, dtype="float32", solver=SOLVER):
    run = compiled(solver, w is not None, x0 is not None)
    arguments = (matrix, g, w, damping, x0)
    d, info = run(*(None if a is None else jnp.asarray(a, dtype) for a in arguments))
    assert np.isfinite(d).all()
    return np.asarray(d, float), info


def problem(rng, condition=10.0, rows=30, columns=12):
    u, _ = np.linalg.qr(rng.normal(size=(rows, columns)))
    v, _ = np.linalg.qr(rng.normal(size=(columns, columns)))
    matrix = (u * np.geomspace(1, 1 / condition, columns)) @ v.T
    return matrix, rng.normal(size=rows)


def dense_solution(matrix, g, damping):
    square = matrix.T @ matrix + damping * np.eye(matrix.shape[1])
    return np.linalg.solve(square, g)


def relative_error(x, expected):
    return np.linalg.norm(x - expected) / np.linalg.norm(expected)


@pytest.mark.long
@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-4, 1.0])
@pytest.mark.parametrize("rest", [0.0, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("knows", ["w", "half of w", "nothing"])
def test_every_right_hand_side_is_solved_for(knows, rest, damping, dtype, rng):
    matrix, w = problem(rng)
    g = matrix.T @ w + rest * rng.normal(size=12)
    known = {"w": w, "half of w": w / 2, "nothing": None}[knows]
    d, info = solve(matrix, g, known, damping, dtype=dtype)
    eps = float(np.finfo(dtype).eps)
    error = relative_error(d, dense_solution(matrix, g, damping))
    assert error <= 20 * 10**2 * eps  # the condition number of F
    assert int(info.num_steps) <= 13
    # What evaluating the residual rounds; ‖A‖ = 1.
    size = np.linalg.norm(d) + np.linalg.norm(w) + np.linalg.norm(g)
    assert float(info.relative_residual) <= 10 * eps * size / np.linalg.norm(g)


@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-20, 20),
    damping_exponent=st.floats(-12, 0),
    rest_exponent=st.floats(-12, 3),
)
def test_nothing_depends_on_units(seed, exponent, damping_exponent, rest_exponent):
    rng = np.random.default_rng(seed)
    matrix, w = problem(rng)
    g = matrix.T @ w + 10.0**rest_exponent * rng.normal(size=12)
    damping = 10.0**damping_exponent
    scale = 10.0**exponent
    d, info = solve(matrix, scale * g, scale * w, damping)
    expected = dense_solution(matrix, scale * g, damping)
    # Dropped or kept: a rest at the threshold is 16 ε (‖g‖ + ‖A‖‖w‖).
    size = np.linalg.norm(g) + np.linalg.norm(w)
    dropped = 16 * EPS * 100 * scale * size
    error = np.linalg.norm(d - expected)
    assert error <= 2e3 * EPS * np.linalg.norm(expected) + dropped
    assert int(info.status) in (Status.CONVERGED, Status.STAGNATED)


@pytest.mark.parametrize("damping", [0.0, 1e-11])
def test_round_off_in_the_gradient_is_not_solved_for(damping, rng):
    matrix, _ = problem(rng, condition=1e4)
    matrix = np.float32(matrix).astype(float)
    w = matrix @ rng.normal(size=12)
    w = np.float32(w).astype(float)
    expected = dense_solution(matrix, matrix.T @ w, damping)
    g = matrix.T @ w
    g = g + 0.3 * EPS * np.linalg.norm(g) * rng.normal(size=12)
    d, _ = solve(matrix, g, w, damping)
    assert relative_error(d, expected) <= 1e4 * EPS
    # In parameter space it is the right-hand side: a digit is not left.
    d, _ = solve(matrix, g, None, damping)
    assert relative_error(d, expected) >= 0.1


def test_what_is_dropped_is_reported(rng):
    # w is mostly outside of the range of A, so that g is small against its round-off.
    matrix, _ = problem(rng)
    w = rng.normal(size=30)
    w -= matrix @ np.linalg.lstsq(matrix, w)[0] * (1 - 1e-4)
    rest = 2 * EPS * rng.normal(size=12)
    g = matrix.T @ w + rest
    d, info = solve(matrix, g, w, 1e-3)
    square = matrix.T @ matrix + 1e-3 * np.eye(12)
    truth = np.linalg.norm(g - square @ d) / np.linalg.norm(g)
    np.testing.assert_allclose(info.relative_residual, truth, rtol=0.3)
    assert truth >= 0.5 * np.linalg.norm(rest) / np.linalg.norm(g)
    assert int(info.status) == Status.STAGNATED


@pytest.mark.long
def test_traced_damping_of_zero_is_zero(rng):
    matrix, w = problem(rng)
    dampings = jnp.asarray([0.0, 1e-2], jnp.float32)
    run = compiled(SOLVER)
    arguments = (jnp.asarray(a, jnp.float32) for a in (matrix, matrix.T @ w, w))
    d, info = jax.vmap(run, (None, None, None, 0, None))(*arguments, dampings, None)
    for i, damping in enumerate((0.0, 1e-2)):
        expected = dense_solution(matrix, matrix.T @ w, damping)
        assert relative_error(np.asarray(d[i], float), expected) <= 1e-4
    assert (np.asarray(info.num_steps) <= 13).all()


@pytest.mark.long
def test_without_damping_the_shortest_solution_is_found(rng):
    matrix, _ = problem(rng, rows=12, columns=12)
    matrix = matrix[:6]
    w = rng.normal(size=6)
    expected = np.linalg.pinv(matrix) @ w
    for known in (w, None):
        d, _ = solve(matrix, matrix.T @ w, known, 0.0)
        assert relative_error(d, expected) <= 200 * np.linalg.cond(matrix) ** 2 * EPS


@pytest.mark.long
def test_zero_is_exactly_zero_whatever_the_guess(rng):
    matrix, _ = problem(rng)
    for w in (np.zeros(30), None):
        d, info = solve(matrix, np.zeros(12), w, 0.1, x0=rng.normal(size=12))
        assert not d.any()
        assert [float(field) for field in info] == [0, 0, Status.CONVERGED]


# --- First guesses.


@pytest.mark.parametrize("knows_w", long_unless([True], [True, False]))
def test_the_solution_as_a_guess_takes_no_step(knows_w, x64, rng):
    matrix, w = problem(rng)
    g = matrix.T @ w
    expected = dense_solution(matrix, g, 1e-2)
    solver = ngd.LSMR(rtol=1e-8)
    known = w if knows_w else None
    for multiple in (1.0, -3.0, 1e-30):  # its best multiple is what counts
        x0 = multiple * expected
        d, info = solve(matrix, g, known, 1e-2, x0, "float64", solver)
        assert int(info.num_steps) == 0
        assert int(info.status) == Status.CONVERGED
        np.testing.assert_allclose(d, expected, rtol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("knows_w", [True, False])
@pytest.mark.parametrize("damping", [0.0, 1e-6, 1e-2])
def test_no_guess_hurts(damping, knows_w, rng):
    matrix, w = problem(rng)
    g = matrix.T @ w
    expected = dense_solution(matrix, g, damping)
    square = matrix.T @ matrix + damping * np.eye(12)
    few = ngd.LSMR(max_steps=1, rtol=0.0)
    known = w if knows_w else None
    across = np.linalg.qr(np.stack([g, rng.normal(size=12)], 1))[0][:, 1]
    guesses = [across, rng.normal(size=12), -expected, 1e20 * across, np.zeros(12)]
    for x0 in guesses:
        d, _ = solve(matrix, g, known, damping, x0)
        assert relative_error(d, expected) <= 2e3 * EPS
        d, _ = solve(matrix, g, known, damping, x0, solver=few)
        assert 0.5 * d @ square @ d - g @ d <= EPS  # of the quadratic model, 0 at 0


@pytest.mark.slow
def test_a_good_guess_saves_steps(rng):
    matrix, w = problem(rng)
    g = matrix.T @ w
    expected = dense_solution(matrix, g, 1e-2)
    solver = ngd.LSMR(max_steps=60, rtol=1e-3)
    x0 = expected * (1 + 1e-3 * rng.normal(size=12))
    _, cold = solve(matrix, g, w, 1e-2, solver=solver)
    _, warm = solve(matrix, g, w, 1e-2, x0, solver=solver)
    assert int(warm.num_steps) < int(cold.num_steps)


# --- Real Fishers in float32: kinds, weights, microbatches, precisions.


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "weighted", "microbatch_size", "name"),
    [
        ("sampled", False, None, "categorical"),
        pytest.param("exact", True, None, "log amplitude", marks=pytest.mark.slow),
        ("exact", True, 3, "gaussian scalar"),
        pytest.param("exact", False, 2, "complex amplitude", marks=pytest.mark.slow),
    ],
)
def test_kinds_weights_and_microbatches_in_float32(
    kind, weighted, microbatch_size, name, rng
):
    case = CASES[name]
    params, batch = case.make(rng)
    outputs = jax.eval_shape(case.model_fn, params, batch)
    like = jax.ShapeDtypeStruct((7,), jnp.float32) if kind == "sampled" else outputs
    w = draw_like(rng, like)

    @jax.jit
    def solve(params, w):
        fisher = ngd.linearize_fisher(
            case.model_fn,
            params,
            batch,
            case.likelihood,
            kind=kind,
            key=jax.random.key(0),
            weights=jnp.arange(1.0, 8.0) if weighted else None,
            microbatch_size=microbatch_size,
        )
        g = fisher.sqrt_rmatvec(w)
        return g, *solve_with(SOLVER, fisher, g, w, 1e-2), dense(fisher)

    g, d, info, matrix = solve(params, w)
    matrix = np.asarray(matrix, float)
    g, d = (np.asarray(ravel_real(v)[0], float) for v in (g, d))
    expected = np.linalg.solve(matrix + 1e-2 * np.eye(len(matrix)), g)
    condition = 1 + np.linalg.norm(matrix, 2) / 1e-2
    assert relative_error(d, expected) <= 20 * condition * EPS
    assert int(info.status) in (Status.CONVERGED, Status.STAGNATED)


@pytest.mark.long
def test_bfloat16_parameters_are_solved_for(rng):
    case = CASES["gaussian"]
    params, batch = case.make(rng, "bfloat16")
    w = draw_like(rng, jax.ShapeDtypeStruct((7, 2), jnp.float32))

    @jax.jit
    def run(params, w):
        fisher = ngd.linearize_fisher(case.model_fn, params, batch, case.likelihood)
        g = optax.tree.cast(fisher.sqrt_rmatvec(w), jnp.bfloat16)
        return g, solve_with(SOLVER, fisher, g, w, 0.1)

    g, (d, info) = run(params, w)
    matrix = case.true_fisher(*reference.jacobian(case.model_fn, params, batch))
    expected = np.linalg.solve(matrix + 0.1 * np.eye(len(matrix)), reference.flat(g))
    # ε of bfloat16 is 8e-3, and comes back times the condition number of A.
    condition = np.sqrt(1 + np.linalg.norm(matrix, 2) / 0.1)
    assert relative_error(reference.flat(d), expected) <= 3 * condition * 8e-3
    assert int(info.status) != Status.NON_FINITE


# --- Mistakes.


def test_mistakes_are_named(rng):
    fisher = Root(jnp.asarray(problem(rng)[0], jnp.float32))
    g = fisher.params
    with pytest.raises(ValueError, match="`coefficients` must have the shapes of"):
        solve_with(ngd.LSMR(), fisher, g, jnp.ones(3), 0.1)
    with pytest.raises(ValueError, match="`damping` must not be negative"):
        ngd.LSMR()(fisher, g, damping=-1.0)
    with pytest.raises(ValueError, match="`guess` must have the tree structure"):
        ngd.LSMR()(fisher, g, damping=1.0, guess=jnp.ones(12))
    with pytest.raises(ValueError, match="`max_steps` must be at least 1"):
        ngd.LSMR(max_steps=0)
    with pytest.raises(ValueError, match="`rtol` must not be negative"):
        ngd.LSMR(rtol=-1e-3)
