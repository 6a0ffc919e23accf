"""Every preconditioner: its state, the parameters that it takes, its errors."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from ngd_jax import dense
from ngd_jax.contrib.jacobi import Jacobi
from ngd_jax.contrib.nystrom import Nystrom
from ngd_jax.coordinates import unravel_real
from tests import reference
from tests.solvers import systems
from tests.solvers.problems import (
    KEY,
    linearize,
    matrix_of,
    network_problem,
)

pytestmark = pytest.mark.usefixtures("strict_ranks")

BUILT_WHOLE = {
    "Jacobi": Jacobi,
    "Jacobi with probes": functools.partial(Jacobi, num_probes=3, key=KEY),
    "Nystrom": functools.partial(Nystrom, 4, KEY),
}
# The last one looks at every batch.
KINDS = BUILT_WHOLE | {"Kronecker": ngd.Kronecker}
EVERY_KIND = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def abstract(fn, *args):
    return jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(fn, *args)
    )


@pytest.mark.long
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

    def prepare(params):
        fisher, state = linearize(params, x), preconditioner.init(params)
        precondition, state = preconditioner.prepare(fisher, state, 0.1)
        return state, precondition(params)

    after = abstract(lambda params: prepare(params)[0], params)
    assert before == after
    assert not any(weak for _, _, weak in jax.tree.leaves(after, is_leaf=_is_spec))
    mapped = jax.eval_shape(lambda params: prepare(params)[1], params)
    assert {leaf.dtype for leaf in jax.tree.leaves(mapped)} == {jnp.dtype("float32")}


def _is_spec(x):
    return isinstance(x, tuple) and len(x) == 3 and isinstance(x[2], bool)


@EVERY_KIND
def test_before_anything_is_built_m_is_the_identity(make, rng):
    params, x, _ = network_problem(rng, "float32")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    preconditioner = make(refresh_every=2)

    @jax.jit
    def apply(params, x):
        fisher, state = linearize(params, x), preconditioner.init(params)
        return preconditioner.prepare(fisher, state, 0.1)[0](params)

    mapped = apply(params, x * jnp.nan)  # a build that must not be kept
    for leaf, parameter in zip(
        jax.tree.leaves(mapped), jax.tree.leaves(params), strict=True
    ):
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, parameter.astype(jnp.float32), rtol=1e-6)


@pytest.mark.parametrize("make", BUILT_WHOLE.values(), ids=BUILT_WHOLE)
def test_built_at_every_kth_step_and_kept_between(make, rng):
    params, x, _ = network_problem(rng, "float32")
    preconditioner = make(refresh_every=3)

    def step(carry, scale):
        params, state = carry
        moved = jax.tree.map(lambda p: p * scale, params)
        _, state = preconditioner.prepare(linearize(moved, x), state, 0.1)
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


@pytest.mark.parametrize("refresh_every", [1, 2])
@pytest.mark.parametrize(
    "make", [Jacobi, functools.partial(Nystrom, 4, KEY)], ids=["Jacobi", "Nys"]
)
def test_builds_that_are_not_finite_keep_the_old_and_are_tried_again(
    make, refresh_every, rng
):
    root = systems.root_of(systems.spectrum(rng, np.linspace(1, 2, 6)))
    root = jnp.asarray(root, jnp.float32)
    like = systems.tree_like(np.zeros(6), "float32")
    preconditioner = make(refresh_every=refresh_every)

    @jax.jit
    def prepare(state, is_sick):
        fisher = matrix_of(root * jnp.where(is_sick, jnp.nan, 1.0), "float32")
        precondition, state = preconditioner.prepare(fisher, state, 0.1)
        return precondition(systems.tree_like(np.ones(6), "float32")), state

    def update(state, is_sick):
        return prepare(state, is_sick)[1]

    def factors(state):
        return state[2:]

    first = preconditioner.init(like)
    mapped, sick = prepare(first, True)
    jax.tree.map(np.testing.assert_array_equal, factors(sick), factors(first))
    np.testing.assert_allclose(systems.flat(mapped), np.ones(6), rtol=1e-6)

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
    jacobi = Jacobi(num_probes=1, key=KEY)
    update = jax.jit(lambda state: jacobi.prepare(linearize(params, x), state, 0.1)[1])
    one = update(jacobi.init(params))
    two = update(one)
    again = update(jacobi.init(params))
    first, second, third = (reference.flat(s.diagonal) for s in (one, two, again))
    np.testing.assert_array_equal(first, third)
    assert np.abs(first - second).max() > 1e-3 * first.max()


@pytest.mark.long
@pytest.mark.parametrize(
    "make", [Jacobi, functools.partial(Nystrom, 4, KEY)], ids=["Jacobi", "Nys"]
)
def test_vmapped_states_are_those_of_each(make, rng):
    spectra = [np.logspace(-3, 0, 10), np.linspace(1, 2, 10)]
    roots = [systems.root_of(systems.spectrum(rng, values)) for values in spectra]
    preconditioner = make(refresh_every=2)

    def apply(root):
        fisher = matrix_of(root, "float32")
        state = preconditioner.init(fisher.params)
        precondition, _ = preconditioner.prepare(fisher, state, 0.1)
        return precondition(systems.tree_like(np.ones(10), "float32"))

    together = jax.jit(jax.vmap(apply))(jnp.asarray(roots, jnp.float32))
    for i, root in enumerate(roots):
        one = systems.flat(jax.jit(apply)(jnp.asarray(root, jnp.float32)))
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


@pytest.mark.long
def test_bfloat16_parameters_are_solved_for(rng):
    params, x, truth = network_problem(rng, "float32")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    for preconditioner in (
        Jacobi(num_probes=20, key=KEY),
        Nystrom(10, KEY),
        ngd.Kronecker(),
    ):
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


@pytest.mark.long
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

    jacobi = Jacobi(num_probes=3000, key=KEY)
    state = jax.jit(lambda p: jacobi.prepare(linearized(p), jacobi.init(p), 0.1)[1])(
        params
    )
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(state.diagonal))
    parts = unravel_real(dense.diagonal(linearized(params)), params)
    means = jax.tree.map(lambda x: (x.real + x.imag) / 2, parts)
    truth = reference.flat(means)
    np.testing.assert_allclose(reference.flat(state.diagonal), truth, rtol=0.15)
    exact = Jacobi().prepare(linearized(params), Jacobi().init(params), 0.1)[1]
    np.testing.assert_allclose(reference.flat(exact.diagonal), truth, rtol=1e-10)

    for preconditioner, budget in ((Jacobi(), 40), (Nystrom(99, KEY), 2)):
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
        (lambda: Jacobi(power=0.0), ValueError, r"`power` must be in \(0, 1\]"),
        (lambda: Jacobi(power=1.5), ValueError, r"`power` .* got 1.5"),
        (lambda: Jacobi(refresh_every=0), ValueError, "`refresh_every` must be"),
        (lambda: Jacobi(num_probes=2), TypeError, "needs `key`, a typed key"),
        (lambda: Jacobi(num_probes=0, key=KEY), ValueError, "`num_probes` must"),
        (lambda: Nystrom(0, KEY), ValueError, "`rank` must be at least 1, got 0"),
        (lambda: Nystrom(2.0, KEY), TypeError, "`rank` must be a Python int"),
        (lambda: Nystrom(2, jax.random.PRNGKey(0)), TypeError, "a typed key"),
        (lambda: ngd.CG(preconditioner=ngd.KFAC()), TypeError, "got a solver: KFAC"),
    ],
)
def test_arguments_that_cannot_work_raise_at_construction(make, error, match):
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Jacobi, Nystrom, ngd.CG):
            patch.setattr(kind, "__init__", inspect.unwrap(kind.__init__))
        with pytest.raises(error, match=match):
            make()
