"""Streamed batches: equal to the device's, in order, bounded, resumed bit for bit."""

import os
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.running.run_folder import read_json_lines
from experiments.tasks.supervised.batches import (
    epoch_and_position,
    epoch_permutation,
    take_batch,
)
from experiments.tasks.supervised.streaming import HostBatches, size_in_mib, stream
from tests.experiments.helpers import (
    REPOSITORY,
    assert_same_bits,
    make_config,
    train_config,
)
from tests.marks import long_unless

KEY = jax.random.key(3)
DATA = {"x": np.arange(44.0, dtype=np.float32).reshape(22, 2), "y": np.arange(22)}


def make_batches(data=DATA):
    return HostBatches(data, KEY, batch_size=5, capacity=3)


def streaming_threads():
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_batches_are_those_of_the_device():
    batches = make_batches()
    for step in (0, 3, 4, 17, 2):  # across epochs of four batches, and back
        taken = batches.take(step, 2)
        for index in range(2):
            epoch, position = epoch_and_position(jnp.int32(step + index), 22, 5)
            order = epoch_permutation(KEY, epoch, 22)
            expected = take_batch(DATA, order, position, 5)
            for name, leaf in taken.items():
                np.testing.assert_array_equal(leaf[index], expected[name])


def test_stack_is_always_of_the_same_shape_and_type():
    taken = make_batches().take(6, 1)
    assert (taken["x"].shape, taken["x"].dtype) == ((3, 5, 2), np.float32)
    assert not taken["x"][1:].any()


def test_memory_mapped_arrays_give_the_same_batches(tmp_path):
    np.save(tmp_path / "x.npy", DATA["x"])
    mapped = {**DATA, "x": np.load(tmp_path / "x.npy", mmap_mode="r")}
    assert_same_bits(make_batches(mapped).take(2, 3), make_batches().take(2, 3))


READS_OF_FOUR_DEVICES = """
import jax, numpy as np
from experiments.running.distributed import make_mesh
from experiments.tasks.supervised.streaming import HostBatches

class Reads(np.ndarray):
    def __getitem__(self, index):
        sizes.append(len(index))
        return np.asarray(super().__getitem__(index))

for batch_size in (8, 6):
    sizes = []
    data = {"x": np.arange(44.0).reshape(22, 2).view(Reads)}
    key = jax.random.key(3)
    batches = HostBatches(data, key, batch_size=batch_size, capacity=3)
    taken = batches.take(1, 2, make_mesh())["x"]
    data = {"x": np.asarray(data["x"])}
    whole = HostBatches(data, key, batch_size=batch_size, capacity=3).take(1, 2)["x"]
    assert (np.asarray(taken) == whole).all()
    print(sorted(set(sizes)), tuple(taken.sharding.spec))
"""


def test_a_device_reads_its_own_examples_only():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    printed = subprocess.run(
        [sys.executable, "-c", READS_OF_FOUR_DEVICES],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # Six examples cannot be divided equally.
    divided, whole = printed.splitlines()
    assert divided == "[2] (None, 'data')"
    assert whole == "[6] ()"


def test_stream_follows_the_plan_and_ends_with_it():
    plan = [(0, 3), (3, 1), (4, 2)]
    with stream(make_batches(), plan, prefetch=2) as dispatches:
        received = list(dispatches)
    for (step, num_steps), batches in zip(plan, received, strict=True):
        assert_same_bits(batches["x"], make_batches().take(step, num_steps)["x"])
    assert not streaming_threads()


def test_no_more_than_the_bound_is_gathered_in_advance():
    asked = []

    def plan():
        for step in range(50):
            asked.append(step)
            yield step, 1

    with stream(make_batches(), plan(), prefetch=2) as dispatches:
        next(dispatches)
        time.sleep(0.5)
        # One received, two that wait, one in the hands of the thread.
        assert len(asked) <= 4
    assert not streaming_threads()


def test_error_in_the_thread_is_raised_where_its_batch_was_due():
    def plan():
        yield 0, 1
        raise OSError("the disk is gone")

    with (
        pytest.raises(OSError, match="the disk is gone"),
        stream(make_batches(), plan(), prefetch=1) as dispatches,
    ):
        list(dispatches)
    assert not streaming_threads()


def test_size_is_in_mib():
    assert size_in_mib({"x": np.zeros((2**20, 2), np.uint8)}) == 2.0


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed")
    config = make_config("optimizer=sgd", "stream_above=0")
    return config, folder, train_config(config, folder)


class TestRuns:
    def test_streamed_run_takes_the_steps_of_one_on_the_device(
        self, streamed, tmp_path
    ):
        _, folder, result = streamed
        other = train_config(make_config("optimizer=sgd"), tmp_path)
        rows = read_json_lines(folder / "metrics.jsonl")
        other_rows = read_json_lines(tmp_path / "metrics.jsonl")
        losses = [row["loss"] for row in rows]
        np.testing.assert_allclose(losses, [row["loss"] for row in other_rows], 1e-5)
        np.testing.assert_allclose(
            list(result.metrics.values()), list(other.metrics.values()), 1e-4
        )

    @pytest.mark.parametrize("step", long_unless([4], [4, 6]))
    def test_resumes_to_the_same_bits_from_anywhere(self, streamed, tmp_path, step):
        config, folder, result = streamed
        resumed = tmp_path / "resumed"
        shutil.copytree(folder, resumed)
        for path in (resumed / "checkpoints").glob("*.sha256"):
            if int(path.stem) >= step:
                path.unlink()
        assert_same_bits(train_config(config, resumed).state, result.state)
        metrics = (resumed / "metrics.jsonl").read_bytes()
        assert metrics == (folder / "metrics.jsonl").read_bytes()

    def test_any_cut_into_dispatches_gives_the_same_bits(self, streamed, tmp_path):
        _, _, result = streamed
        config = make_config(
            "optimizer=sgd", "stream_above=0", "eval_every=1", "prefetch=1"
        )
        assert_same_bits(train_config(config, tmp_path).state, result.state)
