"""Real coordinates keep inner products and come back; random signs."""

import jax
import jax.numpy as jnp
import numpy as np

from ngd_jax.coordinates import random_signs, ravel_real, real_size


def test_real_coordinates_keep_the_inner_product_and_come_back(rng):
    draw = lambda: {  # noqa: E731
        "a": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=4) + 1j * rng.normal(size=4), jnp.complex64),
    }
    first, second = draw(), draw()
    vector, unravel = ravel_real(first)
    assert vector.shape == (14,) == (real_size(first),)
    expected = np.sum(first["a"] * second["a"])
    expected += np.sum(np.real(np.conj(first["b"]) * second["b"]))
    product = vector @ ravel_real(second)[0]
    np.testing.assert_allclose(product, expected, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, unravel(vector), first)


def test_random_signs_are_signs_without_correlation():
    like = {"a": jnp.zeros((40, 50)), "b": jnp.zeros(1000, jnp.complex64)}
    draws = np.stack(
        [ravel_real(random_signs(like, count))[0] for count in (None, 0, 1, 2)]
    )
    np.testing.assert_array_equal(np.abs(draws), 1)
    # 4,000 signs: the mean of products has a standard deviation of 0.016.
    correlations = draws @ draws.T / draws.shape[1] - np.eye(len(draws))
    assert np.abs(correlations).max() < 0.08
    assert np.abs(draws.mean(1)).max() < 0.08
    shifted = np.mean(draws[:, 1:] * draws[:, :-1], axis=1)
    assert np.abs(shifted).max() < 0.08
