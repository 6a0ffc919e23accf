"""Sums of outer products: they add up to the gradient, of factors that are known."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks.convolution import convolve
from ngd_jax.fisher.bilinear import outer_products
from ngd_jax.fisher.linearization import linearize
from ngd_jax.fisher.programs import read_program

COUNT = 5


def linen_case(module, shape):
    def make(dtype):
        x = jax.random.normal(jax.random.key(3), (COUNT, *shape), dtype)
        params = module.init(jax.random.key(1), x)
        return lambda params, x: jnp.tanh(module.apply(params, x)), params, x

    return make


def fast_case(dtype):
    x = jax.random.normal(jax.random.key(3), (COUNT, 6, 7, 3), dtype)
    kernel = jax.random.normal(jax.random.key(4), (3, 2, 3, 4), dtype)
    return lambda kernel, x: jnp.tanh(convolve(x, kernel, 2)), kernel, x


def outputs_first_case(dtype):
    x = jax.random.normal(jax.random.key(3), (COUNT, 3, 6, 7), dtype)
    kernel = jax.random.normal(jax.random.key(4), (4, 3, 3, 2), dtype)

    def model_fn(kernel, x):
        return jnp.tanh(jax.lax.conv(x, kernel, (1, 2), "VALID"))

    return model_fn, kernel, x


def einsum_case(dtype):
    x = jax.random.normal(jax.random.key(3), (COUNT, 6, 2), dtype)
    w = jax.random.normal(jax.random.key(4), (3, 6, 2, 4), dtype)
    return lambda w, x: jnp.tanh(jnp.einsum("nij,kijl->nkl", x, w)), w, x


def rematerialised_case(dtype):
    model_fn, params, x = linen_case(linen.Dense(4), (3, 6))(dtype)
    return jax.checkpoint(model_fn), params, x


CASES = {  # with the sizes of a and δ, and the number of terms
    "dense": (linen_case(linen.Dense(4), (3, 6)), (6, 4, 15)),
    "dense, run again": (rematerialised_case, (6, 4, 15)),
    "heads": (linen_case(linen.DenseGeneral((2, 4)), (6,)), (6, 8, 5)),
    "convolution": (linen_case(linen.Conv(4, (3, 2)), (6, 7, 3)), (18, 4, 210)),
    "strides": (linen_case(linen.Conv(4, (3, 2), (2, 3)), (6, 7, 3)), (18, 4, 45)),
    "dilation": (
        linen_case(linen.Conv(4, (3, 2), kernel_dilation=(2, 1)), (6, 7, 3)),
        (18, 4, 210),
    ),
    "no padding": (
        linen_case(linen.Conv(4, (3, 3), (2, 2), padding="VALID"), (6, 7, 2)),
        (18, 4, 30),
    ),
    "one dimension": (linen_case(linen.Conv(4, 3), (8, 5)), (15, 4, 40)),
    "one channel": (linen_case(linen.Conv(4, (3, 3)), (5, 5, 1)), (9, 4, 125)),
    "fast in loops": (fast_case, (18, 4, 60)),
    "outputs first": (outputs_first_case, (18, 4, 60)),
}


def found_in(model_fn, params, x):
    """For the last leaf: its gradient, its factors, and what is known of them."""
    known = []

    @jax.jit
    def run(params, x):
        linearization = linearize(model_fn, params, x)
        cotangents = jax.random.normal(
            jax.random.key(9), linearization.outputs.shape, linearization.outputs.dtype
        )
        program = read_program(
            lambda c: jax.tree.leaves(linearization.pull(c)), cotangents
        )
        gradient = program.jaxpr.outvars[-1]
        products = outer_products(program, gradient)
        known[:] = [products]
        wanted = [gradient] if products is None else [gradient, *products.factors]
        values = program.function(wanted)(cotangents)
        rows = () if products is None else products.rows(*values[1:])
        return values[0], rows, cotangents

    return (*run(params, x), *known)


@pytest.mark.parametrize("case", CASES)
def test_outer_products_add_up_to_the_gradient(case, x64):
    make, (m, n, terms) = CASES[case]
    gradient, (a, delta), _, products = found_in(*make(jnp.float64))
    assert (products.num_inputs, products.num_outputs) == (m, n)
    assert a.shape == (terms, m)
    assert delta.shape == (terms, n)
    total = np.asarray(a.T @ delta if products.inputs_first else delta.T @ a)
    np.testing.assert_allclose(total, np.reshape(gradient, total.shape), atol=1e-12)
    assert products.inputs_first == (case != "outputs first")


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_inputs_of_a_convolution_are_patches(strides, x64):
    module = linen.Conv(4, (3, 2), strides, padding="VALID")
    model_fn, params, x = linen_case(module, (6, 7, 3))(jnp.float64)
    _, (a, delta), cotangents, _ = found_in(model_fn, params, x)
    patches = np.lib.stride_tricks.sliding_window_view(np.asarray(x), (3, 2), (1, 2))
    # [examples, places, places, channels, kernel, kernel] to the order of the kernel
    patches = patches[:, :: strides[0], :: strides[1]].transpose(0, 1, 2, 4, 5, 3)
    np.testing.assert_array_equal(a, patches.reshape(-1, 18))
    slopes = 1 - np.asarray(model_fn(params, x)) ** 2
    expected = (slopes * np.asarray(cotangents)).reshape(-1, 4)
    np.testing.assert_allclose(delta, expected, rtol=1e-10)


@pytest.mark.parametrize(
    "make",
    [
        linen_case(linen.Conv(4, (3, 3), feature_group_count=2), (6, 6, 2)),
        linen_case(linen.ConvTranspose(4, (3, 3), (2, 2)), (4, 4, 2)),
        einsum_case,
    ],
    ids=["groups", "transposed", "inputs in the middle"],
)
def test_other_sums_are_left_alone(make, x64):
    *_, products = found_in(*make(jnp.float64))
    assert products is None


def test_narrow_dtypes_are_widened():
    _, rows, _, _ = found_in(*CASES["convolution"][0](jnp.bfloat16))
    assert {row.dtype for row in rows} == {jnp.dtype("float32")}
