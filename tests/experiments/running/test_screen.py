import io

import pytest
from rich.console import Console

from experiments.running.screen import Column, Screen

RECORD = {
    "step": 1,
    "loss": 0.5,
    "accuracy": 0.75,
    "measured_kl": 0.01,
    "max_kl": 0.02,
    "solver_steps": 7,
    "damping": 1e-3,
    "status": 0,
}


COLUMNS = (
    Column("train loss", "train_loss", ".2e"),
    Column("test acc", "test_accuracy", ".1%"),
)


def show(records, *, terminal=False, log_every=1, last_step=4):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=80)
    with Screen(
        console,
        title="run",
        columns=COLUMNS,
        first_step=0,
        last_step=last_step,
        log_every=log_every,
    ) as screen:
        for record in records:
            screen.show_step(record)
        screen.show_progress(records[-1])
    return output.getvalue()


def steps_of(output):
    return [int(line.split()[0]) for line in output.splitlines()[1:]]


def test_every_step_is_a_row_under_one_heading():
    records = [{**RECORD, "step": step} for step in range(1, 5)]
    output = show(records)
    heading, *rows = output.splitlines()
    for title in ("step", "loss", "accuracy", "KL/nats", "radius", "solver", "damping"):
        assert title in heading
    assert len(rows) == 4
    assert rows[0].split() == [
        "1", "5.00e-01", "75.0%", "1.00e-02", "2.00e-02", "7", "1.00e-03"
    ]  # fmt: skip
    assert all(len(row) <= 80 for row in rows)


def test_evaluations_stand_in_the_row_of_their_step():
    record = {**RECORD, "train_loss": 0.25, "test_accuracy": 0.9}
    assert show([record]).split()[-2:] == ["2.50e-01", "90.0%"]


def test_rows_come_at_the_interval_asked_for_and_at_the_end():
    records = [{**RECORD, "step": step} for step in range(1, 8)]
    assert steps_of(show(records, log_every=3, last_step=7)) == [3, 6, 7]


@pytest.mark.parametrize("value", [None])
def test_a_loss_that_is_not_finite_is_shown(value):
    assert "nan" in show([{**RECORD, "loss": value}])


def test_a_refused_step_says_why():
    assert "Refused: the gradient is not finite." in show([{**RECORD, "status": 1}])


def test_without_a_terminal_there_are_no_control_codes():
    assert "\x1b" not in show([RECORD])


def test_on_a_terminal_a_bar_has_the_numbers_of_the_last_step():
    output = show([RECORD], terminal=True)
    for text in ("1/4", "loss 5.0e-01", "acc 75%", "KL 1.0e-02", "solver 7"):
        assert text in output
