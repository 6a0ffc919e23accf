"""Causal weights, by their definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.equations.weights import causal_weights


def test_causal_weights_are_those_of_the_definition(rng):
    times = rng.permutation(np.r_[0.0, rng.uniform(0, 2, 60), 2.0])
    residuals = rng.normal(size=62)
    with jax.enable_x64(True):
        found = causal_weights(jnp.asarray(times), jnp.asarray(residuals), 0.3, 5)
    edges = np.linspace(0, 2, 6)
    inside = [(times >= a) & (times < b) for a, b in itertools.pairwise(edges)]
    inside[-1] |= times == 2.0
    means = [np.mean(residuals[i] ** 2) for i in inside]
    for number, slice_of_time in enumerate(inside):
        expected = np.exp(-0.3 * sum(means[:number]))
        np.testing.assert_allclose(found[slice_of_time], expected, rtol=1e-12)


def test_weights_are_constants_of_the_step():
    times, residuals = jnp.linspace(0, 1, 8), jnp.linspace(1, 2, 8)
    slope = jax.grad(lambda r: causal_weights(times, r, 1.0, 4).sum())(residuals)
    np.testing.assert_array_equal(slope, 0.0)


def test_one_time_or_no_causality_weighs_nothing():
    r = jnp.ones(4)
    np.testing.assert_array_equal(causal_weights(jnp.ones(4), r, 1.0), 1.0)
    np.testing.assert_array_equal(causal_weights(jnp.arange(4.0), r, 0.0), 1.0)
