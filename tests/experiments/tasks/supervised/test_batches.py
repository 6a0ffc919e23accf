import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from experiments.tasks.supervised.batches import (
    epoch_and_position,
    epoch_permutation,
    take_batch,
)


def indices_of_step(seed, step, num_examples, batch_size):
    key, step = jax.random.key(seed), jnp.int32(step)
    epoch, position = epoch_and_position(step, num_examples, batch_size)
    permutation = epoch_permutation(key, epoch, num_examples)
    return take_batch(jnp.arange(num_examples), permutation, position, batch_size)


# Every other shape compiles a sort of its own.
@given(
    num_examples=st.sampled_from([1, 7, 40]),
    share=st.sampled_from([1, 2, 3, 7]),
    epoch=st.integers(0, 3),
)
def test_batches_of_an_epoch_hold_different_examples(num_examples, share, epoch):
    batch_size = max(num_examples // share, 1)
    per_epoch = num_examples // batch_size
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    batches = [indices_of_step(0, step, num_examples, batch_size) for step in steps]
    seen = np.concatenate(batches)
    assert len(seen) == per_epoch * batch_size
    assert len(set(seen.tolist())) == len(seen)
    assert set(seen.tolist()) <= set(range(num_examples))


def test_batch_depends_on_nothing_but_seed_and_step():
    np.testing.assert_array_equal(
        indices_of_step(3, 17, 100, 8), indices_of_step(3, 17, 100, 8)
    )


def test_epochs_and_seeds_have_orders_of_their_own():
    first = indices_of_step(0, 0, 100, 100)
    assert (first != indices_of_step(0, 1, 100, 100)).any()
    assert (first != indices_of_step(1, 0, 100, 100)).any()


def test_all_leaves_are_gathered_by_the_same_indices():
    data = {"x": jnp.arange(20.0).reshape(10, 2), "y": jnp.arange(10)}
    batch = take_batch(data, jnp.arange(10)[::-1], jnp.int32(1), 4)
    np.testing.assert_array_equal(batch["y"], [5, 4, 3, 2])
    np.testing.assert_array_equal(batch["x"][:, 0], 2.0 * batch["y"])
