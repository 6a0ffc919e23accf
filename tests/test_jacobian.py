"""J v and Jᵀ c against the Jacobian by finite columns, real and complex."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngd_jax.jacobian import adjoint, linearize


def _model_fn(params, x):
    z = x @ params["w"]
    return jnp.sin(z) + params["b"] * jnp.conj(z) * z


def _problem(rng, dtype):
    draw = lambda *shape: jnp.asarray(  # noqa: E731
        rng.normal(size=shape) + 1j * rng.normal(size=shape)
        if np.issubdtype(dtype, np.complexfloating)
        else rng.normal(size=shape),
        dtype,
    )
    return {"w": draw(3, 2), "b": draw(2)}, draw(5, 3)


def _inner(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(np.sum(np.real(np.conj(x) * np.asarray(y))) for x, y in pairs)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_push_is_the_derivative_and_pull_its_adjoint(dtype, rng, x64):
    params, x = _problem(rng, dtype)
    vector, _ = _problem(rng, dtype)
    found = linearize(_model_fn, params, x)
    np.testing.assert_array_equal(found.outputs, _model_fn(params, x))
    pushed, size = found.push(vector), 1e-6
    ends = [
        _model_fn(jax.tree.map(lambda p, v, s=s: p + s * v, params, vector), x)
        for s in (size, -size)
    ]
    np.testing.assert_allclose(pushed, (ends[0] - ends[1]) / (2 * size), rtol=1e-7)
    cotangents = jnp.asarray(_problem(rng, dtype)[1][:, :2])
    pulled = found.pull(cotangents)
    np.testing.assert_allclose(
        _inner(pulled, vector), _inner(cotangents, pushed), rtol=1e-12
    )


def test_narrow_parameters_have_wide_vectors_and_their_own_outputs(rng):
    params, x = _problem(rng, "float32")
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    found = linearize(_model_fn, params, x)
    np.testing.assert_array_equal(found.outputs, _model_fn(params, x))
    pulled = found.pull(jnp.ones_like(found.outputs))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(pulled)} == {"float32"}


def test_adjoint_of_a_complex_matrix_is_its_conjugate_transpose(rng, x64):
    matrix = rng.normal(size=(4, 3)) + 1j * rng.normal(size=(4, 3))
    vector = rng.normal(size=4) + 1j * rng.normal(size=4)
    pull = adjoint(lambda v: matrix @ v, jnp.zeros(3, complex))
    np.testing.assert_allclose(pull(jnp.asarray(vector)), matrix.conj().T @ vector)
