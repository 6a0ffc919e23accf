"""The networks of policies and values."""

import flax.linen as nn
import jax
import numpy as np

from experiments.tasks.policies.networks import patches


def test_a_dense_layer_on_patches_is_a_convolution():
    images = jax.random.normal(jax.random.key(0), (2, 3, 6, 5, 4))
    convolution = nn.Conv(7, (3, 3), padding="VALID")
    params = convolution.init(jax.random.key(1), images)["params"]
    dense = {**params, "kernel": params["kernel"].reshape(9 * 4, 7)}
    np.testing.assert_allclose(
        nn.Dense(7).apply({"params": dense}, patches(images)),
        convolution.apply({"params": params}, images),
        rtol=1e-5,
        atol=1e-5,
    )
