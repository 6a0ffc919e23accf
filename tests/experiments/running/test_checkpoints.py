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
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at_step(state, 7))
    template = first_state(make_config(f"optimizer={optimizer}", "seed=6"))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(template)
    assert_same_bits(restored, at_step(state, 7))


def test_an_empty_folder_has_no_latest(tmp_path):
    state = first_state(make_config("optimizer=sgd"))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(state) is None


def test_the_newest_few_are_kept(tmp_path):
    state = first_state(make_config("optimizer=sgd"))
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, NUM_KEPT + 3):
            checkpoints.save(at_step(state, step))
            checkpoints.save(at_step(state, step))  # the same once more
    steps = sorted(int(path.name) for path in tmp_path.iterdir())
    assert steps == list(range(3, NUM_KEPT + 3))


@pytest.mark.parametrize("leftover", ["8.orbax-checkpoint-tmp", "8"])
def test_a_half_written_checkpoint_is_passed_over_and_replaced(tmp_path, leftover):
    state = first_state(make_config("optimizer=adam"))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at_step(state, 4))
    (tmp_path / leftover / "default").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(state)
        assert restored is not None
        assert int(restored.step) == 4
        checkpoints.save(at_step(state, 8))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(state)
        assert restored is not None
        assert int(restored.step) == 8


def test_checkpoints_of_another_run_are_an_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(first_state(make_config("optimizer=adam")))
    other = first_state(make_config("optimizer=sgd"))
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ConfigError, match="None of the checkpoints"),
    ):
        checkpoints.restore_latest(other)
    assert (tmp_path / "0").exists()
