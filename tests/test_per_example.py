"""Rows of A against the Jacobian, the order of rows, real coordinates, random signs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax import per_example
from tests.fisher_cases import CASES


@pytest.mark.parametrize(
    ("name", "count"), [("categorical", 3), ("complex amplitude", None)]
)
def test_rows_in_order_are_the_matrix_of_the_root(name, count, rng, x64):
    case = CASES[name]
    params, x = case.make(rng, "float64")
    fisher = ngd.linearize_fisher(case.model_fn, params, x, case.likelihood)
    (group,) = per_example.groups_of(fisher)
    size, num_blocks = group.blocks(count)

    def rows_of(row, units):
        return jax.vmap(lambda unit: per_example.ravel_real(row(unit))[0])(units)

    on_block = jax.jit(lambda block: group.map(rows_of, block, size))

    total = group.size * group.rows_per_example
    matrix = np.full((total, per_example.real_size(params)), np.nan)
    for block in range(num_blocks):
        place, _, rows = on_block(block)
        rows = per_example.flat_rows(rows)
        matrix[int(place) : int(place) + len(rows)] = rows
    order = per_example.order_of(fisher, [group], [size])
    vector, unravel = per_example.ravel_real(params)
    vector = jnp.asarray(rng.normal(size=vector.size))
    truth = per_example.ravel_real(fisher.sqrt_matvec(unravel(vector)))[0]
    np.testing.assert_allclose((matrix @ vector)[order], truth, rtol=1e-9, atol=1e-12)


def test_a_batch_without_examples_has_no_rows():
    x = jnp.ones((4, 2))
    fisher = ngd.linearize_fisher(
        lambda w, scale: scale * (x @ w), jnp.ones((2, 3)), jnp.ones(()), ngd.Gaussian()
    )
    with pytest.raises(per_example.NoRowsError, match="leading axis of length 4"):
        per_example.groups_of(fisher)


def test_real_coordinates_keep_the_inner_product_and_come_back(rng):
    draw = lambda: {  # noqa: E731
        "a": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=4) + 1j * rng.normal(size=4), jnp.complex64),
    }
    first, second = draw(), draw()
    vector, unravel = per_example.ravel_real(first)
    assert vector.shape == (14,) == (per_example.real_size(first),)
    expected = np.sum(first["a"] * second["a"])
    expected += np.sum(np.real(np.conj(first["b"]) * second["b"]))
    product = vector @ per_example.ravel_real(second)[0]
    np.testing.assert_allclose(product, expected, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, unravel(vector), first)


def test_random_signs_are_signs_without_correlation():
    like = {"a": jnp.zeros((40, 50)), "b": jnp.zeros(1000, jnp.complex64)}
    draws = np.stack(
        [
            per_example.ravel_real(per_example.random_signs(like, count))[0]
            for count in (None, 0, 1, 2)
        ]
    )
    np.testing.assert_array_equal(np.abs(draws), 1)
    # 4,000 signs: the mean of products has a standard deviation of 0.016.
    correlations = draws @ draws.T / draws.shape[1] - np.eye(len(draws))
    assert np.abs(correlations).max() < 0.08
    assert np.abs(draws.mean(1)).max() < 0.08
    shifted = np.mean(draws[:, 1:] * draws[:, :-1], axis=1)
    assert np.abs(shifted).max() < 0.08
