"""Rows of A against the operator, and their order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax import per_example
from ngd_jax.coordinates import ravel_real, real_size
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
        return jax.vmap(lambda unit: ravel_real(row(unit))[0])(units)

    on_block = jax.jit(lambda block: group.map(rows_of, block, size))

    total = group.size * group.rows_per_example
    matrix = np.full((total, real_size(params)), np.nan)
    for block in range(num_blocks):
        place, _, rows = on_block(block)
        rows = per_example.flat_rows(rows)
        matrix[int(place) : int(place) + len(rows)] = rows
    order = per_example.order_of(fisher, [group], [size])
    vector, unravel = ravel_real(params)
    vector = jnp.asarray(rng.normal(size=vector.size))
    truth = ravel_real(fisher.sqrt_matvec(unravel(vector)))[0]
    np.testing.assert_allclose((matrix @ vector)[order], truth, rtol=1e-9, atol=1e-12)


def test_a_batch_without_examples_has_no_rows():
    x = jnp.ones((4, 2))
    fisher = ngd.linearize_fisher(
        lambda w, scale: scale * (x @ w), jnp.ones((2, 3)), jnp.ones(()), ngd.Gaussian()
    )
    with pytest.raises(per_example.NoRowsError, match="leading axis of length 4"):
        per_example.groups_of(fisher)
