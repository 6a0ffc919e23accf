"""K-FAC: exact where F is a product, else by its factors; always positive."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from ngd_jax import layers, tree
from ngd_jax.coordinates import random_signs
from ngd_jax.kfac import KFAC, Kronecker, claims, groups
from tests import reference
from tests.marks import float64_is_long, long_unless

COUNT = 12


def linearize(model_fn, params, x, likelihood=None, **options):
    likelihood = ngd.Categorical() if likelihood is None else likelihood
    return ngd.linearize_fisher(model_fn, params, x, likelihood, **options)


def dense(matvec, like):
    """The matrix of a map on trees, float64."""
    flat, unravel = ravel_pytree(like)
    return jax.lax.map(
        lambda row: ravel_pytree(matvec(unravel(row)))[0],
        jnp.eye(flat.size, dtype=flat.dtype),
    )


def normal(rng, *shape, dtype="float64"):
    return jnp.asarray(rng.normal(size=shape), dtype)


def network_problem(rng, dtype="float64"):
    """A small classifier."""
    params = reference.network_params(rng, 3, dtype=dtype)
    return params, normal(rng, 9, 2, dtype=dtype)


# --- One layer, for which the formula is known


def line(params, x):
    return x @ params["w"] + params["b"][None]


def turned_line(params, x):
    return x @ params["w"].T + params["b"][None]


def product(params, x):
    return x @ params["w"]


def turned_product(params, x):
    return x @ params["w"].T


def line_problem(rng, dtype, num_outputs):
    params = {
        "b": normal(rng, num_outputs, dtype=dtype),
        "w": normal(rng, 5, num_outputs, dtype=dtype),
    }
    return params, normal(rng, COUNT, 5, dtype=dtype) + 1


def inverse_of(model_fn, params, x, damping, likelihood=None, steps=1, **options):
    """M⁻¹ as a matrix, and the state after some steps."""

    @jax.jit
    def run(params, x):
        fisher = linearize(model_fn, params, x, likelihood)
        kronecker = Kronecker(**options)
        state = kronecker.init(params)
        for _ in range(steps):
            precondition, state = kronecker.prepare(fisher, state, damping)
        return dense(precondition, params), state

    return jax.tree.map(np.asarray, run(params, x))


def kept(entries, params, place, max_size=2048, split=None):
    """What the averages or the inverses in a state hold of one leaf.

    Arrays of a side are with the row and the column of a bias, which are the last.
    """
    shapes = groups.groups_of(jax.tree.leaves(params), max_size)
    for group, entry in zip(shapes, entries, strict=True):
        start = 0
        for leaf, room, _, count in group.members:
            if leaf == place and not room.is_stack and split in (None, room.split):
                return jax.tree.map(lambda x, k=start: np.asarray(x[k]), entry)
            start += count
    raise AssertionError(f"leaf {place} has nothing")


@float64_is_long
def test_one_layer_with_one_output_is_solved_exactly(dtype, rng):
    params, x = line_problem(rng, dtype, 1)
    inverse, _ = inverse_of(line, params, x, 0.0, ngd.Gaussian())
    extended = np.concatenate([np.ones((COUNT, 1)), np.asarray(x, float)], axis=1)
    fisher = extended.T @ extended / COUNT
    rtol = 1e-3 if dtype == "float32" else 1e-10
    np.testing.assert_allclose(inverse @ fisher, np.eye(6), atol=rtol)


@pytest.mark.parametrize(
    ("num_outputs", "max_size"), [(3, 9), (3, 4), (6, 5)], ids=["", "long a", "long δ"]
)
@float64_is_long
def test_damped_factors_are_the_formula(num_outputs, max_size, dtype, rng):
    params, x = line_problem(rng, dtype, num_outputs)
    inverse, state = inverse_of(line, params, x, 0.1, ngd.Gaussian(), max_size=max_size)
    extended = np.concatenate([np.ones((COUNT, 1)), np.asarray(x, float)], axis=1)
    a = extended.T @ extended / COUNT
    if max_size < 5:
        mean = extended.mean(0)
        a = np.outer(mean, mean) + np.diag(extended.var(0))
    g = kept(state.averages, params, 1, max_size).columns
    if max_size < num_outputs:
        g = np.diag(g.square)
    g = np.asarray(g, float)
    assert g.shape == (num_outputs + 1, num_outputs + 1)
    assert not g[-1].any()
    assert not g[:, -1].any()
    g = g[:-1, :-1]
    np.testing.assert_allclose(np.diag(g), 1.0, rtol=1e-5)  # signs are signs
    damped = damped_product(a, g, 0.1)
    tolerance = 1e-4 if dtype == "float32" else 1e-10
    np.testing.assert_allclose(
        inverse @ damped, np.eye(6 * num_outputs), atol=tolerance
    )


def damped_product(a, g, damping):
    """(A + ε) ⊗ (G + ε'), inputs slowest."""
    m, n = len(a), len(g)
    pi = np.sqrt(np.trace(a) / m / (np.trace(g) / n))
    root = np.sqrt(damping)
    return np.kron(a + pi * root * np.eye(m), g + root / pi * np.eye(n))


@pytest.mark.parametrize(
    "model_fn",
    long_unless([turned_product, line], [product, turned_product, line, turned_line]),
    ids=lambda fn: fn.__name__,
)
def test_a_square_weight_has_its_factors_on_the_right_sides(model_fn, x64, rng):
    # Both orders of the factors fit; only one of them is F. Everything here is built
    # from rows of single examples, and nothing comes from the state.
    params = {"b": normal(rng, 4), "w": normal(rng, 4, 4)}
    x = normal(rng, COUNT, 4) * jnp.asarray([1.0, 2.0, 4.0, 0.5])[None] + 0.3
    has_bias, is_turned = "line" in model_fn.__name__, "turned" in model_fn.__name__
    inverse, _ = inverse_of(model_fn, params, x, 0.1)

    a = np.asarray(x)
    if has_bias:
        a = np.concatenate([a, np.ones((COUNT, 1))], axis=1)
    signs = random_signs(jnp.zeros((COUNT, 4)), 0)
    p = reference.softmax(np.asarray(model_fn(params, x)))
    # The root of diag(p) - p pᵀ whose cotangents are √p (u - √p ⟨√p, u⟩).
    root = np.sqrt(p)
    along = np.einsum("nk,nk->n", root, signs)[:, None]
    delta = root * (np.asarray(signs) - root * along) / np.sqrt(COUNT)
    damped = damped_product(a.T @ a / COUNT, delta.T @ delta, 0.1)
    # To the order of the parameters: b, then w by its rows.
    m, n = a.shape[1], 4
    order = np.arange(m * n).reshape(m, n)
    weight = order[:4].T if is_turned else order[:4]
    order = np.concatenate([order[4:].ravel(), weight.ravel()])
    expected = np.linalg.inv(damped[np.ix_(order, order)])
    if not has_bias:
        inverse = inverse[4:, 4:]
    np.testing.assert_allclose(inverse, expected, rtol=1e-8, atol=1e-10)


def shifted_line(params, x):
    return line(params, x) + params["shift"][None]


@pytest.mark.parametrize("has_shift", long_unless([False], [False, True]))
def test_an_average_over_many_batches_is_the_mean_fisher(has_shift, x64, rng):
    params, x = line_problem(rng, "float64", 3)
    if has_shift:  # which of the two is the bias cannot be told
        params["shift"] = jnp.ones(3)
    model_fn = shifted_line if has_shift else line

    @jax.jit
    def averaged(params, x):
        kronecker = Kronecker(decay=0.9999, refresh_every=10_000)
        fisher = linearize(model_fn, params, x)

        def step(state, _):
            return kronecker.prepare(fisher, state, 0.1)[1], None

        return jax.lax.scan(step, kronecker.init(params), None, length=2000)[0]

    state = averaged(params, x)
    assert int(state.num_batches) == 2000
    probabilities = np.asarray(jax.nn.softmax(model_fn(params, x)))
    mean_metric = sum(np.diag(p) - np.outer(p, p) for p in probabilities) / COUNT
    place = len(params) - 1
    rows, columns = kept(state.averages, params, place)
    np.testing.assert_allclose(columns[:-1, :-1], mean_metric, atol=6e-3)
    np.testing.assert_allclose(rows[:-1, :-1], x.T @ x / COUNT, rtol=1e-10)
    bias = np.zeros(6) if has_shift else [*x.mean(0), 1]
    np.testing.assert_allclose(rows[-1], bias, rtol=1e-10)
    for vector in range(place):
        diagonal = kept(state.averages, params, vector)
        expected = np.diag(mean_metric) if has_shift else 0
        np.testing.assert_allclose(diagonal, expected, atol=6e-3)


def tied(params, x):
    return jnp.tanh(x @ params["w"]) @ params["w"].T


def test_factors_of_gradients_are_partial_traces_of_the_fisher(x64, rng):
    params, x = {"w": normal(rng, 5, 3)}, normal(rng, COUNT, 5)

    @jax.jit
    def averaged(params, x):
        kronecker = Kronecker(decay=0.9999, refresh_every=10_000)
        fisher = linearize(tied, params, x)
        assert claims(fisher) == ["factors from gradients 5 × 3"]

        def step(state, _):
            return kronecker.prepare(fisher, state, 0.1)[1], None

        return jax.lax.scan(step, kronecker.init(params), None, length=4000)[0]

    outputs, jacobian = reference.jacobian(tied, params, x)
    metric = reference.categorical_metric(outputs)
    fisher = reference.fisher_of(metric, jacobian, np.full(COUNT, 1 / COUNT))
    fisher = fisher.reshape(5, 3, 5, 3)
    rows, columns = kept(averaged(params, x).averages, params, 0)
    left, right = np.einsum("ijkj->ik", fisher), np.einsum("ijil->jl", fisher)
    scale = np.trace(left)
    np.testing.assert_allclose(rows[:-1, :-1] / scale, left / scale, atol=2e-2)
    np.testing.assert_allclose(columns[:-1, :-1] / scale, right / scale, atol=2e-2)


def test_factors_of_gradients_are_the_formula(x64, rng):
    params, x = {"w": normal(rng, 5, 3)}, normal(rng, COUNT, 5)
    inverse, state = inverse_of(tied, params, x, 0.1, steps=2)
    rows, columns = kept(state.averages, params, 0)
    left, right = rows[:-1, :-1], columns[:-1, :-1]
    np.testing.assert_allclose(np.trace(left), np.trace(right))
    damped = damped_product(left, right / np.trace(left), 0.1)
    np.testing.assert_allclose(inverse @ damped, np.eye(15), atol=1e-9)


# --- Every matrix has factors


@pytest.mark.long
def test_convolutions_are_split_where_their_inputs_end(x64, rng):
    shapes = [(5, 5, 1, 2), (5, 5, 2, 4), (3, 3, 4, 4)]
    params = [normal(rng, *shape) / 5 for shape in shapes]
    params.append(normal(rng, 3, 4, 3, 3) / 5)

    def model_fn(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        for kernel in params[:3]:
            x = jnp.tanh(
                jax.lax.conv_general_dilated(
                    x, kernel, (2, 2), "SAME", dimension_numbers=numbers
                )
            )
        x = jax.lax.conv(x.transpose(0, 3, 1, 2), params[3], (1, 1), "SAME")
        return x.sum((2, 3))

    x = normal(rng, 4, 8, 8, 1)
    expected = ["25 → 2", "50 → 4", "36 → 4", "36 → 3"]
    expected = [f"convolution patch {sizes}" for sizes in expected]
    assert claims(linearize(model_fn, params, x)) == expected
    _, state = inverse_of(model_fn, params, x, 0.1)
    for place, (param, split) in enumerate(zip(params, (3, 3, 3, 1), strict=True)):
        for other in groups.splits_of(param, 2048):
            pair = kept(state.averages, params, place, split=other)
            assert np.any(pair.rows) == np.any(pair.columns) == (other == split)


@pytest.mark.parametrize(
    ("shape", "splits"),
    [
        ((7,), []),
        ((), []),
        ((0, 3), []),
        ((3, 4), [1]),
        ((1, 4), [1]),
        ((3, 3, 16, 32), [3]),
        ((3, 3, 64, 128), [1, 3]),
        ((64, 4, 16), [1]),
        ((256, 8, 32), [1]),
        ((8, 32, 256), [1, 2]),
    ],
)
def test_state_has_room_for_splits_by_shape_alone(shape, splits):
    assert groups.splits_of(jnp.zeros(shape), 2048) == splits
    assert groups.splits_of(jnp.zeros(shape, complex), 2048) == []


def test_claims_say_what_every_parameter_is_taken_for(rng):
    params = {
        "conv": normal(rng, 3, 3, 1, 4, dtype="float32"),
        "dense": {"b": jnp.zeros(6), "w": normal(rng, 6, 4, dtype="float32")},
        "gain": jnp.ones(6),
        "none": jnp.zeros((0, 3)),
        "table": normal(rng, 6, 5, dtype="float32"),
    }

    def model_fn(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, params["conv"], (2, 2), "SAME", dimension_numbers=numbers
        )
        x = jnp.tanh(x).sum((1, 2)) @ params["dense"]["w"].T + params["dense"]["b"]
        return params["gain"] * x + params["table"].sum(1)

    x = jnp.ones((4, 6, 6, 1))
    assert claims(linearize(model_fn, params, x)) == [
        "convolution patch 9 → 4",
        "bias of ['dense']['w']",
        "dense 4 → 6 with bias ['dense']['b']",
        "diagonal",
        "diagonal",
        "factors from gradients 6 × 5",
    ]


def test_without_layers_all_matrices_have_factors_of_gradients(x64, rng, monkeypatch):
    monkeypatch.setattr(layers.backward, "_understands_jax", lambda: False)
    params, x = network_problem(rng)
    assert claims(linearize(reference.network, params, x)) == [
        "diagonal",
        "factors from gradients 2 × 3",
        "factors from gradients 3 × 3",
        "diagonal",
        "diagonal",
    ]
    inverse, _ = inverse_of(reference.network, params, x, 0.1)
    check_positive(inverse, 1 / 0.1)


# --- Positive for every model


def check_positive(inverse, largest):
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-9 * np.abs(inverse).max())
    values = np.linalg.eigvalsh(inverse)
    assert 0 < values[0] <= values[-1] <= largest * 1.0001


def matrix_step(name, x, params):
    """One of the ways to use a square matrix; `other` and the bias may be shared."""
    w, other, b = params["w"], params["other"], params["b"]
    steps = {
        "product": lambda: x @ w,
        "turned": lambda: x @ w.T + b,
        "bias": lambda: x @ w + b,
        "other": lambda: x @ other + b,
        "sum": lambda: x @ w + x**2 @ other + b,
        "scaled": lambda: x @ (0.5 * w) * params["gain"] + b,
        "scaled by a parameter": lambda: x @ (w * params["gain"][0]),
        "twice": lambda: jnp.tanh(x @ w) @ w,
        "scan": lambda: jax.lax.scan(
            lambda h, _: (jnp.tanh(h @ w + b), None), x, length=2
        )[0],
        "vmap": lambda: jax.vmap(lambda x: w @ x + b)(x),
        "checkpoint": lambda: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x),
        "jit": lambda: jax.jit(lambda w, x: x @ w.T)(w, x),
        "row": lambda: x @ params["row"] * params["row"].T,
        "table": lambda: x + other[jnp.argmax(x, axis=-1)],
        "kernel": lambda: jax.lax.conv_general_dilated(
            x[:, None, :],
            params["kernel"],
            (1,),
            "SAME",
            None,
            None,
            ("NCH", "OIH", "NCH"),
        ).sum(1),
    }
    return jnp.tanh(steps[name]())


STEPS = [
    "bias",
    "checkpoint",
    "jit",
    "kernel",
    "other",
    "product",
    "row",
    "scaled",
    "scaled by a parameter",
    "scan",
    "sum",
    "table",
    "turned",
    "twice",
    "vmap",
]


@pytest.mark.long
@hypothesis.given(
    names=st.lists(st.sampled_from(STEPS), min_size=1, max_size=3),
    has_scales=st.booleans(),
    max_size=st.sampled_from([2, 3, 99]),
    seed=st.integers(0, 99),
)
@hypothesis.settings(max_examples=12)
def test_symmetric_positive_definite_for_every_model(names, has_scales, max_size, seed):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        params = {
            "b": normal(rng, 3),
            "gain": normal(rng, 3),
            "kernel": normal(rng, 2, 1, 3),
            "none": jnp.zeros((0, 2)),
            "other": normal(rng, 3, 3),
            "row": normal(rng, 3, 1),
            "w": normal(rng, 3, 3),
        }
        scales = jax.tree.map(lambda leaf: jnp.exp(leaf / 2), params)

        @jax.jit
        def run(params, x):
            def model_fn(params, x):
                for name in names:
                    x = matrix_step(name, x, params)
                return x

            fisher = linearize(model_fn, params, x)
            if has_scales:
                fisher = fisher.in_coordinates(
                    lambda v: jax.tree.map(jnp.multiply, v, scales), scales
                )
            kronecker = Kronecker(max_size=max_size)
            state = kronecker.init(params)
            state = kronecker.prepare(fisher, state, 0.1)[1]
            return dense(kronecker.prepare(fisher, state, 0.1)[0], params)

        inverse = np.asarray(run(params, normal(rng, 6, 3)))
        # In other coordinates λ is that of the mean scale of a block.
        check_positive(inverse, 1e3 if has_scales else 1 / 0.1)


def test_a_rare_unit_does_not_make_it_singular_without_damping():
    # The second column is always zero, and so is its eigenvalue.
    x = jnp.array([[1.0, 0.0], [3.0, 0.0]])
    fisher = linearize(lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian())
    image = Kronecker()(fisher, 0.0)(jnp.array([[5.0], [1.0]]))
    assert np.isfinite(image).all()
    np.testing.assert_allclose(image[0], 1.0, rtol=1e-4)


def test_a_parameter_that_is_not_used_does_not_stop_the_others(x64, rng):
    params = {"unused": normal(rng, 3, 3), "w": normal(rng, 5, 1)}
    x = normal(rng, COUNT, 5)
    inverse, _ = inverse_of(product, params, x, 0.0, ngd.Gaussian())
    np.testing.assert_allclose(
        inverse[9:, 9:] @ (x.T @ x / COUNT), np.eye(5), atol=1e-9
    )


# --- Coordinates


def test_scales_of_one_change_nothing(x64, rng):
    params, x = network_problem(rng)
    ones = jax.tree.map(jnp.ones_like, params)
    vector = jax.tree.map(lambda leaf: normal(rng, *leaf.shape), params)

    @jax.jit
    def run(params):
        fisher = linearize(reference.network, params, x)
        scaled = fisher.in_coordinates(lambda v: v, ones)
        assert claims(fisher) == claims(scaled)
        return [Kronecker()(one, 0.1)(vector) for one in (fisher, scaled)]

    one, other = run(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), one, other)


def test_blocks_in_other_coordinates_are_those_of_scaled_parameters(x64, rng):
    params, x = network_problem(rng)
    scales = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3.0), params)
    vector = jax.tree.map(lambda leaf: normal(rng, *leaf.shape), params)

    @jax.jit
    def run(params):
        fisher = linearize(reference.network, params, x)
        scaled = fisher.in_coordinates(lambda v: tree.scale(3.0, v), scales)
        return Kronecker()(fisher, 0.1 / 9)(vector), Kronecker()(scaled, 0.1)(vector)

    one, other = run(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 9 * b, rtol=1e-10), one, other
    )


# --- State


@pytest.mark.long
def test_old_batches_are_forgotten_at_the_rate_of_the_decay(x64, rng):
    params, x = line_problem(rng, "float64", 1)
    kronecker = Kronecker(decay=0.75, observe_every=1)
    scales = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])

    def step(state, scale):
        fisher = linearize(line, params, scale * x, ngd.Gaussian())
        state = kronecker.prepare(fisher, state, 0.1)[1]
        return state, state

    run = jax.jit(lambda state: jax.lax.scan(step, state, jnp.asarray(scales))[1])
    averages = run(kronecker.init(params)).averages
    averages = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), averages)
    rows, _ = kept(averages, params, 1)
    expected, mean = [], 0.0
    for k, scale in enumerate(scales, start=1):
        keep = min(1 - 1 / k, 0.75)
        mean = keep * mean + (1 - keep) * scale**2
        expected.append(mean)
    size = np.asarray(x.T @ x / COUNT)
    np.testing.assert_allclose(rows[:, 0, 0], np.array(expected) * size[0, 0])


@pytest.mark.long
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
    kronecker = Kronecker(refresh_every=refresh_every)

    def step(state, scale):
        fisher = linearize(line, params, scale * x, ngd.Gaussian())
        state = kronecker.prepare(fisher, state, 0.1)[1]
        return state, state

    run = jax.jit(lambda state, scales: jax.lax.scan(step, state, scales)[1])
    start = kronecker.init(params)
    states = run(start, jnp.linspace(1, 2, 20))
    np.testing.assert_array_equal(1 + np.flatnonzero(states.age == 1), expected)
    old = kept(start.inverses, params, 1).rows
    new = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), states.inverses)
    new = kept(new, params, 1).rows
    changes = np.diff(np.concatenate([old[None], new]), axis=0)
    has_changed = np.abs(changes).max((1, 2)) > 0
    np.testing.assert_array_equal(1 + np.flatnonzero(has_changed), expected)


def test_a_long_memory_is_fed_with_some_of_the_batches(rng):
    params, x = line_problem(rng, "float32", 1)
    kronecker = Kronecker(decay=0.75, refresh_every=4, observe_every=2)

    def step(state, scale):
        fisher = linearize(line, params, scale * x, ngd.Gaussian())
        state = kronecker.prepare(fisher, state, 0.1)[1]
        return state, state

    run = jax.jit(lambda state, scales: jax.lax.scan(step, state, scales)[1])
    states = run(kronecker.init(params), jnp.linspace(1, 2, 16))
    # Four batches make 1 / (1 - decay); then one in two, an inverse from one in two.
    observed = np.diff(np.concatenate([[0], states.num_batches])) > 0
    refreshed = np.asarray(states.age == 1)
    assert observed[:4].all()
    assert 5 <= observed[4:].sum() <= 7
    assert not (observed[5:] & observed[4:-1]).any()
    assert (refreshed <= observed)[4:].all()
    assert 3 <= refreshed[4:].sum() <= 6
    leaf = kept(
        jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), states.averages), params, 1
    )
    changes = np.abs(np.diff(leaf.rows, axis=0)).max((1, 2)) > 0
    np.testing.assert_array_equal(changes, observed[1:])


@functools.partial(jax.jit, static_argnames="refresh_every")
def with_trouble(params, x, is_sick, refresh_every):
    kronecker = Kronecker(refresh_every=refresh_every)

    def step(state, is_sick):
        batch = jnp.where(is_sick, jnp.nan, 1.0).astype(x.dtype) * x
        fisher = linearize(reference.network, params, batch)
        state = kronecker.prepare(fisher, state, 0.1)[1]
        return state, state

    return jax.lax.scan(step, kronecker.init(params), is_sick)[1]


def test_batches_that_are_not_finite_are_not_counted(rng):
    params, x = network_problem(rng, "float32")
    states = with_trouble(params, x, jnp.asarray([True, False, True, False]), 2)
    np.testing.assert_array_equal(states.num_batches, [0, 1, 1, 2])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(states))


def test_no_two_leaves_of_a_fresh_state_share_a_buffer(rng):
    params, x = network_problem(rng, "float32")
    state = Kronecker().init(params)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        fisher = linearize(reference.network, params, x)
        return Kronecker().prepare(fisher, state, 0.1)[1]

    assert int(step(state).num_batches) == 1


def test_a_tree_without_leaves_has_a_state():
    kronecker = Kronecker()
    assert jax.tree.leaves(kronecker.init({}))
    fisher = linearize(lambda _, x: x, {}, jnp.ones((4, 2)))
    precondition, _ = kronecker.prepare(fisher, kronecker.init({}), 0.1)
    assert precondition({}) == {}


@pytest.mark.long
def test_networks_under_vmap_are_those_of_each(rng):
    x = normal(rng, COUNT, 5, dtype="float32")
    params = {
        "b": normal(rng, 3, 2, dtype="float32"),
        "w": normal(rng, 3, 5, 2, dtype="float32"),
    }

    def two_steps(params):
        kronecker = Kronecker(refresh_every=2)
        fisher = linearize(line, params, x)
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


@pytest.mark.parametrize(
    "model_fn", long_unless([reference.network], [reference.network, tied])
)
def test_microbatches_have_the_same_factors_of_layers(model_fn, x64, rng):
    params, x = network_problem(rng)
    if model_fn is tied:
        params = {"w": normal(rng, 2, 3)}

    @jax.jit
    def states(params, x):
        kronecker = Kronecker()
        return [
            kronecker.prepare(
                linearize(model_fn, params, x, **options), kronecker.init(params), 0.1
            )[1]
            for options in ({}, {"microbatch_size": 4})
        ]

    whole, parts = states(params, x)
    if model_fn is tied:  # a sum of squares of other samples
        rows = [kept(one.averages, params, 0).rows for one in (whole, parts)]
        assert 0.2 < np.trace(rows[0]) / np.trace(rows[1]) < 5
        return
    for place, leaf in enumerate(jax.tree.leaves(params)):
        if leaf.ndim == 2:
            pairs = [kept(one.averages, params, place) for one in (whole, parts)]
            chex.assert_trees_all_close(*pairs, rtol=1e-10)


def test_complex_parameters_are_left_to_the_diagonal(x64, rng):
    def complex_normal(*shape):
        return jnp.asarray(rng.normal(size=shape) + 1j * rng.normal(size=shape))

    params = {"b": complex_normal(3), "w": complex_normal(4, 3)}
    x = complex_normal(COUNT, 4)

    def log_amplitude(params, x):
        return jnp.sum(jnp.log(jnp.cosh(x @ params["w"] + params["b"][None])), axis=-1)

    @jax.jit
    def run(params, vector):
        kronecker = Kronecker()
        fisher = linearize(log_amplitude, params, x, ngd.LogAmplitude())
        precondition, state = kronecker.prepare(fisher, kronecker.init(params), 0.01)
        return precondition(vector), state

    vector = {"b": complex_normal(3), "w": complex_normal(4, 3)}
    image, state = run(params, vector)
    assert state.inverses == ((), ())
    # F by plain NumPy; one number serves for both parts of an entry.
    _, jacobian = reference.jacobian(log_amplitude, params, x)
    fisher = reference.covariance_of(jacobian, np.full(COUNT, 1 / COUNT))
    truth = np.diag(fisher).real
    sizes = 0.0
    for place, (leaf, v) in enumerate(
        zip(jax.tree.leaves(image), jax.tree.leaves(vector), strict=True)
    ):
        diagonal = kept(state.averages, params, place).reshape(v.shape)
        assert diagonal.dtype == jnp.float64
        floored = np.maximum(diagonal, 0.1 * np.mean(diagonal))
        np.testing.assert_allclose(leaf, v / (floored + 0.01), rtol=1e-12)
        sizes += float(jnp.sum(diagonal))
    # A single sample, but of the right size.
    assert 0.1 < sizes / truth.sum() < 5


# --- As a preconditioner, and as a solver


@pytest.mark.long
def test_first_steps_of_cg_gain_more_with_it(x64, rng):
    # Inputs of very different sizes, through two layers.
    sizes = jnp.logspace(-2, 2, 8)
    x = normal(rng, 200, 8) * sizes[None]
    params = {
        "first": normal(rng, 8, 6) / sizes[:, None],
        "last": normal(rng, 6, 3),
    }

    def model_fn(params, x):
        return jnp.tanh(x @ params["first"]) @ params["last"]

    labels = jnp.asarray(rng.integers(3, size=200))

    @jax.jit
    def decreases(params):
        """Of the quadratic model, after some steps, without and with it."""
        fisher = linearize(model_fn, params, x)
        cotangents = jax.nn.softmax(fisher.outputs) - jax.nn.one_hot(labels, 3)
        gradient = fisher.pullback(cotangents / 200)

        def decrease(max_steps, preconditioner):
            solver = ngd.CG(max_steps, rtol=0.0, preconditioner=preconditioner)
            d, _ = solver(fisher, gradient, damping=1e-3)
            slope, square = tree.vdot(gradient, d), tree.vdot(d, d)
            return slope - (fisher.quadratic(d) + 1e-3 * square) / 2

        best = decrease(500, None)
        return [
            [decrease(k, one) / best for k in (1, 3, 10)] for one in (None, Kronecker())
        ]

    without, with_it = np.asarray(decreases(params))
    assert (with_it > without).all()
    assert with_it[0] > 0.5 > without[2]


def solver_problem(rng, dtype="float64"):
    params, x = network_problem(rng, dtype)
    outputs, jacobian = reference.jacobian(reference.network, params, x)
    fisher = reference.fisher_of(
        reference.categorical_metric(outputs), jacobian, np.full(9, 1 / 9)
    )
    rhs = jax.tree.map(lambda leaf: normal(rng, *leaf.shape, dtype=dtype), params)
    return params, x, fisher + 1e-2 * np.eye(len(fisher)), rhs


def solve(solver, params, x, gradient, guess=None, damping=1e-2, model_fn=None):
    model_fn = reference.network if model_fn is None else model_fn

    @jax.jit
    def run(params, x, gradient, guess):
        rhs = ngd.RightHandSide(tree.widen(gradient), guess=guess)
        return ngd.solve_scaled(
            solver,
            linearize(model_fn, params, x),
            rhs,
            damping=damping,
            state=solver.init(params),
        )

    return run(params, x, gradient, guess)


@float64_is_long
def test_direction_is_that_of_one_step_of_cg(dtype, rng):
    params, x, _, gradient = solver_problem(rng, dtype)
    found = solve(KFAC(), params, x, gradient)
    cg = ngd.CG(max_steps=1, rtol=0.0, preconditioner=Kronecker())
    expected = solve(cg, params, x, gradient)
    rtol = 1e-4 if dtype == "float32" else 1e-10
    one, other = reference.flat(found.direction), reference.flat(expected.direction)
    np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * np.abs(other).max())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        found.state,
        expected.state,
    )
    assert int(found.info.num_steps) == 1
    assert int(found.info.status) == ngd.SolverStatus.UNCHECKED
    assert float(found.info.relative_residual) == np.inf
    assert found.info.relative_residual.dtype == dtype


def test_exact_length_minimises_the_quadratic_model(x64, rng):
    params, x, matrix, gradient = solver_problem(rng)
    d, g = reference.flat(solve(KFAC(), params, x, gradient).direction), gradient
    g = reference.flat(g)
    assert abs(d @ (matrix @ d - g)) <= 1e-10 * abs(d @ g)


def test_without_a_length_it_is_the_inverse_itself(x64, rng):
    params, x, _, gradient = solver_problem(rng)
    solution = solve(KFAC(exact_length=False), params, x, gradient)
    inverse, _ = inverse_of(reference.network, params, x, 1e-2)
    np.testing.assert_allclose(
        reference.flat(solution.direction),
        inverse @ reference.flat(gradient),
        rtol=1e-9,
        atol=1e-12,
    )
    assert solution.pushed is None
    assert int(solution.info.status) == ngd.SolverStatus.UNCHECKED


@pytest.mark.parametrize("has_guess", long_unless([False], [False, True]))
def test_pushed_is_the_change_of_the_outputs(has_guess, x64, rng):
    params, x, _, gradient = solver_problem(rng)
    guess = jax.tree.map(lambda leaf: leaf / 3, gradient) if has_guess else None
    solution = solve(KFAC(), params, x, gradient, guess)
    _, jacobian = reference.jacobian(reference.network, params, x)
    expected = np.einsum("nkp,p->nk", jacobian, reference.flat(solution.direction))
    np.testing.assert_allclose(solution.pushed, expected, rtol=1e-9, atol=1e-12)
    largest = np.max(np.abs(reference.flat(solution.direction)))
    np.testing.assert_allclose(solution.largest, largest, rtol=1e-14)


@pytest.mark.long
@pytest.mark.parametrize("exact_length", [True, False])
def test_the_best_multiple_of_a_guess_is_improved(exact_length, x64, rng):
    params, x, matrix, gradient = solver_problem(rng)
    g = reference.flat(gradient)
    truth = np.linalg.solve(matrix, g)
    # From any multiple of the solution there is nowhere to go.
    guess = reference.unflat(-7 * truth, gradient)
    solver = KFAC(exact_length=exact_length)
    solution = solve(solver, params, x, gradient, guess)
    np.testing.assert_allclose(reference.flat(solution.direction), truth, rtol=1e-9)
    # From elsewhere the step is that of the system for the rest.
    start = truth + rng.normal(size=len(truth))
    start *= g @ start / (start @ matrix @ start)
    rest = reference.unflat(g - matrix @ start, gradient)
    guess = reference.unflat(3 * start, gradient)
    solution = solve(solver, params, x, gradient, guess)
    step = reference.flat(solve(solver, params, x, rest).direction)
    np.testing.assert_allclose(
        reference.flat(solution.direction), start + step, rtol=1e-8
    )


@pytest.mark.parametrize("exponent", long_unless([-35], [-35, 35]))
def test_the_size_of_the_right_hand_side_does_not_matter(exponent, rng):
    params, x, _, gradient = solver_problem(rng, "float32")
    scale = np.float32(10.0**exponent)
    near = solve(KFAC(), params, x, gradient)
    far = solve(KFAC(), params, x, jax.tree.map(lambda leaf: leaf * scale, gradient))
    assert int(near.info.status) == int(far.info.status) == ngd.SolverStatus.UNCHECKED
    one, other = reference.flat(near.direction), reference.flat(far.direction) / scale
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize("exact_length", long_unless([True], [True, False]))
@pytest.mark.parametrize("where", ["right-hand side", "model", "nowhere"])
def test_what_is_not_finite_gives_zero_and_says_so(where, exact_length, rng):
    params, x, _, gradient = solver_problem(rng, "float32")
    if where == "right-hand side":
        gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), gradient)
    elif where == "model":
        x = x.at[0].set(jnp.nan)
    else:
        gradient = jax.tree.map(jnp.zeros_like, gradient)
    solution = solve(KFAC(exact_length=exact_length), params, x, gradient)
    assert np.isfinite(reference.flat(solution.state)).all()
    assert np.isfinite(reference.flat(solution.direction)).all()
    if where == "model" and not exact_length:
        return  # nothing was asked of the model, and the factors keep what they had
    assert not reference.flat(solution.direction).any()
    status = (
        ngd.SolverStatus.CONVERGED
        if where == "nowhere"
        else ngd.SolverStatus.NON_FINITE
    )
    assert int(solution.info.status) == status
    assert float(solution.info.relative_residual) == (where != "nowhere")


def test_a_direction_without_curvature_is_a_breakdown(rng):
    params, x, _, gradient = solver_problem(rng, "float32")
    ignoring = lambda _, x: x  # noqa: E731
    solution = solve(KFAC(), params, x, gradient, damping=0.0, model_fn=ignoring)
    assert not reference.flat(solution.direction).any()
    assert int(solution.info.status) == ngd.SolverStatus.BREAKDOWN


def test_arguments_out_of_range_are_named():
    for make in (Kronecker, KFAC):
        with pytest.raises(ValueError, match="`decay` must be in"):
            make(decay=1.0)
        with pytest.raises(ValueError, match="`refresh_every`"):
            make(refresh_every=0)
        with pytest.raises(ValueError, match="`max_size`"):
            make(max_size=0)


def test_a_state_of_other_parameters_is_not_divided_anew(rng):
    params, _ = network_problem(rng, "float32")
    other = reference.network_params(rng, 3, num_hidden=9)
    with pytest.raises(ValueError, match="`state` must be that of these parameters"):
        KFAC().redivide(Kronecker().init(other), params)
