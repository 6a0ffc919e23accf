"""Means over the batch: weights and masks, of every kind of likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from tests import reference
from tests.fisher.cases import CASES, matvec
from tests.fisher.test_operator import assert_close, random_like

WEIGHTED = {
    "example weights": ("categorical", (7,)),
    "token weights": ("categorical over tokens", (4, 3)),
    "weights by sequence": ("categorical over tokens", (4, 1)),
    "weights by position": ("categorical over tokens", (3,)),
    "log density": ("log density", (7,)),
    "complex amplitude": ("complex amplitude", (7,)),
    "one weight": ("poisson", ()),
}


@pytest.mark.parametrize(("name", "shape"), WEIGHTED.values(), ids=WEIGHTED)
def test_weighted_means_equal_dense_definition(name, shape, x64, rng):
    case = CASES[name]
    params, x = case.make(rng, "float64")
    vector = random_like(params, rng)
    new_params = jax.tree.map(lambda p, v: p + 0.1 * v, params, vector)
    weights = np.asarray(rng.uniform(0.1, 3.0, size=shape))
    if weights.size > 1:
        weights.flat[::3] = 0.0
    outputs, jacobian = reference.jacobian(case.model_fn, params, x)
    new_outputs, _ = reference.jacobian(case.model_fn, new_params, x)
    truth = case.true_fisher(outputs, jacobian, weights)

    @jax.jit
    def weighted(params, weights):
        fisher = ngd.linearize_fisher(
            case.model_fn, params, x, case.likelihood, weights=weights
        )
        kl = fisher.kl(new_params)
        return fisher.matvec(vector), fisher.diagonal(), kl

    product, diagonal, kl = weighted(params, jnp.asarray(weights))
    assert_close(reference.flat(product), truth @ reference.flat(vector), 1e-12)
    assert_close(diagonal, np.diag(truth).real, 1e-12)
    assert_close(kl, case.true_kl(outputs, new_outputs, weights), 1e-11)


def test_blocks_of_a_product_have_weights_of_their_own(x64, rng):
    case = CASES["product"]
    params, x = case.make(rng, "float64")
    vector = random_like(params, rng)
    weights = {"label": jnp.asarray(rng.uniform(size=7)), "box": None}
    truth = case.true_fisher(
        *reference.jacobian(case.model_fn, params, x),
        {"label": np.asarray(weights["label"]), "box": None},
    )
    product = matvec(case.model_fn, params, x, case.likelihood, vector, weights=weights)
    assert_close(reference.flat(product), truth @ reference.flat(vector), 1e-12)


@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("name", ["categorical", "log density"])
def test_examples_of_weight_zero_do_not_count_in_the_kl_even_as_nan(
    name, microbatch_size, rng
):
    case = CASES[name]
    params, x = case.make(rng)
    new_params = jax.tree.map(lambda p: 0.9 * p, params)
    weights = jnp.array([1.0, 0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    keep = np.flatnonzero(weights)

    def model_fn(params, batch):
        x, is_broken = batch
        # A model that fails at the other parameters, on masked examples only.
        is_moved = params["scale"] < 0.75
        failure = jnp.where(is_broken & is_moved, jnp.nan, 0.0)
        outputs = case.model_fn(params, x)
        return outputs + failure.reshape((-1,) + (1,) * (outputs.ndim - 1))

    def kl(x, is_broken, weights, size):
        return jax.jit(
            ngd.mean_kl, static_argnums=(0, 4), static_argnames="microbatch_size"
        )(
            model_fn,
            params,
            new_params,
            (x, is_broken),
            case.likelihood,
            weights=weights,
            microbatch_size=size,
        )

    masked = kl(x, weights == 0, weights, microbatch_size)
    left_out = kl(x[keep], jnp.zeros(4, bool), weights[keep], None)
    np.testing.assert_allclose(masked, left_out, rtol=1e-5)
    assert float(masked) > 0


def test_constant_weights_change_nothing(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)
    vector = random_like(params, rng)
    arguments = (case.model_fn, params, x, case.likelihood, vector)
    plain = matvec(*arguments)
    weighted = matvec(*arguments, weights=jnp.full(7, 5.0))
    assert_close(reference.flat(weighted), reference.flat(plain), 1e-6)


def test_boolean_masks_are_weights(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)
    vector = random_like(params, rng)
    mask = jnp.array([True] * 4 + [False] * 3)
    masked = matvec(case.model_fn, params, x, case.likelihood, vector, weights=mask)
    first = matvec(case.model_fn, params, x[:4], case.likelihood, vector)
    assert_close(reference.flat(masked), reference.flat(first), 1e-6)
