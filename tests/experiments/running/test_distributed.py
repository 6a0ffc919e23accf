"""One run over several devices and several processes: the same result as on one."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
from omegaconf import OmegaConf

from experiments.running.config import read_config
from experiments.running.distributed import DistributedConfig
from experiments.running.interruption import EXIT_INTERRUPTED
from experiments.running.run_folder import read_json_lines
from experiments.running.settings import ConfigError
from tests.experiments.helpers import (
    SMALL,
    last_state,
    run_program,
    start_program,
    train,
    train_config,
    wait_for,
)

TWO = "distributed.num_processes=2"
# Few CG steps: round-off grows by orders of magnitude in each of the later ones.
SHORT_SOLVE = (*SMALL, "optimizer.solver.max_steps=4")
# SGD compiles fast and does not amplify round-off; long enough to be stopped.
LONG = (
    "optimizer=sgd",
    "task.hidden_sizes=[8]",
    "batch_size=63",  # odd: the two halves differ in size
    "steps=1200",
    "steps_per_dispatch=5",
    "eval_every=600",
    "checkpoint_every=100",
    "log_every=1000",
)


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc"
)


def recorded_config(folder):
    return read_config(OmegaConf.load(folder / "config.yaml"))


def assert_same_numbers(folder, other, *, rtol):
    """The metrics of all steps and the last states agree to round-off."""
    rows = read_json_lines(folder / "metrics.jsonl")
    other_rows = read_json_lines(other / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in other_rows]
    for row, other_row in zip(rows, other_rows, strict=True):
        assert row.keys() == other_row.keys()
        np.testing.assert_allclose(row["loss"], other_row["loss"], rtol=rtol)
    state, other_state = (
        last_state(recorded_config(path), path) for path in (folder, other)
    )
    assert int(state.step) == int(other_state.step)
    for leaf, other_leaf in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(other_state.params), strict=True
    ):
        np.testing.assert_allclose(leaf, other_leaf, rtol=rtol, atol=rtol)


def worker_pids(folder):
    """The processes that run in `folder`, without their launcher, in their order."""
    pids = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = path.read_text().split("\0")
            numbers = [
                int(argument.partition("=")[2])
                for argument in arguments
                if argument.startswith("distributed.process_id=")
            ]
            if numbers and f"hydra.run.dir={folder}" in arguments:
                pids[numbers[0]] = int(path.parent.name)
    return [pids[number] for number in sorted(pids)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train(folder, *SHORT_SOLVE)
    return folder


@pytest.mark.long
def test_two_processes_give_the_result_of_one(one_process, tmp_path):
    folder = tmp_path / "run"
    status, output = run_program(*SHORT_SOLVE, TWO, f"hydra.run.dir={folder}")
    assert status == 0, output
    assert_same_numbers(folder, one_process, rtol=1e-4)
    # Only the first process reports, and only what is its own.
    lines = output.splitlines()
    assert len(lines) == 2 + 6 + 1
    assert lines[0].endswith(f"starts, in {folder}")
    assert lines[-1].endswith(str(folder))
    names = [{path.name for path in where.iterdir()} for where in (folder, one_process)]
    assert names[0] == names[1]
    environment = json.loads((folder / "environment.json").read_text())
    assert len(environment["devices"]) == 2


@pytest.mark.long
def test_eight_devices_of_one_process_give_the_result_of_one(
    one_process, tmp_path, monkeypatch
):
    folder, dump = tmp_path / "run", tmp_path / "dump"
    monkeypatch.setenv(
        "XLA_FLAGS",
        f"{os.environ.get('XLA_FLAGS', '')} "
        "--xla_force_host_platform_device_count=8 --xla_dump_hlo_as_text "
        f"--xla_dump_to={dump} --xla_dump_hlo_module_re=.*train_chunk.*",
    )
    status, output = run_program(*SHORT_SOLVE, f"hydra.run.dir={folder}")
    assert status == 0, output
    assert_same_numbers(folder, one_process, rtol=1e-4)
    environment = json.loads((folder / "environment.json").read_text())
    assert len(environment["devices"]) == 8
    # Devices exchange sums over examples, of parameter size, and nothing else.
    [compiled] = dump.glob("*train_chunk*.cpu_after_optimizations.txt")
    exchanges = re.findall(
        r" = (.*) (all-\w+|collective-\w+|reduce-scatter)\(", compiled.read_text()
    )
    assert {name for _, name in exchanges} == {"all-reduce"}
    sizes = {
        sorted_shape(match[1])
        for types, _ in exchanges
        for match in re.finditer(r"\w+\[([\d,]*)\]", types)
    }
    state = last_state(recorded_config(folder), folder)
    leaves = jax.tree.leaves(state.params)
    assert sizes == {(), *(tuple(sorted(leaf.shape)) for leaf in leaves)}


def sorted_shape(text):
    """The axes of a shape such as "64,8", without their order: XLA may transpose."""
    return tuple(sorted(int(size) for size in text.split(",") if size))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, *LONG)
    return folder


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_stopped(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    for step in ("1100", "1200"):
        (folder / "checkpoints" / f"{step}.sha256").unlink()
    status, output = run_program(f"resume={folder}", TWO)
    assert status == 0, output
    assert "continues after step 1000," in output
    assert_same_numbers(folder, uninterrupted, rtol=1e-3)


def stop_two_processes(folder, stop):
    """Starts a long run, calls `stop(launcher, workers)`; returns status and output."""
    launcher = start_program(*LONG, TWO, f"hydra.run.dir={folder}")
    try:
        wait_for(folder / "checkpoints" / "100.sha256", launcher)
        pids = worker_pids(folder)
        assert len(pids) == 2
        stop(launcher.pid, pids)
        output, _ = launcher.communicate(timeout=300)
    finally:
        launcher.kill()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    return launcher.returncode, output


def assert_one_process_finishes(folder, step, uninterrupted):
    assert (folder / "checkpoints" / f"{step}.sha256").is_file()
    assert not (folder / "result.json").exists()
    train_config(recorded_config(folder), folder)
    assert_same_numbers(folder, uninterrupted, rtol=1e-3)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_killed_process_ends_the_run_and_one_process_finishes_it(
    uninterrupted, tmp_path, number
):
    folder = tmp_path / "run"
    status, output = stop_two_processes(
        folder, lambda _, workers: os.kill(workers[number], signal.SIGKILL)
    )
    assert status == 1
    message = re.fullmatch(
        rf"error: process {number} of 2 was killed by SIGKILL; to go on after step "
        rf"(\d+): python -m experiments\.train resume={folder} {TWO}",
        output.splitlines()[-1],
    )
    assert message is not None, output
    assert "Traceback" not in output
    assert_one_process_finishes(folder, int(message[1]), uninterrupted)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("target", ["launcher", "worker"])
def test_stopping_one_stops_all_at_one_step(uninterrupted, tmp_path, number, target):
    folder = tmp_path / "run"
    status, output = stop_two_processes(
        folder,
        lambda launcher, workers: os.kill(
            launcher if target == "launcher" else workers[1], number
        ),
    )
    assert status == EXIT_INTERRUPTED, output
    assert "Traceback" not in output
    message = re.match(r"Stopped after step (\d+) of", output.splitlines()[-1])
    assert message is not None, output
    assert_one_process_finishes(folder, int(message[1]), uninterrupted)


@pytest.mark.slow
def test_processes_stop_when_their_launcher_is_killed(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    launcher = start_program(*LONG, TWO, f"hydra.run.dir={folder}")
    wait_for(folder / "checkpoints" / "100.sha256", launcher)
    launcher.kill()
    # The pipe closes once the workers, who write to it, have ended.
    output, _ = launcher.communicate(timeout=300)
    message = re.match(r"Stopped after step (\d+) of", output.splitlines()[-1])
    assert message is not None, output
    assert_one_process_finishes(folder, int(message[1]), uninterrupted)


@pytest.mark.slow
def test_sweep_starts_the_processes_of_each_run(tmp_path):
    settings = (*SHORT_SOLVE, TWO, f"runs_dir={tmp_path}", "seed=0,1")
    status, output = run_program("--multirun", *settings)
    assert status == 0, output
    assert len(list(tmp_path.glob("sweep-*/*/result.json"))) == 2


def start_cluster(*overrides, per_process=((), ())):
    """Starts two processes with a command each, as on two machines."""
    with socket.socket() as holder:
        holder.bind(("localhost", 0))
        address = f"localhost:{holder.getsockname()[1]}"
    return [
        start_program(
            *overrides,
            *per_process[number],
            TWO,
            f"distributed.coordinator_address={address}",
            f"distributed.process_id={number}",
        )
        for number in (0, 1)
    ]


@pytest.mark.slow
def test_commands_on_two_machines_make_one_run(one_process, tmp_path):
    processes = start_cluster(*SHORT_SOLVE, f"runs_dir={tmp_path / 'runs'}")
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    [config] = tmp_path.glob("runs/**/config.yaml")
    assert_same_numbers(config.parent, one_process, rtol=1e-4)
    assert outputs[1] == ""


@pytest.mark.slow
def test_commands_that_differ_are_an_error(tmp_path):
    processes = start_cluster(
        *SHORT_SOLVE,
        f"runs_dir={tmp_path / 'runs'}",
        per_process=[["seed=0"], ["seed=1"]],
    )
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert 0 not in [process.returncode for process in processes]
    assert "error: The processes do not have the same settings.\n" in outputs


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ((2, 1, None), "go together"),
        ((2, None, "localhost:1"), "go together"),
        ((2, 2, "localhost:1"), "must be less than the 2"),
    ],
)
def test_roles_that_do_not_fit_are_an_error(settings, rule):
    with pytest.raises(ConfigError, match=rule):
        DistributedConfig(*settings, start_timeout=1, heartbeat_timeout=1).check()


def test_process_of_a_cluster_cannot_sweep():
    config = DistributedConfig(2, 0, "localhost:1", 1, 1)
    with pytest.raises(ConfigError, match="--multirun"):
        config.check(is_sweep=True)


@pytest.mark.slow
def test_mistake_that_the_processes_find_is_one_line(tmp_path):
    runs = tmp_path / "runs"
    status, output = run_program(TWO, "batch_size=100000", f"runs_dir={runs}")
    assert status == 1
    assert output.startswith("error: `batch_size` must be at most the 1437")
    assert len(output.splitlines()) == 1
    assert not list(runs.glob("*"))


FOUR = "distributed.num_processes=4"
# Each process streams its own sixteen digits of every batch; a state that takes a while
# to write.
WRITING = (
    *("optimizer=sgd", "task.hidden_sizes=[2048]", "batch_size=64", "stream_above=0"),
    *("steps=60", "steps_per_dispatch=5", "eval_every=30", "checkpoint_every=10"),
    # Large steps would amplify the round-off between different numbers of processes.
    *("eval_train_examples=64", "log_every=1000", "optimizer.learning_rate=0.01"),
)


@needs_proc
@pytest.mark.slow
def test_two_processes_go_on_where_one_of_four_was_killed_while_it_wrote(tmp_path):
    """The checkpoint under way is lost, and the one before it is whole."""
    folder = tmp_path / "run"
    launcher = start_program(*WRITING, FOUR, f"hydra.run.dir={folder}")
    try:
        wait_for(folder / "checkpoints" / "20.sha256", launcher)
        pids = worker_pids(folder)
        assert len(pids) == 4
        while not (written := unfinished(folder)):
            assert launcher.poll() is None
        os.kill(pids[0], signal.SIGKILL)  # the one that writes
        output, _ = launcher.communicate(timeout=300)
    finally:
        launcher.kill()
    assert launcher.returncode == 1, output
    assert "process 0 of 4 was killed by SIGKILL" in output.splitlines()[-1]
    # It was in the middle: neither this step nor any later one is there.
    step = max(int(path.stem) for path in (folder / "checkpoints").glob("*.sha256"))
    assert step == written - 10
    config = recorded_config(folder)
    state = last_state(config, folder)

    alone = tmp_path / "alone"
    train(alone, *WRITING, f"steps={step}")
    assert_same_leaves(state, last_state(recorded_config(alone), alone))
    whole = tmp_path / "whole"
    train(whole, *WRITING)
    status, output = run_program(f"resume={folder}", TWO)
    assert status == 0, output
    assert f"continues after step {step}," in output
    assert_same_numbers(folder, whole, rtol=1e-4)


def unfinished(folder):
    """The step of a checkpoint that Orbax has begun and not committed; 0 for none."""
    begun = (folder / "checkpoints").glob("*.orbax-checkpoint-tmp*")
    return max((int(path.name.split(".")[0]) for path in begun), default=0)


def assert_same_leaves(state, other):
    """To round-off: the sums over examples are taken in another order."""
    for leaf, other_leaf in zip(
        jax.tree.leaves(state._replace(key=())),
        jax.tree.leaves(other._replace(key=())),
        strict=True,
    ):
        np.testing.assert_allclose(leaf, other_leaf, rtol=1e-4, atol=1e-6)
    assert jax.random.key_data(state.key).tolist() == (
        jax.random.key_data(other.key).tolist()
    )
