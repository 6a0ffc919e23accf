"""Layers found in a program, compared with the gradients of single examples.

Where x W + b is all that a weight and a bias are used for, the gradient of the bias at
an example is δ, and that of the weight a ⊗ δ: both by `jax.grad`, example by example.
"""

import warnings

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.tasks.supervised.convolution import convolve
from ngd_jax.jacobian import linearize
from ngd_jax.layers import (
    Layer,
    Wanted,
    backward,
    check_partition,
    programs,
    read_backward,
)
from tests.marks import long_unless

COUNT = 11


def backward_pass(pull, cotangents, params):
    """All layers outside of loops, the values of each, and `pull(cotangents)`."""
    read = read_backward(pull, cotangents, params)
    found = [one for one in read.layers if not one.in_loop]
    wanted = [Wanted(one.weight, one, lambda values: values) for one in found]
    leaves, structure = jax.tree.flatten(params)
    wanted += [Wanted(place, None, lambda x: x) for place in range(len(leaves))]
    results = read.evaluate(wanted)
    values, gradients = results[: len(found)], results[len(found) :]
    return found, values, jax.tree.unflatten(structure, gradients)


def evaluate(model_fn, params, x):
    """Layers; values, gradients and cotangents as arrays; the true gradients too."""
    found = []

    @jax.jit
    def run(params, x):
        linearization = linearize(model_fn, params, x)
        outputs = linearization.outputs
        cotangents = jax.random.normal(jax.random.key(9), outputs.shape, outputs.dtype)
        found[:], values, gradients = backward_pass(
            linearization.pull, cotangents, params
        )
        return values, gradients, linearization.pull(cotangents), cotangents

    return (found, *run(params, x))


def single_gradients(model_fn, params, x, cotangents):
    """Of every leaf at every example, `[N, *shape]`."""

    def score(params, x, cotangent):
        return jnp.sum(model_fn(params, x[None])[0] * cotangent)

    @jax.jit
    def rows(params, x, cotangents):
        # Not all of the models may be vmapped.
        return jax.lax.map(lambda one: jax.grad(score)(params, *one), (x, cotangents))

    leaves = jax.tree.leaves(rows(params, x, cotangents))
    return [np.asarray(leaf, float) for leaf in leaves]


def check_values(found, values, gradients, truth):
    """The terms add up to the gradients of the weight and of the bias."""
    gradients, truth = jax.tree.leaves(gradients), jax.tree.leaves(truth)
    for gradient, expected in zip(gradients, truth, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-10)
    for layer, (a, delta) in zip(found, values, strict=True):
        assert a.shape == (len(delta), layer.num_inputs)
        assert delta.shape[1] == layer.num_outputs
        expected = truth[layer.weight]
        first = np.prod(expected.shape[: layer.split], dtype=int)
        total = np.asarray(a).T @ np.asarray(delta)
        total = total if layer.inputs_first else total.T
        assert total.shape[0] == first
        np.testing.assert_allclose(total, expected.reshape(total.shape), atol=1e-10)
        if layer.bias is not None:
            expected = truth[layer.bias].ravel()
            np.testing.assert_allclose(delta.sum(0), expected, atol=1e-10)


# --- Which layers are found


class Network(linen.Module):
    """Two dense layers with a bias, one without."""

    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Dense(7, param_dtype=x.dtype)(x))
        x = jnp.tanh(linen.Dense(5, use_bias=False, param_dtype=x.dtype)(x))
        return linen.Dense(4, param_dtype=x.dtype)(x)


def linen_case(x):
    network = Network()
    params = network.init(jax.random.key(1), x)["params"]
    return lambda params, x: network.apply({"params": params}, x), params


def nnx_case(x):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 7, param_dtype=x.dtype, rngs=rngs)
            self.last = nnx.Linear(7, 4, param_dtype=x.dtype, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))

    graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    return lambda params, x: nnx.merge(graph, params)(x), params


def plain_case(x):
    keys = jax.random.split(jax.random.key(2), 2)
    params = [
        {"w": jax.random.normal(keys[0], (7, 6), x.dtype), "b": jnp.ones(7, x.dtype)},
        {"w": jax.random.normal(keys[1], (4, 7), x.dtype)},
    ]

    def model_fn(params, x):
        hidden = jnp.tanh(x @ params[0]["w"].T + params[0]["b"])
        return jnp.einsum("nj,ij->ni", hidden, params[1]["w"])

    return model_fn, params


def split_axes_case(x):
    """A projection to heads, as attention has it, whose bias has two axes."""
    network = linen.Sequential(
        [
            linen.DenseGeneral((2, 3), param_dtype=x.dtype),
            jnp.tanh,
            linen.DenseGeneral(4, axis=(-2, -1), param_dtype=x.dtype),
        ]
    )
    params = network.init(jax.random.key(1), x)["params"]
    return lambda params, x: network.apply({"params": params}, x), params


def row_bias_case(x):
    params = {"b": jnp.ones((1, 4), x.dtype), "w": jnp.ones((6, 4), x.dtype)}
    return lambda params, x: jnp.tanh(x @ params["w"] + params["b"]), params


def vmapped_case(x):
    model_fn, params = plain_case(x)
    return lambda p, x: jax.vmap(lambda x: model_fn(p, x[None])[0])(x), params


def nested_case(x):
    model_fn, params = plain_case(x)
    return jax.checkpoint(jax.jit(jax.checkpoint(jax.jit(model_fn)))), params


def as_layers(case):
    return [(one.weight, one.bias, one.inputs_first, one.split) for one in case]


CASES = {  # with the weights, their biases, whether inputs come first, and the split
    "linen": (linen_case, [(1, 0, True, 1), (2, None, True, 1), (4, 3, True, 1)]),
    "nnx": (nnx_case, [(1, 0, True, 1), (3, 2, True, 1)]),
    "outputs first": (plain_case, [(1, 0, False, 1), (2, None, False, 1)]),
    "split axes": (split_axes_case, [(1, 0, True, 1), (3, 2, True, 2)]),
    "row bias": (row_bias_case, [(1, 0, True, 1)]),
    "vmap": (vmapped_case, [(1, 0, False, 1), (2, None, False, 1)]),
    "nested": (nested_case, [(1, 0, False, 1), (2, None, False, 1)]),
}


@pytest.mark.parametrize(
    "case", long_unless(CASES.keys() - {"linen", "split axes"}, CASES.keys())
)
def test_values_are_those_of_single_examples(case, x64, rng):
    make, expected = CASES[case]
    x = jnp.asarray(rng.normal(size=(COUNT, 6)) + 0.5)
    model_fn, params = make(x)
    found, values, gradients, truth, cotangents = evaluate(model_fn, params, x)
    assert as_layers(found) == expected
    check_values(found, values, gradients, truth)
    rows = single_gradients(model_fn, params, x, cotangents)
    for layer, (a, delta) in zip(found, values, strict=True):
        m, n = layer.num_inputs, layer.num_outputs
        products = np.einsum("ti,tj->tij", a, delta)
        if not layer.inputs_first:
            products = products.swapaxes(1, 2)
        expected = rows[layer.weight].reshape(products.shape)
        assert products.shape == (COUNT, *((m, n) if layer.inputs_first else (n, m)))
        np.testing.assert_allclose(products, expected, rtol=1e-9, atol=1e-12)
        if layer.bias is not None:
            expected = rows[layer.bias].reshape(delta.shape)
            np.testing.assert_allclose(delta, expected, rtol=1e-9, atol=1e-12)


def test_places_of_a_sequence_follow_their_example(x64, rng):
    x = jnp.asarray(rng.normal(size=(COUNT, 3, 6)))
    w = jnp.asarray(rng.normal(size=(6, 4)))
    found, ((a, delta),), *_, cotangents = evaluate(lambda w, x: x @ w, w, x)
    assert [one.weight for one in found] == [0]
    np.testing.assert_allclose(a, x.reshape(-1, 6))
    np.testing.assert_allclose(delta, cotangents.reshape(-1, 4))


def test_one_example_is_enough_to_find_a_bias(x64, rng):
    x = jnp.asarray(rng.normal(size=(1, 6)))
    found, *_ = evaluate(*nnx_case(x), x)
    assert [(one.weight, one.bias) for one in found] == [(1, 0), (3, 2)]


def dense(params, x):
    return x @ params["w"][0]


def transposed(params, x):
    return dense(params, x).swapaxes(1, 2)


def convolved(params, x):
    numbers = ("NHC", "HIO", "NHC")
    kernel = params["w"]
    return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", None, None, numbers)


def split_and_joined(params, x):
    return dense(params, x).reshape(COUNT, 2, 2, 2, 2).reshape(COUNT, 4, 4)


@pytest.mark.parametrize(
    ("layer", "output_axis"),
    [(dense, 2), (transposed, 1), (convolved, 2), (split_and_joined, 2)],
)
@pytest.mark.parametrize("bias_axis", [1, 2])
def test_a_bias_of_places_is_not_that_of_the_outputs(layer, output_axis, bias_axis):
    # As many places as outputs: sizes do not tell which axis the bias is added along.
    shape = (1, 4, 1) if bias_axis == 1 else (1, 1, 4)
    params = {"b": jnp.zeros(4), "w": jnp.zeros((1, 6, 4))}
    x = jnp.zeros((COUNT, 4, 6))

    def model_fn(params, x):
        return jnp.tanh(layer(params, x) + params["b"].reshape(shape))

    found, *_ = evaluate(model_fn, params, x)
    bias = 0 if bias_axis == output_axis else None
    assert [(one.weight, one.bias) for one in found] == [(1, bias)]


def two_inputs(params, x):
    hidden = x @ params["square"] + x**2 @ params["other"] + params["b"]
    return jnp.tanh(hidden)


def two_biases(params, x):
    return jnp.tanh(x @ params["square"] + params["b"] + params["scale"].ravel())


@pytest.mark.parametrize("model_fn", [two_inputs, two_biases])
def test_who_owns_a_shared_bias_is_not_guessed(model_fn, x64, rng):
    params = {
        "b": jnp.ones(4),
        "other": jnp.asarray(rng.normal(size=(4, 4))),
        "scale": jnp.ones((4, 1)),
        "square": jnp.asarray(rng.normal(size=(4, 4))),
    }
    x = jnp.asarray(rng.normal(size=(COUNT, 4)))
    found, values, gradients, truth, _ = evaluate(model_fn, params, x)
    assert {one.weight for one in found} == ({1, 3} if model_fn is two_inputs else {3})
    assert {one.bias for one in found} == {None}
    check_values(found, values, gradients, truth)


def test_weights_that_are_added_are_two_layers(x64, rng):
    params = {"u": jnp.ones((4, 4)), "w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    x = jnp.asarray(rng.normal(size=(COUNT, 4)))

    def model_fn(params, x):
        return jnp.tanh(x @ (params["u"] + params["w"]) + params["b"])

    found, *rest, _ = evaluate(model_fn, params, x)
    assert [(one.weight, one.bias) for one in found] == [(1, None), (2, None)]
    check_values(found, *rest)


def test_biases_of_equal_size_go_with_their_own_weights(x64, rng):
    params = {
        "b": [jnp.ones(3), jnp.ones(3)],
        "w": [jnp.asarray(rng.normal(size=(3, 3))) for _ in range(2)],
    }

    def model_fn(params, x):
        hidden = jnp.tanh(x @ params["w"][1] + params["b"][0])
        return hidden @ params["w"][0] + params["b"][1]

    x = jnp.asarray(rng.normal(size=(COUNT, 3)))
    found, *_ = evaluate(model_fn, params, x)
    assert [(one.weight, one.bias) for one in found] == [(2, 1), (3, 0)]


def used_twice(params, x):
    return jnp.tanh(x @ params["square"]) @ params["square"]


def scaled_by_parameters(params, x):
    return x @ (params["square"] * params["scale"])


def looked_up(params, x):
    return params["square"][jnp.argmax(x, axis=-1)]


def complex_valued(params, x):
    weight = params["square"] + 0j
    return jnp.real((x + 1j * x**2) @ weight)


def scanned(params, x):
    def step(hidden, _):
        return jnp.tanh(hidden @ params["square"]), None

    return jax.lax.scan(step, x, length=3)[0]


def masked(params, x):
    return x @ (params["square"] * jnp.tri(4))


def torn(params, x):
    return jnp.tanh(x[:, :2] @ params["square"].reshape(2, 8))


NO_LAYERS = (
    used_twice,
    scaled_by_parameters,
    looked_up,
    complex_valued,
    scanned,
    masked,
    torn,
)


@pytest.mark.parametrize("model_fn", NO_LAYERS)
def test_what_is_no_single_product_is_no_layer(model_fn, x64, rng):
    x = jnp.asarray(rng.normal(size=(COUNT, 4)))
    params = {
        "none": jnp.zeros((0, 3)),
        "scale": jnp.asarray(rng.normal(size=(4, 1))),
        "square": jnp.asarray(rng.normal(size=(4, 4))),
    }
    found, values, gradients, truth, _ = evaluate(model_fn, params, x)
    assert found == []
    check_values(found, values, gradients, truth)


# --- Convolutions


def module_case(module, shape):
    def make(dtype):
        x = jax.random.normal(jax.random.key(3), (5, *shape), dtype)
        params = module.init(jax.random.key(1), x)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return lambda params, x: jnp.tanh(module.apply(params, x)), params, x

    return make


def fast_case(dtype):
    x = jax.random.normal(jax.random.key(3), (5, 6, 7, 3), dtype)
    kernel = jax.random.normal(jax.random.key(4), (3, 2, 3, 4), dtype)
    return lambda kernel, x: jnp.tanh(convolve(x, kernel, 2)), kernel, x


def outputs_first_case(dtype):
    x = jax.random.normal(jax.random.key(3), (5, 3, 6, 7), dtype)
    kernel = jax.random.normal(jax.random.key(4), (4, 3, 3, 2), dtype)

    def model_fn(kernel, x):
        return jnp.tanh(jax.lax.conv(x, kernel, (1, 2), "VALID"))

    return model_fn, kernel, x


PRODUCTS = {  # with the split, the sizes of a and δ, and the number of terms
    "dense": (module_case(linen.Dense(4), (3, 6)), 1, (6, 4, 15)),
    "heads": (module_case(linen.DenseGeneral((2, 4)), (6,)), 1, (6, 8, 5)),
    "convolution": (module_case(linen.Conv(4, (3, 2)), (6, 7, 3)), 3, (18, 4, 210)),
    "strides": (module_case(linen.Conv(4, (3, 2), (2, 3)), (6, 7, 3)), 3, (18, 4, 45)),
    "dilation": (
        module_case(linen.Conv(4, (3, 2), kernel_dilation=(2, 1)), (6, 7, 3)),
        3,
        (18, 4, 210),
    ),
    "no padding": (
        module_case(linen.Conv(4, (3, 3), (2, 2), padding="VALID"), (6, 7, 2)),
        3,
        (18, 4, 30),
    ),
    "one dimension": (module_case(linen.Conv(4, 3), (8, 5)), 2, (15, 4, 40)),
    "one channel": (module_case(linen.Conv(4, (3, 3)), (5, 5, 1)), 3, (9, 4, 125)),
    "one output": (module_case(linen.Conv(1, (3, 3)), (5, 5, 2)), 3, (18, 1, 125)),
    "fast in loops": (fast_case, 3, (18, 4, 60)),
    "outputs first": (outputs_first_case, 1, (18, 4, 60)),
}


@pytest.mark.parametrize(
    "case", long_unless({"convolution", "dense", "strides"}, PRODUCTS.keys())
)
def test_outer_products_add_up_to_the_gradient(case, x64):
    make, split, (m, n, terms) = PRODUCTS[case]
    model_fn, params, x = make(jnp.float64)
    found, values, gradients, truth, cotangents = evaluate(model_fn, params, x)
    check_values(found, values, gradients, truth)
    (layer,), ((a, delta),) = found, values
    assert (layer.num_inputs, layer.num_outputs, layer.split) == (m, n, split)
    assert a.shape == (terms, m)
    assert layer.inputs_first == (case != "outputs first")
    assert layer.is_convolution == (case not in ("dense", "heads"))
    assert (layer.bias is None) == (case in ("fast in loops", "outputs first"))
    # Examples are slowest: their sums are the gradients of single ones.
    sums = np.einsum("nsi,nsj->nij", a.reshape(5, -1, m), delta.reshape(5, -1, n))
    rows = single_gradients(model_fn, params, x, cotangents)[layer.weight]
    sums = sums if layer.inputs_first else sums.swapaxes(1, 2)
    np.testing.assert_allclose(sums.reshape(rows.shape), rows, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "strides", [(1, 1), pytest.param((2, 1), marks=pytest.mark.long)]
)
def test_inputs_of_a_convolution_are_patches(strides, x64):
    module = linen.Conv(4, (3, 2), strides, padding="VALID")
    model_fn, params, x = module_case(module, (6, 7, 3))(jnp.float64)
    _, ((a, delta),), *_, cotangents = evaluate(model_fn, params, x)
    patches = np.lib.stride_tricks.sliding_window_view(np.asarray(x), (3, 2), (1, 2))
    # [examples, places, places, channels, kernel, kernel] to the order of the kernel
    patches = patches[:, :: strides[0], :: strides[1]].transpose(0, 1, 2, 4, 5, 3)
    np.testing.assert_array_equal(a, patches.reshape(-1, 18))
    slopes = 1 - np.asarray(model_fn(params, x)) ** 2
    expected = (slopes * np.asarray(cotangents)).reshape(-1, 4)
    np.testing.assert_allclose(delta, expected, rtol=1e-10)


def einsum_case(dtype):
    x = jax.random.normal(jax.random.key(3), (5, 6, 2), dtype)
    w = jax.random.normal(jax.random.key(4), (3, 6, 2, 4), dtype)
    return lambda w, x: jnp.tanh(jnp.einsum("nij,kijl->nkl", x, w)), w, x


@pytest.mark.parametrize(
    "make",
    long_unless(
        {"groups"},
        {
            "groups": module_case(
                linen.Conv(4, (3, 3), feature_group_count=2), (6, 6, 2)
            ),
            "transposed": module_case(
                linen.ConvTranspose(4, (3, 3), (2, 2)), (4, 4, 2)
            ),
            "inputs in the middle": einsum_case,
        },
    ),
)
def test_other_sums_are_left_alone(make, x64):
    found, *rest, _ = evaluate(*make(jnp.float64))
    assert found == []
    check_values(found, *rest)


@pytest.mark.long
def test_narrow_dtypes_are_widened():
    _, values, *_ = evaluate(*PRODUCTS["convolution"][0](jnp.bfloat16))
    assert {row.dtype for row in values[0]} == {jnp.dtype("float32")}


# --- Terms


def test_terms_add_up_to_the_gradient(x64, rng):
    x = jnp.asarray(rng.normal(size=(COUNT, 3, 4)))
    params = {
        "b": jnp.zeros(4),
        "table": jnp.asarray(rng.normal(size=(3, 4))),
        "twice": jnp.ones(()),
        "w": jnp.ones((4, 4)),
    }

    def model_fn(params, x):
        x = jnp.tanh(x + params["table"])
        hidden = jnp.tanh((x @ params["w"] + params["b"]) * params["twice"])
        return hidden * params["twice"]

    _, _, _, truth, cotangents = evaluate(model_fn, params, x)
    pull = linearize(model_fn, params, x).pull
    wanted = [Wanted(k, None, lambda terms: terms, keep_terms=True) for k in range(4)]
    terms = read_backward(pull, cotangents, params).evaluate(wanted)
    terms = dict(zip(params, terms, strict=True))
    assert terms["table"].shape == (COUNT, 3, 4)
    assert terms["b"].shape == (COUNT * 3, 4)
    assert terms["w"].shape == (4, 4)
    assert terms["twice"].shape == ()
    rows = single_gradients(model_fn, params, x, cotangents)
    np.testing.assert_allclose(terms["table"], rows[1], rtol=1e-10, atol=1e-14)
    per_example = terms["b"].reshape(COUNT, 3, 4).sum(1)
    np.testing.assert_allclose(per_example, rows[0], rtol=1e-10, atol=1e-14)
    for name in ("twice", "w"):
        np.testing.assert_allclose(terms[name], truth[name], rtol=1e-10)


# --- Layouts


def places(ranges):
    """The sums of ranges, the last one fastest."""
    found = np.zeros(1, int)
    for size, stride in ranges:
        found = (found[:, None] + stride * np.arange(size)).ravel()
    return found


def moved_at_random(rng, x, num_steps):
    """By reshapes that split and join axes, and by transposes."""
    for _ in range(num_steps):
        if rng.random() < 0.5:
            x = x.transpose(tuple(int(axis) for axis in rng.permutation(x.ndim)))
            continue
        factors = [k for n in x.shape for k in ([2, n // 2] if n in (4, 6) else [n])]
        cuts = np.flatnonzero(rng.random(len(factors) - 1) < 0.6) + 1
        x = x.reshape([int(np.prod(part)) for part in np.split(factors, cuts)])
    return x


def test_layouts_are_those_of_the_numbers_themselves(rng):
    start, ends = jnp.arange(72).reshape(4, 3, 6), []
    for _ in range(12):
        program = programs.read_program(lambda x: [moved_at_random(rng, x, 5)], start)
        (variable,) = program.jaxpr.outvars
        source, axes = program.layout(variable)
        before, after = map(
            np.asarray, program.evaluate([start], [source, variable])[0]
        )
        assert [len(places(axis)) for axis in axes] == list(after.shape)
        flat = [one for axis in axes for one in axis]
        for ranges in (flat, programs.join(flat)):
            np.testing.assert_array_equal(before.ravel()[places(ranges)], after.ravel())
        ends.append(source in program.jaxpr.invars)
    assert sum(ends) >= 6  # but where a reshape tears an axis apart


# --- A JAX that is not understood


@pytest.fixture
def forgetful():
    """Caches as in a fresh process, before and after."""
    caches = (backward._understands_jax, backward._warn)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def renamed_product(monkeypatch):
    """Programs whose matrix products have another name."""
    read = backward.read_program

    class Renamed:
        def __init__(self, equation):
            self._equation = equation

        def __getattr__(self, name):
            return getattr(self._equation, name)

        @property
        def primitive(self):
            renamed = type("Primitive", (), {"name": "tensor_product"})
            is_product = self._equation.primitive.name == "dot_general"
            return renamed if is_product else self._equation.primitive

    def read_renamed(fn, *arguments):
        program = read(fn, *arguments)
        program._source = {k: Renamed(v) for k, v in program._source.items()}
        return program

    monkeypatch.setattr(backward, "read_program", read_renamed)


def raising(monkeypatch):
    def fail(*arguments):
        raise AttributeError("'Jaxpr' has changed")

    monkeypatch.setattr(backward, "_find_layers", fail)


def raising_later(monkeypatch):
    backward._understands_jax()
    raising(monkeypatch)


@pytest.mark.parametrize(
    "change", long_unless([raising], [renamed_product, raising, raising_later])
)
@pytest.mark.usefixtures("forgetful")
def test_a_jax_that_is_not_understood_has_no_layers_and_says_so_once(
    change, monkeypatch, x64, rng
):
    change(monkeypatch)
    x = jnp.asarray(rng.normal(size=(COUNT, 6)))
    model_fn, params = plain_case(x)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(3):
            found, values, gradients, truth, _ = evaluate(model_fn, params, x)
            assert found == values == []
            check_values(found, values, gradients, truth)
    (warning,) = record
    assert "cannot read the programs of JAX" in str(warning.message)


@pytest.mark.usefixtures("forgetful")
def test_this_jax_is_understood():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backward._understands_jax()


def test_errors_of_the_model_are_its_own():
    def pull(cotangents):
        raise RuntimeError("of the model")

    with pytest.raises(RuntimeError, match="of the model"):
        backward_pass(pull, jnp.ones(3), jnp.ones(2))


def test_a_parameter_that_is_claimed_twice_is_an_internal_error():
    one = Layer(0, 2, True, 1, 3, 4, is_convolution=False)
    check_partition([one, one._replace(weight=1, bias=None)])
    for other in (one._replace(bias=None), one._replace(weight=1)):
        with pytest.raises(AssertionError, match="two layers"):
            check_partition([one, other])
