"""Sums and maps over microbatches against those of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax.microbatches import (
    Chunks,
    chunks_of,
    map_microbatches,
    model_on,
    part_of,
    sum_microbatches,
)

BATCH = {
    "x": jnp.arange(14.0).reshape(7, 2) - 5,
    "scale": jnp.float32(3.0),
    "table": jnp.arange(6.0).reshape(2, 3),
    "key": jax.random.key(0),
}


def _sum_fn(batch):
    return {"sum": batch["scale"] * jnp.sum(batch["x"] ** 2, 0), "n": len(batch["x"])}


def _rows_fn(batch):
    return batch["x"] @ batch["table"] + batch["scale"]


@pytest.mark.parametrize("size", [1, 3, 6, 7])
def test_sums_and_maps_are_those_of_the_whole_batch(size):
    chunks = Chunks(7, size)
    total = sum_microbatches(_sum_fn, BATCH, chunks)
    np.testing.assert_allclose(total["sum"], _sum_fn(BATCH)["sum"], rtol=1e-6)
    assert total["n"] == 7
    rows = map_microbatches(_rows_fn, BATCH, chunks)
    np.testing.assert_allclose(rows, _rows_fn(BATCH), rtol=1e-6)


def test_a_part_has_one_example_of_each_equal_part():
    values = jnp.arange(12)
    parts = [part_of(values, 3, index) for index in range(4)]
    np.testing.assert_array_equal(parts, np.arange(12).reshape(3, 4).T)


def test_what_belongs_to_no_example_stays_whole():
    cut = jax.tree.map(Chunks(7, 2).cuts, BATCH)
    assert cut == {"x": True, "scale": False, "table": False, "key": False}


def test_one_microbatch_is_the_batch_and_what_cannot_be_cut_raises():
    likelihood, outputs = ngd.Gaussian(), jnp.zeros((7, 2))
    assert chunks_of(likelihood, outputs, BATCH, None) is None
    assert chunks_of(likelihood, outputs, BATCH, 7) is None
    assert chunks_of(likelihood, outputs, BATCH, 2) == Chunks(7, 2)
    with pytest.raises(ValueError, match="leading axis of length 7"):
        chunks_of(likelihood, outputs, {"table": BATCH["table"]}, 2)
    with pytest.raises(TypeError, match="`microbatch_size`"):
        chunks_of(likelihood, outputs, BATCH, 2.0)


def test_outputs_by_microbatches_are_those_of_the_model():
    model_fn = lambda w, batch: jnp.tanh(batch["x"] @ w)  # noqa: E731
    w = jnp.ones((2, 3)) / 3
    outputs_at = model_on(model_fn, ngd.Gaussian(), BATCH, 3)
    np.testing.assert_allclose(outputs_at(w), model_fn(w, BATCH), rtol=1e-6)
