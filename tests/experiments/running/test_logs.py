import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.running.logs import JsonLines, RunLogs, plain_number

LINES = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 6))


@pytest.mark.parametrize(
    ("text", "last_step", "kept"),
    [
        ("", 0, 0),
        (LINES, 5, 5),
        (LINES, 3, 3),
        (LINES, 0, 0),
        (LINES + '{"step": 6, "lo', 5, 5),  # cut short by a kill
        (LINES + '{"step": 6, "loss": 2.0}', 5, 5),  # cut before its end of line
        (LINES + "\0\0\0", 5, 5),  # a hole left by a power cut
    ],
)
def test_opening_keeps_the_whole_lines_up_to_the_last_step(
    tmp_path, text, last_step, kept
):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    lines = JsonLines(path, last_step)
    lines.close()
    assert lines.notices == []
    assert path.read_text() == "".join(LINES.splitlines(keepends=True)[:kept])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("start", "damage", "steps"),
    [
        (30, b"\0" * 40, [1, 4, 5]),
        (30, bytes(range(128, 168)), [1, 4, 5]),
        (0, b"[]\n", [2, 3, 4, 5]),
        (0, b"", []),
        (70, b"", [1, 2]),
    ],
    ids=["hole", "binary", "another value", "emptied", "cut"],
)
def test_damage_before_the_last_step_is_reported_and_nothing_is_lost(
    tmp_path, start, damage, steps
):
    path = tmp_path / "metrics.jsonl"
    whole = LINES.encode()
    rest = whole[start + len(damage) :] if damage else b""
    path.write_bytes(whole[:start] + damage + rest)
    damaged = path.read_bytes()
    lines = JsonLines(path, 5)
    [notice] = lines.notices
    assert f"{path}.damaged, and the {len(steps)} lines that can be read" in notice
    lines.write({"step": 6})
    lines.close()
    found = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert found == [*steps, 6]
    assert path.with_name("metrics.jsonl.damaged").read_bytes() == damaged


def test_lines_are_appended_after_those_that_were_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(LINES)
    lines = JsonLines(path, 2)
    lines.write({"step": 3, "loss": None})
    lines.sync()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 2, 3]
    lines.close()


@given(st.floats(width=32))
def test_float32_survives_the_file(value):
    number = plain_number(jnp.float32(value))
    if not np.isfinite(value):
        assert number is None
        return
    assert np.float32(json.loads(json.dumps(number))) == np.float32(value)


def test_integers_stay_integers():
    assert plain_number(jnp.int32(3)) == 3
    assert isinstance(plain_number(np.int32(3)), int)


def test_tensorboard_shows_the_steps_that_count_only(tmp_path):
    with RunLogs(tmp_path, 0) as logs:
        for step in range(1, 7):
            logs.write_step({"step": step, "loss": 1.0 * step, "test_accuracy": 0.5})
    with RunLogs(tmp_path, 4) as logs:  # resumed at step 4: 5 and 6 are taken again
        logs.write_step({"step": 5, "loss": 50.0, "measured_kl": None})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("step/loss")]
    assert scalars == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]
    assert len(events.Scalars("evaluation/test_accuracy")) == 4


def test_seconds_go_on_from_the_last_that_was_logged(tmp_path):
    with RunLogs(tmp_path, 0) as logs:
        assert logs.seconds == 0.0
        logs.write_time(2, 1.5)
        logs.write_time(4, 3.5)
    with RunLogs(tmp_path, 2) as logs:
        assert logs.seconds == 1.5
