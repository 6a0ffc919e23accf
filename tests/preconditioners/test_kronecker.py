"""Kronecker: exact where F is a product, else by the formula of its factors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from tests.preconditioners.problems import KEY, dense, linearize, network_problem

pytestmark = pytest.mark.usefixtures("strict_ranks")
COUNT = 12


def line(params, x):
    return x @ params["w"] + params["b"][None]


def line_problem(rng, dtype, num_outputs):
    params = {
        "b": jnp.asarray(rng.normal(size=num_outputs), dtype),
        "w": jnp.asarray(rng.normal(size=(5, num_outputs)), dtype),
    }
    return params, jnp.asarray(rng.normal(size=(COUNT, 5)) + 1.0, dtype)


def inverse_on_line(params, x, damping, **options):
    """M⁻¹ as a matrix, the bias first, and the state."""

    @jax.jit
    def run(params, x):
        fisher = ngd.linearize_fisher(line, params, x, ngd.Gaussian())
        kronecker = ngd.Kronecker(KEY, **options)
        state = kronecker.init(params)
        precondition, state = kronecker.prepare(fisher, state, damping)
        flat, unravel = ravel_pytree(params)
        eye = jnp.eye(flat.size, dtype=x.dtype)
        return jax.vmap(lambda v: ravel_pytree(precondition(unravel(v)))[0])(eye), state

    return jax.tree.map(np.asarray, run(params, x))


def test_one_layer_with_one_output_is_solved_exactly(dtype, rng):
    params, x = line_problem(rng, dtype, 1)
    inverse, _ = inverse_on_line(params, x, 0.0)
    extended = np.concatenate([np.ones((COUNT, 1)), np.asarray(x, float)], axis=1)
    fisher = extended.T @ extended / COUNT
    rtol = 1e-3 if dtype == "float32" else 1e-10
    np.testing.assert_allclose(inverse @ fisher, np.eye(6), atol=rtol)


@pytest.mark.parametrize(
    ("num_outputs", "max_size"), [(3, 9), (3, 4), (6, 5)], ids=["", "long a", "long δ"]
)
def test_damped_factors_are_the_formula(num_outputs, max_size, dtype, rng):
    params, x = line_problem(rng, dtype, num_outputs)
    inverse, state = inverse_on_line(params, x, 0.1, max_size=max_size)
    extended = np.concatenate([np.ones((COUNT, 1)), np.asarray(x, float)], axis=1)
    a = extended.T @ extended / COUNT
    if max_size < 5:
        mean = extended.mean(0)
        a = np.outer(mean, mean) + np.diag(extended.var(0))
    (averages,) = [one for one in state.averages if one != ()]
    g = np.asarray(averages.columns, float)
    if max_size < num_outputs:
        g = np.diag(g)
    assert g.shape == (num_outputs, num_outputs)
    np.testing.assert_allclose(np.diag(g), 1.0, rtol=1e-5)  # signs are signs
    pi = np.sqrt(np.trace(a) / 6 / (np.trace(g) / num_outputs))
    damped = np.kron(
        a + pi * np.sqrt(0.1) * np.eye(6), g + np.sqrt(0.1) / pi * np.eye(num_outputs)
    )
    tolerance = 1e-4 if dtype == "float32" else 1e-10
    np.testing.assert_allclose(
        inverse @ damped, np.eye(6 * num_outputs), atol=tolerance
    )


def shifted_line(params, x):
    return line(params, x) + params["shift"][None]


@pytest.mark.parametrize("has_shift", [False, True])
def test_an_average_over_many_batches_is_the_mean_fisher(has_shift, x64, rng):
    params, x = line_problem(rng, "float64", 3)
    if has_shift:  # which of the two is the bias cannot be told
        params["shift"] = jnp.ones(3)
    model_fn = shifted_line if has_shift else line

    @jax.jit
    def averaged(params, x):
        kronecker = ngd.Kronecker(KEY, decay=0.9999, refresh_every=10_000)
        fisher = ngd.linearize_fisher(model_fn, params, x, ngd.Categorical())

        def step(state, _):
            return kronecker.prepare(fisher, state, 0.1)[1], None

        return jax.lax.scan(step, kronecker.init(params), None, length=2000)[0]

    state = averaged(params, x)
    assert int(state.num_batches) == 2000
    probabilities = np.asarray(jax.nn.softmax(model_fn(params, x)))
    mean_metric = sum(np.diag(p) - np.outer(p, p) for p in probabilities) / COUNT
    (averages,) = [one for one in state.averages if one != ()]
    np.testing.assert_allclose(averages.columns, mean_metric, atol=6e-3)
    np.testing.assert_allclose(averages.rows, x.T @ x / COUNT, rtol=1e-10)
    mean = 0 if has_shift else x.mean(0)  # of use together with a bias alone
    np.testing.assert_allclose(averages.mean, mean, rtol=1e-10)
    assert not np.any(state.diagonal["w"])
    for name in {"b", "shift"} & params.keys():
        diagonal = np.diag(mean_metric) if has_shift else 0
        np.testing.assert_allclose(state.diagonal[name], diagonal, atol=6e-3)


def test_old_batches_are_forgotten_at_the_rate_of_the_decay(x64, rng):
    params, x = line_problem(rng, "float64", 1)
    kronecker = ngd.Kronecker(KEY, decay=0.75)
    scales = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])

    def step(state, scale):
        fisher = ngd.linearize_fisher(line, params, scale * x, ngd.Gaussian())
        state = kronecker.prepare(fisher, state, 0.1)[1]
        return state, state

    run = jax.jit(lambda state: jax.lax.scan(step, state, jnp.asarray(scales))[1])
    states = run(kronecker.init(params))
    (averages,) = [one for one in states.averages if one != ()]
    expected, mean = [], 0.0
    for k, scale in enumerate(scales, start=1):
        keep = min(1 - 1 / k, 0.75)
        mean = keep * mean + (1 - keep) * scale**2
        expected.append(mean)
    size = np.asarray(x.T @ x / COUNT)
    np.testing.assert_allclose(averages.rows[:, 0, 0], np.array(expected) * size[0, 0])


@pytest.mark.parametrize(
    ("refresh_every", "expected"),
    [
        (1, list(range(1, 21))),
        (2, [1, 2, 3, 5, 7, 9, 11, 13, 15, 17, 19]),
        (5, [1, 2, 3, 5, 8, 12, 17]),
        (100, [1, 2, 3, 5, 8, 12, 18]),
    ],
)
def test_inverses_come_when_the_averages_have_changed(refresh_every, expected, rng):
    params, x = line_problem(rng, "float32", 1)
    kronecker = ngd.Kronecker(KEY, refresh_every=refresh_every)

    def step(state, scale):
        fisher = ngd.linearize_fisher(line, params, scale * x, ngd.Gaussian())
        state = kronecker.prepare(fisher, state, 0.1)[1]
        return state, state

    run = jax.jit(lambda state, scales: jax.lax.scan(step, state, scales)[1])
    start = kronecker.init(params)
    states = run(start, jnp.linspace(1, 2, 20))
    np.testing.assert_array_equal(1 + np.flatnonzero(states.age == 1), expected)
    old, new = (
        next(one.rows for one in state.inverses if one != ())
        for state in (start, states)
    )
    changes = np.diff(np.concatenate([old[None], new]), axis=0)
    has_changed = np.abs(changes).max((1, 2)) > 0
    np.testing.assert_array_equal(1 + np.flatnonzero(has_changed), expected)


@pytest.mark.parametrize("max_size", [2, 4096])
def test_symmetric_positive_definite_whatever_is_factored(max_size, rng, x64):
    params, x, _ = network_problem(rng)
    kronecker = ngd.Kronecker(KEY, max_size=max_size)
    inverse = dense(jax.jit(kronecker(linearize(params, x), 0.1)), params)
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-10 * np.abs(inverse).max())
    values = np.linalg.eigvalsh(inverse)
    assert 0 < values[0] <= values[-1] <= 1 / 0.1 * 1.0001


@functools.partial(jax.jit, static_argnames="refresh_every")
def with_trouble(params, x, is_sick, refresh_every):
    kronecker = ngd.Kronecker(KEY, refresh_every=refresh_every)

    def step(state, is_sick):
        batch = jnp.where(is_sick, jnp.nan, 1.0).astype(x.dtype) * x
        state = kronecker.prepare(linearize(params, batch), state, 0.1)[1]
        return state, state

    return jax.lax.scan(step, kronecker.init(params), is_sick)[1]


def test_batches_that_are_not_finite_are_not_counted(rng):
    params, x, _ = network_problem(rng, "float32")
    states = with_trouble(params, x, jnp.asarray([True, False, True, False]), 2)
    np.testing.assert_array_equal(states.num_batches, [0, 1, 1, 2])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(states))


def test_networks_under_vmap_are_those_of_each(rng):
    x = jnp.asarray(rng.normal(size=(COUNT, 5)), jnp.float32)
    params = {
        "b": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
        "w": jnp.asarray(rng.normal(size=(3, 5, 2)), jnp.float32),
    }

    def two_steps(params):
        kronecker = ngd.Kronecker(KEY, refresh_every=2)
        fisher = ngd.linearize_fisher(line, params, x, ngd.Categorical())
        state = kronecker.prepare(fisher, kronecker.init(params), 0.1)[1]
        precondition, state = kronecker.prepare(fisher, state, 0.1)
        return precondition(params), state

    together = jax.jit(jax.vmap(two_steps))(params)
    alone = jax.jit(two_steps)
    for k in range(3):
        one = alone(jax.tree.map(lambda leaf, k=k: leaf[k], params))
        jax.tree.map(
            lambda whole, part, k=k: np.testing.assert_allclose(
                whole[k], part, rtol=1e-4, atol=1e-5
            ),
            together,
            one,
        )


def test_complex_parameters_are_left_to_the_diagonal(x64, rng):
    def complex_normal(*shape):
        return jnp.asarray(rng.normal(size=shape) + 1j * rng.normal(size=shape))

    params = {"b": complex_normal(3), "w": complex_normal(4, 3)}
    x = complex_normal(COUNT, 4)

    def log_amplitude(params, x):
        return jnp.sum(jnp.log(jnp.cosh(x @ params["w"] + params["b"][None])), axis=-1)

    @jax.jit
    def run(params, vector):
        kronecker = ngd.Kronecker(KEY)
        fisher = ngd.linearize_fisher(log_amplitude, params, x, ngd.LogAmplitude())
        precondition, state = kronecker.prepare(fisher, kronecker.init(params), 0.01)
        return precondition(vector), state, fisher.diagonal()

    vector = {"b": complex_normal(3), "w": complex_normal(4, 3)}
    image, state, truth = run(params, vector)
    assert state.averages == state.inverses == ((), ())
    sizes = []
    for leaf, diagonal, v in zip(
        *map(jax.tree.leaves, (image, state.diagonal, vector)), strict=True
    ):
        assert diagonal.dtype == jnp.float64
        floored = np.maximum(diagonal, 0.1 * np.mean(diagonal))
        np.testing.assert_allclose(leaf, v / (floored + 0.01), rtol=1e-12)
        sizes.append(float(jnp.sum(diagonal)))
    # A single sample, but of the right size.
    assert 0.3 < sum(sizes) / float(jnp.sum(truth)) < 3


def test_a_rare_unit_does_not_make_it_singular_without_damping():
    # The second column is always zero, and so is its eigenvalue.
    x = jnp.array([[1.0, 0.0], [3.0, 0.0]])
    fisher = ngd.linearize_fisher(
        lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
    )
    image = ngd.Kronecker(KEY)(fisher, 0.0)(jnp.array([[5.0], [1.0]]))
    assert np.isfinite(image).all()
    np.testing.assert_allclose(image[0], 1.0, rtol=1e-4)


def test_first_steps_of_cg_gain_more_with_it(x64, rng):
    # Inputs of very different sizes through two layers.
    sizes = jnp.logspace(-2, 2, 8)
    x = jnp.asarray(rng.normal(size=(200, 8))) * sizes[None]
    params = {
        "first": jnp.asarray(rng.normal(size=(8, 6))) / sizes[:, None],
        "last": jnp.asarray(rng.normal(size=(6, 3))),
    }

    def model_fn(params, x):
        return jnp.tanh(x @ params["first"]) @ params["last"]

    labels = jnp.asarray(rng.integers(3, size=200))

    @jax.jit
    def decreases(params):
        """Of the quadratic model, after some steps, without and with it."""
        fisher = ngd.linearize_fisher(model_fn, params, x, ngd.Categorical())
        cotangents = jax.nn.softmax(fisher.outputs) - jax.nn.one_hot(labels, 3)
        gradient = fisher.pullback(cotangents / 200)

        def decrease(max_steps, preconditioner):
            solver = ngd.CG(max_steps, rtol=0.0, preconditioner=preconditioner)
            d, _ = solver(fisher, gradient, damping=1e-3)
            slope = ngd.tree.vdot(gradient, d)
            square = ngd.tree.vdot(d, d)
            return slope - (fisher.quadratic(d) + 1e-3 * square) / 2

        best = decrease(500, None)
        return [
            [decrease(k, one) / best for k in (1, 3, 10)]
            for one in (None, ngd.Kronecker(KEY))
        ]

    without, with_it = np.asarray(decreases(params))
    assert (with_it > without).all()
    assert with_it[0] > 0.5 > without[2]


def test_arguments_out_of_range_are_named():
    with pytest.raises(ValueError, match="`decay` must be in"):
        ngd.Kronecker(KEY, decay=1.0)
    with pytest.raises(ValueError, match="`refresh_every`"):
        ngd.Kronecker(KEY, refresh_every=0)
    with pytest.raises(ValueError, match="`max_size`"):
        ngd.Kronecker(KEY, max_size=0)
    with pytest.raises(TypeError, match="Kronecker needs `key`"):
        ngd.Kronecker(jnp.zeros(2))
