import random
import shutil
from collections import Counter

import jax
import pytest

from experiments.running.checkpoints import NUM_KEPT, Checkpoints
from experiments.running.optimizers import OPTIMIZER_CONFIGS
from experiments.running.settings import ConfigError
from tests.experiments.helpers import assert_same_bits, first_state, make_config


def at_step(state, step):
    return state._replace(step=jax.numpy.int32(step))


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZER_CONFIGS))
def test_state_comes_back_bit_for_bit(tmp_path, optimizer):
    state = first_state(make_config(f"optimizer={optimizer}", "seed=5"))
    Checkpoints(tmp_path).save(at_step(state, 7))
    template = first_state(make_config(f"optimizer={optimizer}", "seed=6"))
    restored = Checkpoints(tmp_path).restore_latest(template)
    assert_same_bits(restored, at_step(state, 7))


@pytest.fixture(scope="module")
def state():
    return first_state(make_config("optimizer=adam"))


def test_an_empty_folder_has_no_latest(tmp_path, state):
    assert Checkpoints(tmp_path / "none").restore_latest(state) is None


def test_the_newest_few_are_kept(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, NUM_KEPT + 3):
        checkpoints.save(at_step(state, step))
        checkpoints.save(at_step(state, step))  # the same once more
    steps = sorted(int(path.name) for path in tmp_path.iterdir())
    assert steps == list(range(3, NUM_KEPT + 3))


@pytest.mark.parametrize("leftover", ["8.draft", "8"])
def test_a_half_written_checkpoint_is_passed_over_and_replaced(
    tmp_path, state, leftover
):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at_step(state, 4))
    whole = (tmp_path / "4").read_bytes()
    (tmp_path / leftover).write_bytes(whole[: len(whole) // 2])
    assert_same_bits(checkpoints.restore_latest(state), at_step(state, 4))
    checkpoints.save(at_step(state, 8))
    assert_same_bits(checkpoints.restore_latest(state), at_step(state, 8))


def test_the_checkpoint_of_another_run_is_an_error_and_stays(tmp_path, state):
    Checkpoints(tmp_path).save(state)
    other = first_state(make_config("optimizer=sgd"))
    with pytest.raises(ConfigError, match="of another run or version"):
        Checkpoints(tmp_path).restore_latest(other)
    assert (tmp_path / "0").exists()


def test_where_all_are_damaged_it_is_an_error_and_they_stay(tmp_path, state):
    Checkpoints(tmp_path).save(state)
    (tmp_path / "0").write_bytes(b"")
    with pytest.raises(ConfigError, match="None of the checkpoints"):
        Checkpoints(tmp_path).restore_latest(state)
    assert (tmp_path / "0").exists()


def truncate(path, draws):
    path.write_bytes(path.read_bytes()[: draws.randrange(path.stat().st_size)])


def flip_a_bit(path, draws):
    data = bytearray(path.read_bytes())
    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    path.write_bytes(data)


def fill_a_part(path, draws, *, with_zeros):
    data = bytearray(path.read_bytes())
    start, end = sorted(draws.sample(range(len(data) + 1), 2))
    size = end - start
    data[start:end] = bytes(size) if with_zeros else draws.randbytes(size)
    path.write_bytes(data)


def zero_a_part(path, draws):
    fill_a_part(path, draws, with_zeros=True)


def put_garbage(path, draws):
    fill_a_part(path, draws, with_zeros=False)


def delete(path, draws):
    path.unlink()


def make_a_folder_of_it(path, draws):
    path.unlink()
    path.mkdir()


def swap_with_the_one_before(path, draws):
    other, between = path.with_name("8"), path.with_name("between")
    path.replace(between)
    other.replace(path)
    between.replace(other)


DAMAGES = (
    truncate,
    flip_a_bit,
    zero_a_part,
    put_garbage,
    delete,
    make_a_folder_of_it,
    swap_with_the_one_before,
)


def test_whatever_happens_to_the_newest_it_is_right_or_left_behind(tmp_path, state):
    whole, folder = tmp_path / "whole", tmp_path / "damaged"
    for step in (4, 8, 12):
        Checkpoints(whole).save(at_step(state, step))
    newest = (whole / "12").read_bytes()
    draws, counts = random.Random(0), Counter()
    for number in range(130):
        shutil.copytree(whole, folder)
        damage = DAMAGES[number % len(DAMAGES)]
        damage(folder / "12", draws)
        path = folder / "12"
        is_as_before = path.is_file() and path.read_bytes() == newest
        has_newest = path.exists()
        checkpoints = Checkpoints(folder)
        restored = checkpoints.restore_latest(state)
        if is_as_before:  # zeros upon zeros
            step, reported = 12, 0
        elif damage is swap_with_the_one_before:
            step, reported = 4, 2
        else:
            step, reported = 8, int(has_newest)
        assert_same_bits(restored, at_step(state, step))
        assert len(checkpoints.notices) == reported
        assert (folder / "12.damaged").exists() == bool(reported)
        counts[step] += 1
        # The next run has nothing to report.
        again = Checkpoints(folder)
        assert_same_bits(again.restore_latest(state), restored)
        assert again.notices == []
        shutil.rmtree(folder)
    assert counts.total() == 130
    assert counts[8] >= 100
