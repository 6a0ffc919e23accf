"""The Gram matrix by outer products against columns of the operator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax import dense, gram, per_example
from tests.dense_layers import CASES, make, network, weighted_case, widened
from tests.fisher_cases import assert_close
from tests.test_dense import columns

pytestmark = pytest.mark.usefixtures("strict_ranks")


def found_layers(fisher):
    """The places of weights and biases whose rows are taken as outer products."""
    (group,), layers = per_example.groups_of(fisher), []
    jax.eval_shape(lambda: gram._factored_rows(fisher, group, layers))
    return [(layer.weight, layer.bias) for layer in layers]


MARKS = {"classes": [], "covariance of many": [], "heads": pytest.mark.long}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=MARKS.get(name, pytest.mark.slow)) for name in CASES],
)
def test_gram_by_outer_products_is_that_of_the_operator(name, x64, rng):
    model_fn, likelihood, params, x, weights = weighted_case(name, rng)

    @jax.jit
    def of_network(params):
        fisher = ngd.linearize_fisher(model_fn, params, x, likelihood, weights=weights)
        # All but the narrow last layer; leaves are in the order of their names.
        assert found_layers(fisher) == [(1, 0), (3, None)]
        return gram.gram(fisher)

    root = columns(model_fn, params, x, likelihood, weights=weights)
    assert_close(of_network(params), root @ root.T, 1e-13)


def test_functions_jitted_by_themselves_are_seen_through(x64, rng):
    model_fn = jax.jit(functools.partial(network, lambda z: z))
    params, x = make(rng, "float64")
    fisher = ngd.linearize_fisher(model_fn, params, x, ngd.Gaussian())
    assert len(found_layers(fisher)) == 2


@pytest.mark.long
def test_long_means_cost_no_digits(x64, rng):
    model_fn = functools.partial(network, lambda z: z[:, 0])
    # Inputs far from zero, and hidden units that they do not saturate.
    params, x = make(rng, "float32", offset=300.0)
    params["first"] = params["first"] / 1000

    @jax.jit
    def both(params):
        fisher = ngd.linearize_fisher(model_fn, params, x, ngd.LogAmplitude())
        return [gram.gram(fisher, block) for block in (None, 11)], dense.dense(fisher)

    assert np.linalg.norm(x.mean(0)) > 100 * np.asarray(x).std()
    root = columns(model_fn, widened(params), widened(x), ngd.LogAmplitude())
    grams, matrix = both(params)
    # The model itself rounds; subtracted from the products, the mean would cost five
    # digits.
    for matrix_of_rows in grams:
        assert matrix_of_rows.dtype == jnp.float32
        assert_close(matrix_of_rows, root @ root.T, 1e-4)
    assert_close(matrix, root.T @ root, 1e-4)


def test_weights_used_twice_are_no_outer_products(x64, rng):
    def model_fn(params, x):
        hidden = jnp.tanh(x @ params["first"])
        return jnp.tanh(jnp.tanh(hidden @ params["second"]) @ params["second"]).sum(-1)

    params, x = make(rng, "float64")
    likelihood = ngd.Gaussian(event_ndims=0)
    fisher = ngd.linearize_fisher(model_fn, params, x, likelihood)
    assert found_layers(fisher) == [(1, None)]
    root = columns(model_fn, params, x, likelihood)
    assert_close(jax.jit(lambda: gram.gram(fisher))(), root @ root.T, 1e-13)


@pytest.mark.slow
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

    fisher = ngd.linearize_fisher(model_fn, params, x, ngd.LogAmplitude())
    root = columns(model_fn, params, x, ngd.LogAmplitude())
    assert_close(jax.jit(lambda: gram.gram(fisher))(), root @ root.T, 1e-13)


def test_what_does_not_fit_into_memory_is_made_by_blocks_of_rows(x64, rng, monkeypatch):
    model_fn = functools.partial(network, lambda z: z[:, 0])
    params, x = make(rng, "float64")
    likelihood = ngd.Gaussian(event_ndims=0)
    fisher = ngd.linearize_fisher(model_fn, params, x, likelihood)
    monkeypatch.setattr(gram, "_MEMORY", 2**13)
    assert gram._by_layers(fisher, per_example.groups_of(fisher)) is None
    root = columns(model_fn, params, x, likelihood)
    assert_close(jax.jit(lambda: gram.gram(fisher))(), root @ root.T, 1e-13)
