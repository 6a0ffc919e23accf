"""The Gram matrix by outer products against rows that are made with NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from ngd_jax.fisher import outer_products
from ngd_jax.fisher.rows import row_groups
from tests.fisher.test_operator import assert_close

pytestmark = pytest.mark.usefixtures("strict_ranks")
HEADS = ngd.Product(
    {"label": ngd.Categorical(), "size": ngd.Gaussian()},
    weights={"label": 2.0, "size": 0.5},
)
CASES = {
    "one output": (ngd.Gaussian(event_ndims=0), lambda z: z[:, 0]),
    "classes": (ngd.Categorical(), lambda z: z),
    "heads": (HEADS, lambda z: {"label": z[:, :2], "size": z[:, 2:]}),
    "covariance": (ngd.LogDensity(), lambda z: z[:, 0]),
    "covariance of many": (ngd.LogAmplitude(), lambda z: z[:, :2]),
}


def network(head, params, x):
    hidden = jnp.tanh(x @ params["first"] + params["bias"][None])
    hidden = jnp.tanh(hidden @ params["second"])
    return head(hidden @ params["last"])


def make(rng, dtype, offset=0.0):
    shapes = {"first": (9, 20), "bias": (20,), "second": (20, 20), "last": (20, 3)}
    params = {
        name: jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, dtype)
        for name, shape in shapes.items()
    }
    return params, jnp.asarray(rng.normal(size=(11, 9)) + offset, dtype)


def true_root(model_fn, params, x, likelihood, **options):
    """A in float64, from one forward-mode product for each parameter."""
    params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, x))

    @jax.jit
    def columns(params):
        flat, unravel = ravel_pytree(params)
        fisher = ngd.linearize_fisher(model_fn, params, x, likelihood, **options)
        return jax.lax.map(
            lambda v: ravel_pytree(fisher.sqrt_matvec(unravel(v)))[0],
            jnp.eye(flat.size, dtype=flat.dtype),
        )

    return np.asarray(columns(params)).T


def true_gram(*arguments, **options):
    """A Aᵀ likewise."""
    root = true_root(*arguments, **options)
    return root @ root.T


def weighted_case(name, rng):
    """Model, likelihood, parameters, batch, and weights of which one is zero."""
    likelihood, head = CASES[name]
    params, x = make(rng, "float64")
    weights = jnp.asarray(rng.uniform(size=11)).at[3].set(0.0)
    if name == "covariance of many":
        weights = weights[:, None]
    return functools.partial(network, head), likelihood, params, x, weights


@pytest.mark.parametrize("name", CASES)
def test_gram_by_outer_products_is_that_of_the_rows(name, x64, rng):
    model_fn, likelihood, params, x, weights = weighted_case(name, rng)

    @jax.jit
    def gram(params):
        fisher = ngd.linearize_fisher(model_fn, params, x, likelihood, weights=weights)
        _, rows, layers = outer_products.factored_rows(
            row_groups(fisher, with_means=True)[0], jnp.float64
        )
        assert len(rows.outer) == len(layers)
        # All but the narrow last layer; leaves are in the order of their names.
        assert [(layer.weight, layer.bias) for layer in layers] == [(1, 0), (3, None)]
        return fisher.gram()

    found = gram(params)
    truth = true_gram(model_fn, params, x, likelihood, weights=weights)
    assert_close(found.matrix, truth, 1e-13)
    assert bool(found.is_separable)


def test_functions_jitted_by_themselves_are_written_out(x64, rng):
    model_fn = jax.jit(functools.partial(network, lambda z: z))
    params, x = make(rng, "float64")
    fisher = ngd.linearize_fisher(model_fn, params, x, ngd.Gaussian())
    (group,) = row_groups(fisher)
    _, rows, _ = jax.jit(lambda: outer_products.factored_rows(group, jnp.float64))()
    assert len(rows.outer) == 2
    truth = true_gram(model_fn, params, x, ngd.Gaussian())
    assert_close(outer_products.factored_gram(rows, None), truth, 1e-13)


def test_long_means_cost_no_digits(x64, rng):
    model_fn = functools.partial(network, lambda z: z[:, 0])
    # Inputs far from zero, and hidden units that they do not saturate.
    params, x = make(rng, "float32", offset=300.0)
    params["first"] = params["first"] / 1000

    @jax.jit
    def both(params):
        fisher = ngd.linearize_fisher(model_fn, params, x, ngd.LogAmplitude())
        return [fisher.gram(block_size).matrix for block_size in (None, 11)]

    assert np.linalg.norm(x.mean(0)) > 100 * np.asarray(x).std()
    truth = true_gram(model_fn, params, x, ngd.LogAmplitude())
    for gram in both(params):
        # The model itself rounds; subtracted from the products, the mean would cost
        # five digits.
        assert gram.dtype == jnp.float32
        assert_close(gram, truth, 1e-4)


def test_weights_used_twice_are_no_outer_products(x64, rng):
    def model_fn(params, x):
        hidden = jnp.tanh(x @ params["first"])
        return jnp.tanh(jnp.tanh(hidden @ params["second"]) @ params["second"]).sum(-1)

    params, x = make(rng, "float64")
    likelihood = ngd.Gaussian(event_ndims=0)
    fisher = ngd.linearize_fisher(model_fn, params, x, likelihood)
    (group,) = row_groups(fisher)
    _, rows, _ = jax.jit(lambda: outer_products.factored_rows(group, jnp.float64))()
    assert len(rows.outer) == 1
    truth = true_gram(model_fn, params, x, likelihood)
    assert_close(outer_products.factored_gram(rows, None), truth, 1e-13)
