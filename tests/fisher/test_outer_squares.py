"""F by pairs of inputs and cotangents against A that is made by forward mode."""

import functools

import jax
import jax.numpy as jnp
import pytest

import ngd_jax as ngd
from ngd_jax.fisher import dense_root, outer_squares
from tests.fisher.test_operator import assert_close
from tests.fisher.test_outer_products import (
    CASES,
    make,
    network,
    true_root,
    weighted_case,
)

pytestmark = pytest.mark.usefixtures("strict_ranks")


def square(model_fn, x, likelihood, dtype, memory=2**30, **options):
    def build(params):
        fisher = ngd.linearize_fisher(model_fn, params, x, likelihood, **options)
        return outer_squares.square_by_factors(fisher, dtype, memory)

    return jax.jit(build)


@pytest.mark.parametrize("name", CASES)
def test_f_by_pairs_is_that_of_the_rows(name, x64, rng):
    model_fn, likelihood, params, x, weights = weighted_case(name, rng)
    found, is_separable = square(model_fn, x, likelihood, jnp.float64, weights=weights)(
        params
    )
    root = true_root(model_fn, params, x, likelihood, weights=weights)
    assert_close(found, root.T @ root, 1e-13)
    assert bool(is_separable)


def test_weights_of_any_layout_and_biases_of_any_kind(x64, rng):
    """Outputs first, two axes of inputs, biases that are shared or of other use."""
    x = jnp.asarray(rng.normal(size=(7, 12)))
    shapes = {
        "across": (10, 12),
        "b": (10,),
        "scale": (10,),
        "two axes": (2, 5, 15),
        "shared": (15,),
        "z": (15, 15),
        "end": (15,),
    }
    params = {
        name: jnp.asarray(rng.normal(size=shape) / 3) for name, shape in shapes.items()
    }

    def model_fn(params, x):
        hidden = params["scale"][None] * (x @ params["across"].T + params["b"][None])
        hidden = jnp.tanh(hidden).reshape(-1, 2, 5)
        hidden = jnp.tensordot(hidden, params["two axes"], 2) + params["shared"][None]
        hidden = jnp.tanh(hidden) @ params["z"] + params["shared"][None]
        return jnp.sin(hidden) @ params["end"]

    found, _ = square(model_fn, x, ngd.LogAmplitude(), jnp.float64)(params)
    root = true_root(model_fn, params, x, ngd.LogAmplitude())
    assert_close(found, root.T @ root, 1e-13)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-12)]
)
def test_long_means_cost_no_digits(dtype, tolerance, x64, rng):
    model_fn = functools.partial(network, lambda z: z[:, 0])
    # Inputs far from zero, and hidden units that they do not saturate.
    params, x = make(rng, dtype, offset=300.0)
    params["first"] = params["first"] / 1000
    found, _ = square(model_fn, x, ngd.LogAmplitude(), dtype)(params)
    assert found.dtype == dtype
    root = true_root(model_fn, params, x, ngd.LogAmplitude())
    # Of the products of the rows themselves, the mean would cost five digits.
    assert_close(found, root.T @ root, tolerance)


def test_what_does_not_fit_into_memory_is_made_by_blocks_of_rows(x64, rng, monkeypatch):
    model_fn = functools.partial(network, lambda z: z[:, 0])
    params, x = make(rng, "float64")
    assert (
        square(model_fn, x, ngd.Gaussian(event_ndims=0), "float64", 2**15)(params)
        is None
    )
    monkeypatch.setattr(dense_root, "MEMORY", 2**15)
    fisher = ngd.linearize_fisher(model_fn, params, x, ngd.Gaussian(event_ndims=0))
    root = true_root(model_fn, params, x, ngd.Gaussian(event_ndims=0))
    assert_close(jax.jit(fisher.dense)(), root.T @ root, 1e-13)
