"""Microbatches: the same numbers as the whole batch, in less memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from tests import reference
from tests.fisher.cases import CASES, matvec
from tests.fisher.test_operator import random_like

# A name, the options, and whether the batch divides into microbatches.
VARIANTS = {
    "exact": ("categorical", {}, 7, 2),
    "evenly": ("categorical over tokens", {}, 4, 2),
    "one at a time": ("poisson", {}, 7, 1),
    "covariance": ("log density", {}, 7, 3),
    "complex covariance": ("complex amplitude", {}, 7, 3),
    "weighted covariance": ("log density", {"weights": jnp.arange(7.0)}, 7, 2),
    "weighted": ("categorical", {"weights": jnp.arange(7.0)}, 7, 3),
    "weighted tokens": (
        "categorical over tokens",
        {"weights": jnp.arange(12.0).reshape(4, 3)},
        4,
        3,
    ),
    "sampled": ("categorical", {"kind": "sampled", "key": jax.random.key(1)}, 7, 3),
    "empirical": (
        "categorical",
        {"kind": "empirical", "targets": jnp.array([0, 1, 2, 0, 1, 2, 0])},
        7,
        3,
    ),
}


@pytest.mark.parametrize(
    ("name", "options", "num_examples", "size"), VARIANTS.values(), ids=VARIANTS
)
def test_microbatches_equal_the_whole_batch(name, options, num_examples, size, rng):
    case = CASES[name]
    params, x = case.make(rng)
    assert x.shape[0] == num_examples
    vector = random_like(params, rng)
    new_params = jax.tree.map(lambda p, v: p + 0.1 * v, params, vector)

    @jax.jit
    def both(params):
        results = []
        for microbatch_size in (None, size):
            fisher = ngd.linearize_fisher(
                case.model_fn,
                params,
                x,
                case.likelihood,
                microbatch_size=microbatch_size,
                **options,
            )
            assert fisher.is_kept == (microbatch_size is None)
            results.append(
                {
                    "outputs": fisher.outputs,
                    "matvec": fisher.matvec(vector),
                    "matvec with image": fisher.matvec_with_image(vector),
                    "quadratic": fisher.quadratic(vector),
                    "kl": fisher.kl(new_params),
                }
            )
        return results

    whole, by_parts = both(params)
    chex.assert_trees_all_close(by_parts, whole, rtol=1e-4, atol=1e-6)


def test_what_is_not_of_the_examples_reaches_every_microbatch_whole(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)
    vector = random_like(params, rng)
    batch = {
        "x": x,
        "key": jax.random.key(0),
        "keys": jax.random.split(jax.random.key(1), 3),
        "temperature": 2.0,
        "name": None,
        "offset": jnp.arange(3.0),
    }

    def model_fn(params, batch):
        noise = jax.random.normal(batch["key"], (3,))
        noise += jax.random.normal(batch["keys"][2], (3,))
        outputs = case.model_fn(params, batch["x"]) / batch["temperature"]
        return outputs + 0.1 * noise + batch["offset"]

    whole, by_parts = (
        matvec(model_fn, params, batch, case.likelihood, vector, microbatch_size=size)
        for size in (None, 2)
    )
    chex.assert_trees_all_close(by_parts, whole, rtol=1e-4, atol=1e-6)


def test_keys_of_the_examples_are_split_with_them(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)
    batch = (x, jax.random.split(jax.random.key(0), 7))
    vector = random_like(params, rng)

    def model_fn(params, batch):
        x, keys = batch
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        return case.model_fn(params, x) + noise

    whole, by_parts = (
        matvec(model_fn, params, batch, case.likelihood, vector, microbatch_size=size)
        for size in (None, 3)
    )
    chex.assert_trees_all_close(by_parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("likelihood", [ngd.Categorical(), ngd.LogDensity()], ids=repr)
def test_peak_memory_is_that_of_the_microbatch(likelihood):
    # Wide layers and a small input: activations are what memory goes to.
    params = [jnp.zeros((4, 256)), jnp.zeros((256, 256)), jnp.zeros((256, 3))]

    def model_fn(params, x):
        for weights in params[:-1]:
            x = jnp.tanh(x @ weights)
        outputs = x @ params[-1]
        return outputs[:, 0] if isinstance(likelihood, ngd.LogDensity) else outputs

    def peak(microbatch_size):
        @jax.jit
        def product(params, x, vector):
            fisher = ngd.linearize_fisher(
                model_fn, params, x, likelihood, microbatch_size=microbatch_size
            )
            return fisher.matvec(vector)

        x = jax.ShapeDtypeStruct((4096, 4), jnp.float32)
        compiled = product.lower(params, x, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    activations = 4096 * 2 * 256 * 4
    assert peak(None) > activations
    assert peak(64) < activations / 4
    assert peak(64) < peak(512) < peak(None)


def test_microbatch_as_large_as_the_batch_is_the_whole_batch(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)
    fisher = ngd.linearize_fisher(
        case.model_fn, params, x, case.likelihood, microbatch_size=100
    )
    plain = ngd.linearize_fisher(case.model_fn, params, x, case.likelihood)
    vector = random_like(params, rng)
    np.testing.assert_array_equal(
        reference.flat(fisher.matvec(vector)), reference.flat(plain.matvec(vector))
    )
