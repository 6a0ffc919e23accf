import random
import shutil
import subprocess
from collections import Counter

import jax
import pytest

from experiments.running.checkpoints import NUM_KEPT, Checkpoints
from experiments.running.settings import ConfigError
from tests.experiments.helpers import (
    OPTIMIZERS,
    assert_same_bits,
    first_state,
    make_config,
)


def at_step(state, step):
    return state._replace(step=jax.numpy.int32(step))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_comes_back_bit_for_bit(tmp_path, optimizer):
    state = first_state(make_config(f"optimizer={optimizer}", "seed=5"))
    Checkpoints(tmp_path).save(at_step(state, 7))
    template = first_state(make_config(f"optimizer={optimizer}", "seed=6"))
    restored = Checkpoints(tmp_path).restore_latest(template)
    assert_same_bits(restored, at_step(state, 7))


@pytest.fixture(scope="module")
def state():
    return first_state(make_config("optimizer=adam"))


def test_double_precision_of_this_thread_alone_comes_back(tmp_path, state):
    with jax.enable_x64(True):
        third = jax.numpy.full(3, 1 / 3, jax.numpy.float64)
        saved = state._replace(params={"x": third})
        Checkpoints(tmp_path).save(saved)
        template = state._replace(params={"x": 0 * third})
        assert_same_bits(Checkpoints(tmp_path).restore_latest(template), saved)


def test_an_empty_folder_has_no_latest(tmp_path, state):
    assert Checkpoints(tmp_path / "none").restore_latest(state) is None


def test_the_newest_few_are_kept(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, NUM_KEPT + 3):
        checkpoints.save(at_step(state, step))
        checkpoints.save(at_step(state, step))  # the same once more
    kept = range(3, NUM_KEPT + 3)
    names = {name for step in kept for name in (f"{step}", f"{step}.sha256")}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_checksums_are_those_of_the_usual_program(tmp_path, state):
    Checkpoints(tmp_path).save(at_step(state, 4))
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum")
    subprocess.run(["sha256sum", "-c", "4.sha256"], cwd=tmp_path, check=True)


@pytest.mark.parametrize("leftover", ["8", "8.orbax-checkpoint-tmp", "8.sha256"])
def test_what_a_killed_process_leaves_is_passed_over_and_replaced(
    tmp_path, state, leftover
):
    """A step without checksums, one that Orbax has not committed, or no step."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at_step(state, 4))
    checkpoints.save(at_step(state, 8))
    (tmp_path / "8").replace(tmp_path / "between")
    checksums = (tmp_path / "8.sha256").read_bytes()
    (tmp_path / "8.sha256").unlink()
    if leftover == "8.sha256":
        shutil.rmtree(tmp_path / "between")
        (tmp_path / leftover).write_bytes(checksums)
    else:
        (tmp_path / "between").replace(tmp_path / leftover)
    assert_same_bits(checkpoints.restore_latest(state), at_step(state, 4))
    assert checkpoints.notices == []
    checkpoints.save(at_step(state, 8))
    assert_same_bits(checkpoints.restore_latest(state), at_step(state, 8))
    names = {"4", "4.sha256", "8", "8.sha256"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_what_was_left_half_written_is_removed_by_a_later_step(tmp_path, state):
    checkpoints = Checkpoints(tmp_path)
    for step in (4, 8):
        checkpoints.save(at_step(state, step))
    (tmp_path / "8.sha256").unlink()
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    checkpoints.save(at_step(state, 12))
    names = {"4", "4.sha256", "12", "12.sha256"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_step_that_is_damaged_twice_is_set_aside_twice(tmp_path, state):
    for _ in range(2):
        checkpoints = Checkpoints(tmp_path)
        for step in (4, 8):
            checkpoints.save(at_step(state, step))
        delete(tmp_path / "8" / "_METADATA", None)
        assert_same_bits(checkpoints.restore_latest(state), at_step(state, 4))
        assert len(checkpoints.notices) == 1
    assert (tmp_path / "8.damaged").is_dir()


def test_the_checkpoint_of_another_run_is_an_error_and_stays(tmp_path, state):
    Checkpoints(tmp_path).save(state)
    other = first_state(make_config("optimizer=sgd"))
    with pytest.raises(ConfigError, match="of another run or version"):
        Checkpoints(tmp_path).restore_latest(other)
    assert (tmp_path / "0").exists()


def test_the_checkpoint_of_other_dtypes_is_an_error(tmp_path, state):
    Checkpoints(tmp_path).save(state)
    other = state._replace(step=state.step.astype(jax.numpy.int16))
    with pytest.raises(ConfigError, match="of another run or version"):
        Checkpoints(tmp_path).restore_latest(other)


def test_where_all_are_damaged_it_is_an_error_and_they_stay(tmp_path, state):
    Checkpoints(tmp_path).save(state)
    (tmp_path / "0" / "_METADATA").write_bytes(b"")
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


def add_another(path, draws):
    path.with_name("another").write_bytes(draws.randbytes(9))


DAMAGES = (
    truncate,
    flip_a_bit,
    zero_a_part,
    put_garbage,
    delete,
    make_a_folder_of_it,
    add_another,
)


def swap(path, other):
    between = path.with_name("between")
    path.replace(between)
    other.replace(path)
    between.replace(other)


def contents(folder):
    """Every file of the newest step and its checksums."""
    paths = [folder / "12.sha256", *(folder / "12").rglob("*")]
    return {
        path.relative_to(folder): path.read_bytes() for path in paths if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("whole")
    for step in (4, 8, 12):
        Checkpoints(folder).save(at_step(state, step))
    return folder


@pytest.mark.parametrize("number", [20, pytest.param(130, marks=pytest.mark.long)])
def test_whatever_happens_to_the_newest_it_is_right_or_left_behind(
    whole, tmp_path, state, number
):
    folder = tmp_path / "damaged"
    as_saved = contents(whole)
    draws, counts = random.Random(0), Counter()
    for index in range(number):
        shutil.copytree(whole, folder)
        damage = DAMAGES[index % len(DAMAGES)]
        name = "12.sha256" if index % 5 == 0 else draws.choice(sorted(as_saved))
        damage(folder / name, draws)
        is_as_saved = contents(folder) == as_saved
        has_checksums = (folder / "12.sha256").exists()
        checkpoints = Checkpoints(folder)
        restored = checkpoints.restore_latest(state)
        step = 12 if is_as_saved else 8  # zeros upon zeros
        reported = int(has_checksums and not is_as_saved)
        assert_same_bits(restored, at_step(state, step))
        assert len(checkpoints.notices) == reported
        assert (folder / "12.damaged").exists() == bool(reported)
        counts[step] += 1
        # The next run has nothing to report.
        again = Checkpoints(folder)
        assert_same_bits(again.restore_latest(state), restored)
        assert again.notices == []
        shutil.rmtree(folder)
    assert counts.total() == number
    assert counts[8] >= 0.8 * number


@pytest.mark.parametrize(
    "names",
    [
        ("",),
        (".sha256",),
        ("", ".sha256"),
        ("/_CHECKPOINT_METADATA",),
        ("/manifest.ocdbt",),
    ],
)
def test_exchanged_files_are_damage(whole, tmp_path, state, names):
    folder = tmp_path / "exchanged"
    shutil.copytree(whole, folder)
    for name in names:
        swap(folder / f"12{name}", folder / f"8{name}")
    checkpoints = Checkpoints(folder)
    assert_same_bits(checkpoints.restore_latest(state), at_step(state, 4))
    assert len(checkpoints.notices) == 2


def test_without_the_newest_folder_the_one_before_is_taken(whole, tmp_path, state):
    folder = tmp_path / "deleted"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "12")
    checkpoints = Checkpoints(folder)
    assert_same_bits(checkpoints.restore_latest(state), at_step(state, 8))
    assert checkpoints.notices == []
