"""Preconditioners: M as the formulas say, positive definite, kept and built anew."""

import dataclasses
import functools
import inspect
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from tests import reference
from tests.solvers import systems

pytestmark = pytest.mark.usefixtures("strict_ranks")
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Matrix(systems.Matrix):
    """With what the preconditioners ask for besides."""

    @property
    def params(self):
        return self.like


def matrix_of(values, dtype="float64"):
    values = jnp.asarray(values, dtype)
    return Matrix(values, systems.tree_like(np.zeros(len(values)), dtype))


def network_problem(rng, dtype="float64"):
    """A small classifier, and its Fisher by NumPy."""
    params = reference.network_params(rng, 3, dtype=dtype)
    x = jnp.asarray(rng.normal(size=(9, 2)), dtype)
    outputs, jacobian = reference.jacobian(reference.network, params, x)
    fisher = reference.fisher_of(
        reference.categorical_metric(outputs), jacobian, np.full(9, 1 / 9)
    )
    return params, x, fisher


def linearize(params, x, **options):
    return ngd.linearize_fisher(
        reference.network, params, x, ngd.Categorical(), **options
    )


def dense(matvec, like):
    """The matrix of a map on trees, float64."""
    flat, unravel = ravel_pytree(like)
    rows = jax.vmap(lambda row: ravel_pytree(matvec(unravel(row)))[0])(
        jnp.eye(flat.size, dtype=flat.dtype)
    )
    return np.asarray(rows, float)


# --- Jacobi.


@pytest.mark.parametrize("power", [1.0, 0.75])
def test_jacobi_is_the_formula(dtype, power, rng):
    params, x, truth = network_problem(rng, dtype)
    diagonal = np.diag(truth) + 0.1
    inverse = (diagonal / diagonal.max()) ** -power

    @jax.jit
    def apply(params):
        return ngd.Jacobi(power=power)(linearize(params, x), 0.1)(params)

    rtol = 1e-4 if dtype == "float32" else 1e-10
    expected = inverse * reference.flat(params)
    np.testing.assert_allclose(reference.flat(apply(params)), expected, rtol=rtol)


@functools.partial(jax.jit, static_argnames=("num_probes", "options"))
def estimates(params, x, keys, num_probes, options=()):
    def one(key):
        fisher = linearize(params, x, **dict(options))
        jacobi = ngd.Jacobi(num_probes=num_probes, key=key)
        return ravel_pytree(jacobi.update(fisher, jacobi.init(params)).diagonal)[0]

    return jax.vmap(one)(keys)


@pytest.mark.parametrize("options", [(), (("microbatch_size", 4),)])
def test_probes_estimate_the_diagonal_within_their_variance(options, rng, x64):
    params, x, truth = network_problem(rng)
    drawn = estimates(params, x, jax.random.split(KEY, 400), 5, options)
    drawn, diagonal = np.asarray(drawn), np.diag(truth)
    assert (drawn >= 0).all()
    # Var = 2 (Fᵢᵢ² - Σₖ aₖᵢ⁴) for one probe.
    deviation = np.sqrt(2 / 5) * diagonal
    assert (drawn.std(0) <= 1.3 * deviation + 1e-15).all()
    error = np.abs(drawn.mean(0) - diagonal)
    assert (error <= 5 * deviation / np.sqrt(400) + 1e-15).all()


def test_probes_of_a_sampled_fisher_estimate_its_own_diagonal(rng, x64):
    params, x, _ = network_problem(rng)
    options = (("kind", "sampled"), ("key", jax.random.key(3)))
    fisher = linearize(params, x, **dict(options))
    jacobi = ngd.Jacobi(num_probes=2000, key=KEY)
    state = jax.jit(lambda: jacobi.update(fisher, jacobi.init(params)))()
    np.testing.assert_allclose(
        reference.flat(state.diagonal), fisher.diagonal(), rtol=0.2, atol=1e-12
    )


def test_a_parameter_that_nothing_depends_on_is_harmless_without_damping():
    fisher = matrix_of(np.diag([4.0, 1.0, 0.0, 0.0]), "float32")
    precondition = ngd.Jacobi(power=1.0)(fisher, 0.0)
    inverse = systems.flat(precondition(systems.tree_like(np.ones(4), "float32")))
    assert np.isfinite(inverse).all()
    np.testing.assert_allclose(inverse[:2], [1.0, 4.0])
    zero = ngd.Jacobi()(matrix_of(np.zeros((2, 2)), "float32"), 0.0)
    assert np.isfinite(systems.flat(zero(systems.tree_like([1.0, 2.0], "f4")))).all()


def test_cg_with_jacobi_takes_the_textbook_iterates(rng, x64):
    matrix = systems.spectrum(rng, np.logspace(-2, 1, 14))
    scale = np.logspace(0, 2, 14)
    matrix = scale[:, None] * matrix * scale
    rhs, damping = rng.normal(size=14), 0.3
    system, inverse = matrix + damping * np.eye(14), 1 / (np.diag(matrix) + damping)

    x, r = np.zeros(14), rhs.copy()
    p = z = inverse * r
    for steps in range(1, 9):
        alpha = (r @ z) / (p @ system @ p)
        x, r_next = x + alpha * p, r - alpha * system @ p
        z_next = inverse * r_next
        p = z_next + (r_next @ z_next) / (r @ z) * p
        r, z = r_next, z_next
        if steps not in (1, 8):
            continue
        solver = ngd.CG(steps, rtol=0.0, preconditioner=ngd.Jacobi(power=1.0))
        ours, _ = jax.jit(
            lambda matrix, rhs, solver=solver: solver(
                matrix_of(matrix), rhs, damping=damping
            )
        )(jnp.asarray(matrix), systems.tree_like(rhs, "float64"))
        np.testing.assert_allclose(systems.flat(ours), x, rtol=1e-7, atol=1e-12)


# --- Nyström.


@functools.partial(jax.jit, static_argnames=("rank", "size"))
def nystrom_of(matrix, damping, key, rank, size):
    """The state and M⁻¹ as a matrix."""
    fisher = matrix_of(matrix, matrix.dtype)
    nystrom = ngd.Nystrom(rank, key)
    state = nystrom.update(fisher, nystrom.init(fisher.params))
    precondition = nystrom.matvec(state, damping)
    flat, unravel = ravel_pytree(fisher.params)
    eye = jnp.eye(size, dtype=flat.dtype)
    return state, jax.vmap(lambda v: ravel_pytree(precondition(unravel(v)))[0])(eye)


def approximation(state):
    vectors = [
        np.asarray(leaf, float).reshape(len(leaf), -1)
        for leaf in jax.tree.leaves(state.eigenvectors)
    ]
    basis = np.concatenate(vectors, axis=1)
    return (basis.T * np.asarray(state.eigenvalues, float)) @ basis, basis


SPECTRA = {
    "fast decay": np.logspace(0, -12, 40),
    "slow decay": np.linspace(1, 0.1, 40),
    "low rank": np.r_[np.logspace(0, -2, 5), np.zeros(35)],
    "zero": np.zeros(40),
    "identity": np.ones(40),
    "small": 1e-22 * np.logspace(0, -6, 40),
    "large": 1e18 * np.logspace(0, -6, 40),
}


@pytest.mark.parametrize("rank", [3, 40])
def test_nystrom_is_symmetric_positive_definite(dtype, rank, rng):
    for values, relative_damping in itertools.product(SPECTRA.values(), (0.0, 1e-5)):
        matrix = jnp.asarray(systems.spectrum(rng, values), dtype)
        damping = jnp.asarray(relative_damping * max(values.max(), 1e-30), dtype)
        state, inverse = nystrom_of(matrix, damping, KEY, rank, 40)
        inverse = np.asarray(inverse, float)
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(inverse, inverse.T, atol=20 * eps)
        spectrum = np.linalg.eigvalsh((inverse + inverse.T) / 2)
        assert spectrum[0] > eps
        assert spectrum[-1] <= 1 + 100 * eps
        _, basis = approximation(state)
        assert np.linalg.norm(basis, 2) <= 1 + 100 * eps


def test_nystrom_is_below_the_matrix_and_near_it(x64, rng):
    values = np.logspace(0, -8, 40)
    matrix = systems.spectrum(rng, values)
    for rank in (5, 20):
        state, _ = nystrom_of(jnp.asarray(matrix), 0.0, KEY, rank, 40)
        estimate, basis = approximation(state)
        np.testing.assert_allclose(basis @ basis.T, np.eye(rank), atol=1e-12)
        assert (np.diff(state.eigenvalues) <= 0).all()
        error = np.linalg.eigvalsh(matrix - estimate)
        assert error[0] >= -1e-14
        assert error[-1] <= 20 * values[rank - rank // 4]


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6])
def test_preconditioned_condition_number_is_within_the_bound(damping, x64, rng):
    # Proposition 5.3 of Frangella, Tropp and Udell: κ ≤ (λᵣ + λ + ‖F - F̂‖) / λ.
    matrix = systems.spectrum(rng, np.logspace(0, -10, 40))
    for rank in (4, 12):
        state, inverse = nystrom_of(jnp.asarray(matrix), damping, KEY, rank, 40)
        estimate, _ = approximation(state)
        error = np.linalg.norm(matrix - estimate, 2)
        root = np.linalg.cholesky(np.asarray(inverse))
        spectrum = np.linalg.eigvalsh(root.T @ (matrix + damping * np.eye(40)) @ root)
        bound = (state.eigenvalues[-1] + damping + error) / damping
        assert spectrum[-1] / spectrum[0] <= bound * (1 + 1e-8)


def test_nystrom_of_full_rank_is_the_inverse_up_to_a_factor(x64, rng):
    matrix = systems.spectrum(rng, np.linspace(0.1, 2.0, 12))
    # More vectors than there are dimensions: cut to those.
    state, inverse = nystrom_of(jnp.asarray(matrix), 0.5, KEY, 99, 12)
    assert state.eigenvalues.shape == (12,)
    np.testing.assert_allclose(state.eigenvalues, np.linspace(2.0, 0.1, 12))
    np.testing.assert_allclose(
        inverse @ (matrix + 0.5 * np.eye(12)), 0.6 * np.eye(12), atol=1e-10
    )


def test_rank_of_the_matrix_is_enough_for_two_steps(dtype, rng):
    params, x, _ = network_problem(rng, dtype)
    rhs = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), params)

    @jax.jit
    def solve(params, rhs):
        # Two outputs that matter for each of 9 examples: rank 18 of 22 parameters.
        solver = ngd.CG(50, rtol=1e-3, preconditioner=ngd.Nystrom(19, KEY))
        return solver(linearize(params, x), rhs, damping=1e-3)

    _, info = solve(params, rhs)
    assert int(info.status) == ngd.SolverStatus.CONVERGED
    assert int(info.num_steps) <= 2


# --- State.

EVERY_KIND = pytest.mark.parametrize(
    "make",
    [
        ngd.Jacobi,
        functools.partial(ngd.Jacobi, num_probes=3, key=KEY),
        functools.partial(ngd.Nystrom, 4, KEY),
    ],
    ids=["Jacobi", "Jacobi with probes", "Nystrom"],
)


def abstract(fn, *args):
    return jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(fn, *args)
    )


@EVERY_KIND
@pytest.mark.parametrize("params_dtype", ["bfloat16", "mixed"])
def test_states_keep_their_structure_and_dtypes(make, params_dtype, rng):
    params, x, _ = network_problem(rng, "float32")
    params["hidden"] = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), params["hidden"]
    )
    if params_dtype == "bfloat16":
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    preconditioner = make(refresh_every=2)
    assert isinstance(preconditioner, ngd.Preconditioner)
    before = abstract(preconditioner.init, params)
    after = abstract(
        lambda p: preconditioner.update(linearize(p, x), preconditioner.init(p)), params
    )
    assert before == after
    assert not any(weak for _, _, weak in jax.tree.leaves(after, is_leaf=_is_spec))
    state = preconditioner.init(params)
    image = preconditioner.matvec(state, 0.1)(params)
    for leaf, parameter in zip(
        jax.tree.leaves(image), jax.tree.leaves(params), strict=True
    ):
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, parameter.astype(jnp.float32), rtol=1e-6)


def _is_spec(x):
    return isinstance(x, tuple) and len(x) == 3 and isinstance(x[2], bool)


@EVERY_KIND
def test_built_at_every_kth_step_and_kept_between(make, rng):
    params, x, _ = network_problem(rng, "float32")
    preconditioner = make(refresh_every=3)

    def step(carry, scale):
        params, state = carry
        moved = jax.tree.map(lambda p: p * scale, params)
        state = preconditioner.update(linearize(moved, x), state)
        return (moved, state), state

    start = (params, preconditioner.init(params))
    _, states = jax.jit(lambda c: jax.lax.scan(step, c, jnp.full(7, 1.1)))(start)
    np.testing.assert_array_equal(states.num_builds, [1, 1, 1, 2, 2, 2, 3])
    np.testing.assert_array_equal(states.age, [1, 2, 3, 1, 2, 3, 1])
    built = states.diagonal if hasattr(states, "diagonal") else states.eigenvalues
    changes = [
        any(bool(jnp.any(leaf[i] != leaf[i + 1])) for leaf in jax.tree.leaves(built))
        for i in range(6)
    ]
    assert changes == [False, False, True, False, False, True]


@dataclasses.dataclass(frozen=True)
class Sick(Matrix):
    """Not finite while told so."""

    is_sick: Any = False

    def matvec(self, vector):
        nan = jnp.where(self.is_sick, jnp.nan, 1.0).astype(self.matrix.dtype)
        return jax.tree.map(lambda leaf: leaf * nan, super().matvec(vector))

    def diagonal(self):
        return jnp.where(self.is_sick, jnp.nan, super().diagonal())


@pytest.mark.parametrize("refresh_every", [1, 2])
@pytest.mark.parametrize(
    "make", [ngd.Jacobi, functools.partial(ngd.Nystrom, 4, KEY)], ids=["Jacobi", "Nys"]
)
def test_builds_that_are_not_finite_keep_the_old_and_are_tried_again(
    make, refresh_every, rng
):
    matrix = jnp.asarray(systems.spectrum(rng, np.linspace(1, 2, 6)), jnp.float32)
    like = systems.tree_like(np.zeros(6), "float32")
    preconditioner = make(refresh_every=refresh_every)

    @jax.jit
    def update(state, is_sick):
        return preconditioner.update(Sick(matrix, like, is_sick), state)

    def factors(state):
        return state[2:]

    first = preconditioner.init(like)
    sick = update(first, True)
    jax.tree.map(np.testing.assert_array_equal, factors(sick), factors(first))
    v = systems.tree_like(np.ones(6), "float32")
    image = preconditioner.matvec(sick, 0.1)(v)
    np.testing.assert_allclose(systems.flat(image), np.ones(6), rtol=1e-6)

    built = update(sick, False)
    assert int(built.num_builds) == 2
    assert int(built.age) == 1
    state = built
    for _ in range(refresh_every - 1):
        state = update(state, True)  # not due: not even looked at
        assert int(state.num_builds) == 2
    for attempts in (3, 4):
        state = update(state, True)
        assert int(state.num_builds) == attempts
        jax.tree.map(np.testing.assert_array_equal, factors(state), factors(built))
    assert int(update(state, False).age) == 1


def test_each_build_has_its_own_random_numbers_and_the_same_key_the_same(rng):
    params, x, _ = network_problem(rng, "float32")
    jacobi = ngd.Jacobi(num_probes=1, key=KEY)
    update = jax.jit(lambda state: jacobi.update(linearize(params, x), state))
    one = update(jacobi.init(params))
    two = update(one)
    again = update(jacobi.init(params))
    first, second, third = (reference.flat(s.diagonal) for s in (one, two, again))
    np.testing.assert_array_equal(first, third)
    assert np.abs(first - second).max() > 1e-3 * first.max()


@pytest.mark.parametrize(
    "make", [ngd.Jacobi, functools.partial(ngd.Nystrom, 4, KEY)], ids=["Jacobi", "Nys"]
)
def test_vmapped_states_are_those_of_each(make, rng):
    spectra = [np.logspace(-3, 0, 10), np.linspace(1, 2, 10)]
    matrices = [systems.spectrum(rng, values) for values in spectra]
    preconditioner = make(refresh_every=2)

    def apply(matrix):
        fisher = matrix_of(matrix, "float32")
        state = preconditioner.update(fisher, preconditioner.init(fisher.params))
        vector = systems.tree_like(np.ones(10), "float32")
        return preconditioner.matvec(state, 0.1)(vector)

    together = jax.jit(jax.vmap(apply))(jnp.asarray(matrices, jnp.float32))
    for i, matrix in enumerate(matrices):
        one = systems.flat(jax.jit(apply)(jnp.asarray(matrix, jnp.float32)))
        both = systems.flat(jax.tree.map(lambda leaf, i=i: leaf[i], together))
        np.testing.assert_allclose(both, one, rtol=2e-3, atol=2e-3)


@EVERY_KIND
def test_trees_without_leaves_have_a_state(make):
    preconditioner = make(refresh_every=5)
    state = preconditioner.init({})
    assert int(state.age) == 5
    mapped = optax.tree.map_params(preconditioner.init, lambda x: x + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


# --- Other parameters.


def test_bfloat16_parameters_are_solved_for(rng):
    params, x, truth = network_problem(rng, "float32")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    for preconditioner in (ngd.Jacobi(num_probes=20, key=KEY), ngd.Nystrom(10, KEY)):
        solver = ngd.CG(30, rtol=1e-2, preconditioner=preconditioner)

        @jax.jit
        def solve(params, solver=solver):
            return solver(linearize(params, x), params, damping=1e-1)

        solution, _ = solve(params)
        expected = np.linalg.solve(
            truth + 0.1 * np.eye(len(truth)), reference.flat(params)
        )
        error = np.linalg.norm(reference.flat(solution) - expected)
        assert error <= 0.1 * np.linalg.norm(expected)


def test_complex_parameters_have_real_diagonals_and_a_full_nystrom(x64, rng):
    params = {
        "w": jnp.asarray(rng.normal(size=(3, 2)) + 1j * rng.normal(size=(3, 2))),
        "b": jnp.asarray(rng.normal(size=2) + 1j * rng.normal(size=2)),
    }
    x = jnp.asarray(rng.normal(size=(20, 3)), complex)

    def log_amplitude(params, x):
        return jnp.sum(jnp.log(jnp.cosh(x @ params["w"] + params["b"][None])), axis=-1)

    def linearized(params):
        return ngd.linearize_fisher(log_amplitude, params, x, ngd.LogAmplitude())

    jacobi = ngd.Jacobi(num_probes=3000, key=KEY)
    state = jax.jit(lambda p: jacobi.update(linearized(p), jacobi.init(p)))(params)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(state.diagonal))
    np.testing.assert_allclose(
        reference.flat(state.diagonal), linearized(params).diagonal(), rtol=0.15
    )

    for preconditioner, budget in ((ngd.Jacobi(), 40), (ngd.Nystrom(99, KEY), 2)):
        solver = ngd.CG(40, rtol=1e-8, preconditioner=preconditioner)
        solution, info = jax.jit(
            lambda p, solver=solver: solver(linearized(p), p, damping=1e-2)
        )(params)
        assert int(info.status) == ngd.SolverStatus.CONVERGED
        assert int(info.num_steps) <= budget
        residual = optax.tree.add(
            linearized(params).matvec(solution), optax.tree.scale(1e-2, solution)
        )
        np.testing.assert_allclose(
            reference.flat(residual), reference.flat(params), atol=1e-6
        )


# --- Input errors.


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ngd.Jacobi(power=0.0), ValueError, r"`power` must be in \(0, 1\]"),
        (lambda: ngd.Jacobi(power=1.5), ValueError, r"`power` .* got 1.5"),
        (lambda: ngd.Jacobi(refresh_every=0), ValueError, "`refresh_every` must be"),
        (lambda: ngd.Jacobi(num_probes=2), TypeError, "needs `key`, a typed key"),
        (lambda: ngd.Jacobi(num_probes=0, key=KEY), ValueError, "`num_probes` must"),
        (lambda: ngd.Nystrom(0, KEY), ValueError, "`rank` must be at least 1, got 0"),
        (lambda: ngd.Nystrom(2.0, KEY), TypeError, "`rank` must be a Python int"),
        (lambda: ngd.Nystrom(2, jax.random.PRNGKey(0)), TypeError, "a typed key"),
    ],
)
def test_arguments_that_cannot_work_raise_at_construction(make, error, match):
    with pytest.MonkeyPatch.context() as patch:
        for kind in (ngd.Jacobi, ngd.Nystrom):
            patch.setattr(kind, "__init__", inspect.unwrap(kind.__init__))
        with pytest.raises(error, match=match):
            make()
