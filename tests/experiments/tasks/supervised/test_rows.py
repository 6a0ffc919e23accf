"""Networks that read the rows of an image: what they must not see."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.running.settings import ConfigError
from experiments.tasks import make_task
from experiments.tasks.supervised.images import to_unit_interval
from tests.experiments.tasks.supervised.small_tasks import configure, first_batch
from tests.marks import long_unless


@pytest.mark.parametrize("name", long_unless(["gru"], ["gru", "row_transformer"]))
def test_rows_that_are_not_there_change_nothing(name, data_dir):
    task = make_task(configure(name, data_dir).task)
    params, _ = task.init_fn(jax.random.key(0))
    batch = first_batch(task)
    rows = jnp.arange(28) < batch["length"][:, None]
    is_there = jnp.repeat(rows, 28, axis=1)
    outputs = task.model_fn(params, batch)
    other = batch | {"x": jnp.where(is_there, batch["x"], 255 - batch["x"])}
    np.testing.assert_array_equal(task.model_fn(params, other), outputs)
    other = batch | {"x": jnp.where(is_there, 255 - batch["x"], batch["x"])}
    assert jnp.all(jnp.any(task.model_fn(params, other) != outputs, axis=1))


def test_the_recurrent_network_is_its_cell_row_by_row(data_dir):
    task = make_task(configure("gru", data_dir).task)
    params, _ = task.init_fn(jax.random.key(0))
    batch = first_batch(task, 2)
    (cell,) = (value for name, value in params.items() if "GRU" in name)
    (dense,) = (value for name, value in params.items() if "Dense" in name)
    step = jax.jit(lambda carry, row: nn.GRUCell(4).apply({"params": cell}, carry, row))
    outputs = task.model_fn(params, batch)
    for k in range(2):
        carry = jnp.zeros((4,))
        rows = to_unit_interval(batch["x"][k]).reshape(28, 28)
        for row in rows[: int(batch["length"][k])]:
            carry, _ = step(carry, row)
        expected = carry @ dense["kernel"] + dense["bias"]
        np.testing.assert_allclose(outputs[k], expected, rtol=1e-4, atol=1e-6)


def test_lengths_are_half_to_all_of_the_rows(data_dir):
    lengths = make_task(configure("gru", data_dir).task).train["length"]
    assert lengths.min() >= 14
    assert lengths.max() <= 28
    assert len(set(lengths.tolist())) > 5


def test_heads_must_divide_the_width(data_dir):
    config = configure("row_transformer", data_dir, "task.num_heads=3")
    with pytest.raises(ConfigError, match=r"num_heads.*must divide"):
        make_task(config.task)
