"""Real coordinates keep inner products and come back; random signs are random."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ngd_jax.coordinates import random_signs, ravel_real, real_size
from tests import reference
from tests.fisher_cases import random_like


@given(seed=st.integers(0, 2**32 - 1))
def test_real_coordinates_keep_inner_products_and_come_back(seed):
    rng = np.random.default_rng(seed)
    like = {"a": jnp.ones((2, 3)), "b": [jnp.ones(2, complex)], "c": jnp.ones((0, 3))}
    u, v = random_like(like, rng), random_like(like, rng)
    (a, unravel), (b, _) = ravel_real(u), ravel_real(v)
    assert a.shape == (real_size(like),) == (10,)
    expected = np.vdot(reference.flat(u), reference.flat(v)).real
    np.testing.assert_allclose(a @ b, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, unravel(a), u)


def test_signs_are_random(x64):
    like = {"c": jnp.zeros(500, complex), "r": jnp.zeros((40, 50))}
    draw = jax.jit(jax.vmap(lambda count: random_signs(like, count)))
    signs = draw(jnp.arange(600))
    assert signs["c"].dtype == jnp.complex128
    parts = [signs["c"].real, signs["c"].imag, signs["r"].reshape(600, -1)]
    table = np.concatenate(parts, axis=1)  # [batches, places]
    assert set(np.unique(table)) == {-1.0, 1.0}
    # Means of rows, of columns and of all, in units of their standard deviation.
    count, size = table.shape
    assert abs(table.mean()) * np.sqrt(count * size) < 4
    for axis in (0, 1):
        z = table.mean(axis) * np.sqrt(table.shape[axis])
        assert np.abs(z).max() < 5
        assert abs(z.var() - 1) < 0.2
    # Correlations of all pairs of places over the batches, and of batches over places.
    for rows in (table[:, :400].T, table[:400]):
        rows = np.ascontiguousarray(rows)
        z = (rows @ rows.T / np.sqrt(rows.shape[1]))[np.triu_indices(len(rows), 1)]
        assert np.abs(z).max() < 6
        assert abs(z.var() - 1) < 0.03
    # Neighbours in groups of three, which a bad hash correlates.
    triples = table[:, :-2] * table[:, 1:-1] * table[:, 2:]
    assert abs(triples.mean()) * np.sqrt(triples.size) < 5
