import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.signal import correlate2d

from experiments.tasks.supervised.convolution import Conv, convolve

TOLERANCE = {"float32": 2e-6, "float64": 1e-14}


def draws(dtype=None):
    """x, k, tangents of both, and a cotangent; also a kernel longer than its image."""
    image, kernel, out = (2, 6, 3, 3), (3, 5, 3, 2), (2, 3, 2, 2)
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (image, kernel, image, kernel, out)
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def flax_convolve(x, kernel, strides):
    layer = nn.Conv(2, (3, 5), strides=strides, use_bias=False)
    return layer.apply({"params": {"kernel": kernel}}, x)


def test_values_tangents_and_gradients_are_those_of_flax(dtype):
    *at, dx, dk, dy = draws(dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(function, x, k):
        y, push = jax.linearize(lambda x, k: function(x, k, 2), x, k)
        return y, push(dx, dk), jax.linear_transpose(push, x, k)(dy)

    ours, theirs = derivatives(convolve, *at), derivatives(flax_convolve, *at)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == dtype
        limit = TOLERANCE[dtype.name] * float(jnp.max(jnp.abs(other)))
        np.testing.assert_allclose(one, other, rtol=0, atol=limit)


def test_a_convolution_is_the_correlation_of_scipy(x64):
    x = jax.random.normal(jax.random.key(1), (1, 5, 7, 1))
    k = jax.random.normal(jax.random.key(2), (3, 3, 1, 1))
    expected = correlate2d(x[0, :, :, 0], k[:, :, 0, 0], mode="same")
    np.testing.assert_allclose(convolve(x, k)[0, :, :, 0], expected, atol=1e-14)


def test_a_layer_has_the_parameters_of_flax():
    x = jnp.zeros((1, 6, 6, 2))
    ours = Conv(4, (3, 3), strides=2).init(jax.random.key(3), x)
    theirs = nn.Conv(4, (3, 3), strides=2, use_bias=False).init(jax.random.key(3), x)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_every_convolution_has_its_axes_in_the_fast_order():
    x, k, dx, dk, _ = draws()

    def product(x, k):  # as of the metric: a tangent, then a gradient
        y, pull = jax.vjp(lambda x, k: convolve(x, k, 2), x, k)
        tangent = jax.jvp(lambda x, k: convolve(x, k, 2), (x, k), (dx, dk))[1]
        return pull(tangent + y)

    text = str(jax.make_jaxpr(product)(x, k))
    assert text.count("conv_general_dilated[") >= 5
    for place, fast in (("lhs", "0, 3, 1, 2"), ("rhs", "3, 2, 0, 1")):
        parts = text.split(f"{place}_spec=(")[1:]
        assert {part.split(")")[0] for part in parts} == {fast}
