"""Dense layers, found in a program, against the gradients of single examples.

Where x W + b is all that a weight and a bias are used for, the gradient of the bias at
an example is δ, and that of the weight a ⊗ δ: both by `jax.grad`, example by example.
"""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ngd_jax as ngd
from ngd_jax.fisher.layers import backward_pass

COUNT = 11


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
    """A projection to heads, as attention has it."""
    network = linen.Sequential(
        [
            linen.DenseGeneral((2, 3), param_dtype=x.dtype),
            jnp.tanh,
            linen.DenseGeneral(4, axis=(-2, -1), param_dtype=x.dtype),
        ]
    )
    params = network.init(jax.random.key(1), x)["params"]
    return lambda params, x: network.apply({"params": params}, x), params


def true_gradients(model_fn, params, x, signs):
    """Of every leaf at every example, for the same cotangents."""

    def score(params, x, cotangent):
        return jnp.sum(model_fn(params, x[None])[0] * cotangent)

    @jax.jit
    def all_rows(params, x):
        fisher = ngd.linearize_fisher(model_fn, params, x, ngd.Categorical())
        cotangents = fisher.sqrt_cotangents(signs)
        return jax.vmap(jax.grad(score), in_axes=(None, 0, 0))(params, x, cotangents)

    rows = all_rows(params, x)
    return [np.asarray(leaf, float) for leaf in jax.tree.leaves(rows)]


def layers_of(model_fn, params, x, signs, options=()):
    # Layers are no arrays, and so no results of a jitted function.
    layers = []

    def run(params, x, signs):
        fisher = ngd.linearize_fisher(
            model_fn, params, x, ngd.Categorical(), **dict(options)
        )
        cotangents = fisher.sqrt_cotangents(signs)
        layers[:], passed = backward_pass(fisher, cotangents, max_size=99)
        return passed

    passed = jax.jit(run)(params, x, signs)
    return layers, passed


CASES = {  # with the weights, their biases, and whether inputs come first
    "linen": (linen_case, [(1, 0, True), (2, None, True), (4, 3, True)]),
    "nnx": (nnx_case, [(1, 0, True), (3, 2, True)]),
    "outputs first": (plain_case, [(1, 0, False), (2, None, False)]),
    "split axes": (split_axes_case, [(1, None, True), (3, 2, True)]),
}


@pytest.mark.parametrize(
    ("case", "microbatch_size"), [*((case, None) for case in CASES), ("nnx", 4)]
)
def test_sums_are_those_of_single_examples(case, microbatch_size, x64, rng):
    make, expected = CASES[case]
    x = jnp.asarray(rng.normal(size=(COUNT, 6)) + 0.5)
    model_fn, params = make(x)
    signs = jnp.asarray(rng.choice([-1.0, 1.0], size=(COUNT, 4)))
    options = () if microbatch_size is None else (("microbatch_size", 4),)
    layers, passed = layers_of(model_fn, params, x, signs, options)
    assert [(one.weight, one.bias, one.inputs_first) for one in layers] == expected

    rows = true_gradients(model_fn, params, x, signs)
    for layer, sums in zip(layers, passed.layers, strict=True):
        m, n = layer.num_inputs, layer.num_outputs
        weight = rows[layer.weight].reshape(COUNT, m, n)
        if not layer.inputs_first:
            weight = rows[layer.weight].reshape(COUNT, n, m).swapaxes(1, 2)
        assert int(sums.num_terms) == COUNT
        a, delta = np.asarray(sums.inputs), np.asarray(sums.outputs)
        if layer.bias is not None:
            delta_rows = rows[layer.bias].reshape(COUNT, n)
            np.testing.assert_allclose(delta, delta_rows.T @ delta_rows, atol=1e-14)
            sizes = np.einsum("nj,nj->n", delta_rows, delta_rows)
            a_rows = np.einsum("nij,nj->ni", weight, delta_rows) / sizes[:, None]
            np.testing.assert_allclose(a, a_rows.T @ a_rows, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(sums.input, a_rows.sum(0), rtol=1e-9, atol=1e-9)

    for row, square in zip(rows, passed.squares, strict=True):
        is_bias = row.shape[1:] in [(row.shape[-1],), (2, 3)]
        truth = (row**2).sum(0) if is_bias else row.sum(0) ** 2
        if microbatch_size is None or is_bias:
            np.testing.assert_allclose(square, truth, rtol=1e-9, atol=1e-14)


def test_inputs_of_a_first_layer_are_the_inputs(x64, rng):
    x = jnp.asarray(rng.normal(size=(COUNT, 3, 6)))
    w = jnp.asarray(rng.normal(size=(6, 4)))
    signs = jnp.asarray(rng.choice([-1.0, 1.0], size=(COUNT, 3, 4)))
    # Every place of a sequence counts as an example.
    layers, passed = layers_of(lambda w, x: x @ w, w, x, signs)
    assert [one.weight for one in layers] == [0]
    (sums,) = passed.layers
    flat = np.asarray(x).reshape(-1, 6)
    assert int(sums.num_terms) == len(flat)
    np.testing.assert_allclose(sums.inputs, flat.T @ flat)
    np.testing.assert_allclose(sums.input, flat.sum(0))


def test_one_example_is_enough_to_find_a_bias(x64, rng):
    x = jnp.asarray(rng.normal(size=(1, 6)))
    model_fn, params = nnx_case(x)
    layers, _ = layers_of(model_fn, params, x, jnp.ones((1, 4)))
    assert [(one.weight, one.bias) for one in layers] == [(1, 0), (3, 2)]


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
    x, layers = jnp.zeros((COUNT, 4, 6)), []

    def model_fn(params, x):
        return jnp.tanh(layer(params, x) + params["b"].reshape(shape))

    def trace(params):
        fisher = ngd.linearize_fisher(model_fn, params, x, ngd.Gaussian())
        cotangents = fisher.sqrt_cotangents(jnp.ones((COUNT, 4, 4)))
        layers[:], passed = backward_pass(fisher, cotangents, max_size=99)
        return passed

    jax.eval_shape(trace, params)
    bias = 0 if bias_axis == output_axis else None
    assert [(one.weight, one.bias) for one in layers] == [(1, bias)]


def used_twice(params, x):
    return jnp.tanh(x @ params["square"]) @ params["square"]


def scaled(params, x):
    return x @ (params["square"] * params["scale"])


def looked_up(params, x):
    return params["square"][jnp.argmax(x, axis=-1)]


def complex_valued(params, x):
    weight = params["square"] + 0j
    return jnp.real((x + 1j * x**2) @ weight)


@pytest.mark.parametrize("model_fn", [used_twice, scaled, looked_up, complex_valued])
def test_what_is_no_single_product_is_no_layer(model_fn, x64, rng):
    x = jnp.asarray(rng.normal(size=(COUNT, 4)))
    params = {
        "square": jnp.asarray(rng.normal(size=(4, 4))),
        "scale": jnp.asarray(rng.normal(size=(4, 1))),
    }
    signs = jnp.asarray(rng.choice([-1.0, 1.0], size=(COUNT, 4)))
    layers, passed = layers_of(model_fn, params, x, signs)
    assert layers == []
    rows = true_gradients(model_fn, params, x, signs)
    for row, square in zip(rows, passed.squares, strict=True):
        np.testing.assert_allclose(square, row.sum(0) ** 2, rtol=1e-10, atol=1e-14)


def test_squares_of_a_table_of_places_are_those_of_examples(x64, rng):
    # Its gradient has two axes, and is a sum over examples all the same.
    x = jnp.asarray(rng.normal(size=(COUNT, 3, 4)))
    table = jnp.asarray(rng.normal(size=(3, 4)))
    signs = jnp.asarray(rng.choice([-1.0, 1.0], size=(COUNT, 3, 4)))

    def model_fn(table, x):
        return x + table

    layers, passed = layers_of(model_fn, table, x, signs)
    assert layers == []
    (row,) = true_gradients(model_fn, table, x, signs)
    (square,) = passed.squares
    np.testing.assert_allclose(square, (row**2).sum(0), rtol=1e-10, atol=1e-14)


def test_biases_of_equal_size_go_with_their_own_weights(x64, rng):
    params = {
        "b": [jnp.ones(3), jnp.ones(3)],
        "w": [jnp.asarray(rng.normal(size=(3, 3))) for _ in range(2)],
    }

    def model_fn(params, x):
        hidden = jnp.tanh(x @ params["w"][1] + params["b"][0])
        return hidden @ params["w"][0] + params["b"][1]

    x = jnp.asarray(rng.normal(size=(COUNT, 3)))
    layers, _ = layers_of(model_fn, params, x, jnp.ones((COUNT, 3)))
    assert [(one.weight, one.bias) for one in layers] == [(2, 1), (3, 0)]
