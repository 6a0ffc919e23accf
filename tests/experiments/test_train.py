"""The program itself: its command line, and real processes that are stopped."""

import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf

from experiments import train as program
from experiments.running.config import (
    CONFIG_DIR,
    TrainConfig,
    compose_config,
    read_config,
)
from experiments.running.distributed import EXIT_CONFIG_ERROR
from experiments.running.interruption import EXIT_INTERRUPTED
from experiments.running.run_folder import latest_step, read_json_lines
from experiments.tasks.supervised.digits import make_digits
from tests.experiments.helpers import (
    SMALL,
    assert_same_bits,
    last_state,
    run_program,
    start_program,
    wait_for,
)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command line in this process: exit status, standard output and error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*overrides):
        monkeypatch.setattr(sys, "argv", ["train", *overrides])
        status = 0
        try:
            program.main()
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        if isinstance(status, str):  # what Python itself prints when it exits
            return 1, out, f"{err}{status}\n"
        return status, out, err

    return run


def run_folders(path):
    return sorted(found.parent for found in path.glob("runs/**/config.yaml"))


def test_one_line_trains_and_the_last_tells_the_result_and_the_folder(
    command, tmp_path
):
    status, out, err = command("optimizer=sgd", *SMALL)
    assert (status, err) == (0, "")
    [folder] = run_folders(tmp_path)
    last_line = out.splitlines()[-1]
    assert last_line.endswith(str(folder.relative_to(tmp_path)))
    result = json.loads((folder / "result.json").read_text())
    assert f"{result['test_accuracy']:.2%}" in last_line
    assert f"{result['train_loss']:.3g}" in last_line


@pytest.mark.parametrize(
    "mistake",
    [
        "steps=-1",
        "optimizer.max_kl=abc",
        "optimizer=adamm",
        "optimizer=null",
        "optimizer.foo=1",
        "resume=nowhere",
        "batch_size=100000",
        "seed=0,1",
        "a b",
    ],
)
def test_mistake_is_one_line_and_leaves_no_folder(command, tmp_path, mistake):
    status, out, err = command(mistake)
    assert status not in (0, None)
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert run_folders(tmp_path) == []
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.slow
def test_multirun_sweeps_over_seeds_and_radii(command, tmp_path):
    status, out, _ = command(
        "--multirun", *SMALL, "seed=0,1", "optimizer.max_kl=0.01,0.1", "steps=2"
    )
    assert status == 0
    assert "* lowest median of train loss" in out
    [picture] = tmp_path.glob("runs/sweep-*/sweep.png")
    assert str(picture.relative_to(tmp_path)) in out
    folders = run_folders(tmp_path)
    assert len(folders) == 4
    configs = [
        read_config(OmegaConf.load(folder / "config.yaml")) for folder in folders
    ]
    settings = {(config.seed, config.optimizer["max_kl"]) for config in configs}
    assert settings == {(0, 0.01), (0, 0.1), (1, 0.01), (1, 0.1)}
    for config, folder in zip(configs, folders, strict=True):
        assert f"seed-{config.seed}" in folder.name
        records = read_json_lines(folder / "metrics.jsonl")
        assert len(records) == 2
        assert all(
            record["measured_kl"] <= 1.05 * config.optimizer["max_kl"]
            for record in records
        )
    # The names need no quotes on a command line.
    assert command(f"resume={folders[0].relative_to(tmp_path)}")[0] == 0


@pytest.mark.long
def test_resume_refuses_another_optimizer(command):
    assert command("optimizer=sgd", *SMALL)[0] == 0
    status, _, err = command("resume=latest", "optimizer=adam")
    assert status == 1
    assert "cannot change `optimizer` from sgd to adam" in err


@pytest.mark.long
def test_resume_latest_goes_further(command, tmp_path):
    assert command("optimizer=sgd", *SMALL)[0] == 0
    assert command("resume=latest", "steps=8")[0] == 0
    [folder] = run_folders(tmp_path)
    assert len(read_json_lines(folder / "metrics.jsonl")) == 8
    assert OmegaConf.load(folder / "config.yaml").steps == 8


LONG = (
    "optimizer=adam",
    "task.hidden_sizes=[16]",
    "steps=1200",
    "steps_per_dispatch=7",
    "eval_every=50",
    "checkpoint_every=20",
    "log_every=100",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    status, output = run_program(*LONG, f"hydra.run.dir={folder}")
    assert status == 0, output
    return folder


def assert_same_run(folder, other):
    config = read_config(OmegaConf.load(folder / "config.yaml"))
    assert_same_bits(last_state(config, folder), last_state(config, other))
    metrics, other_metrics = folder / "metrics.jsonl", other / "metrics.jsonl"
    assert metrics.read_bytes() == other_metrics.read_bytes()


@pytest.mark.slow
def test_killed_process_resumes_to_the_same_bits(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start_program(*LONG, f"hydra.run.dir={folder}")
    wait_for(folder / "checkpoints" / "40.sha256", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "result.json").exists()
    status, output = run_program(f"resume={folder}")
    assert status == 0, output
    after = int(re.search(r"continues after step (\d+)", output)[1])
    assert after >= 40
    assert_same_run(folder, uninterrupted)


@pytest.mark.long
def test_interrupt_saves_and_says_how_to_go_on(uninterrupted, tmp_path):
    folder = tmp_path / "a run, stopped"  # quoted for the shell and for Hydra
    process = start_program(*LONG, f'hydra.run.dir="{folder}"')
    wait_for(folder / "checkpoints" / "40.sha256", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED
    assert "Traceback" not in output
    last_line = output.splitlines()[-1]
    step = int(re.match(r"Stopped after step (\d+) of 1200", last_line)[1])
    assert (folder / "checkpoints" / f"{step}.sha256").is_file()
    assert len(read_json_lines(folder / "metrics.jsonl")) == step
    [resume] = shlex.split(last_line.partition("experiments.train ")[2])
    status, output = run_program(resume)
    assert status == 0, output
    assert_same_run(folder, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["natural_gradient", "lbfgs", "sgd"])
def test_process_killed_again_and_again_ends_at_the_same_bits(tmp_path, optimizer):
    settings = (f"optimizer={optimizer}", "steps=300", "checkpoint_every=10")
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    status, output = run_program(*settings, f"hydra.run.dir={whole}")
    assert status == 0, output
    moments = random.Random(0)
    process = start_program(*settings, f"hydra.run.dir={folder}")
    for _ in range(8):
        metrics = folder / "metrics.jsonl"
        wait_for(metrics, process)
        size = metrics.stat().st_size
        while metrics.stat().st_size == size and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.5))
        process.kill()
        process.wait()
        process = start_program(f"resume={folder}")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert_same_run(folder, whole)


@pytest.mark.long
@pytest.mark.parametrize("moment", ["imports", "compiling"])
def test_interrupt_before_the_first_step_ends_at_once_in_one_line(tmp_path, moment):
    folder = tmp_path / "run"
    process = start_program("optimizer=natural_gradient", f"hydra.run.dir={folder}")
    if moment == "imports":
        time.sleep(1.0)
    else:
        wait_for(folder / "tensorboard", process)  # the last file before it compiles
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED
    assert "Traceback" not in output
    last_line = output.splitlines()[-1]
    if moment == "imports":
        assert output.splitlines() == ["Stopped before the first step."]
    else:
        assert last_line.startswith("Stopped after step 0 of 100; to go on: python -m ")
        assert last_line.endswith(f"resume={folder}")
        assert not (folder / "curves.png").exists()  # those of a run that went on


@pytest.mark.long
def test_closed_pipe_ends_the_output_and_not_the_training(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start_program(*LONG, f"hydra.run.dir={folder}")
    assert "starts, in" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert (folder / "result.json").exists()
    assert_same_run(folder, uninterrupted)


@pytest.mark.long
@pytest.mark.parametrize("kilobytes", [8, 40])  # for a checkpoint, for the log
def test_full_disk_ends_in_one_line_and_loses_nothing(
    uninterrupted, tmp_path, kilobytes
):
    folder = tmp_path / "run"
    limit = ("sh", "-c", f'ulimit -f {2 * kilobytes}; exec "$@"', "sh")
    status, output = run_program(*LONG, f"hydra.run.dir={folder}", within=limit)
    assert status == 1
    assert "Traceback" not in output
    assert output.count("error: ") == 1
    last_line = output.splitlines()[-1]
    assert last_line.startswith("error: File too large")
    assert last_line.endswith(f"to go on: python -m experiments.train resume={folder}")
    assert not list(folder.rglob("*.draft"))
    status, output = run_program(f"resume={folder}")
    assert status == 0, output
    assert "damaged" not in output
    assert_same_run(folder, uninterrupted)


@pytest.mark.long
def test_file_system_without_space_ends_in_one_line(tmp_path):
    """The real thing, in a name space of its own, which may not be allowed."""
    mount = f'mount -t tmpfs -o size=200k none {tmp_path} && exec "$@"'
    within = ("unshare", "-rm", "sh", "-c", mount, "sh")
    if not shutil.which("unshare") or subprocess.call([*within, "true"]):
        pytest.skip("no mounting here")
    status, output = run_program(*LONG, f"hydra.run.dir={tmp_path}/run", within=within)
    assert status == 1
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("error: No space left on device")


@pytest.mark.long
def test_read_only_folder_is_an_error_of_one_line(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    within = ()
    if os.geteuid() == 0:  # who may write anywhere, but for this
        within = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-all")
        if not shutil.which("setpriv"):
            pytest.skip("root without setpriv")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in (*before, folder, folder / "checkpoints", folder / "tensorboard"):
        path.chmod(path.stat().st_mode & ~0o222)
    for overrides in (f"resume={folder}", "steps=1300"), (f"runs_dir={folder}/new",):
        status, output = run_program(*overrides, within=within)
        assert status == 1
        [line] = output.splitlines()
        assert line.startswith("error: Permission denied: ")
    folder.chmod(0o755)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.long
def test_second_process_on_a_folder_is_refused(command, tmp_path):
    folder = tmp_path / "run"
    process = start_program(*LONG, "steps=100000", f"hydra.run.dir={folder}")
    wait_for(folder / "checkpoints" / "40.sha256", process)
    status, out, err = command(f"resume={folder}")
    assert (status, out) == (1, "")
    assert err.splitlines() == ["error: Another process is training in run."]
    assert process.poll() is None
    process.kill()
    process.wait()
    step = latest_step(folder)
    assert command(f"resume={folder}", f"steps={step}")[0] == 0


def test_help_names_every_task_optimizer_and_option(command):
    status, out, err = command("--help")
    assert (status, err) == (0, "")
    words = set(re.findall(r"\w+", out))
    options = {field.name for field in dataclasses.fields(TrainConfig)}
    groups = {
        path.stem
        for group in ("task", "optimizer", "model")
        for path in (CONFIG_DIR / group).glob("*.yaml")
    }
    assert options | groups <= words
    for example in re.findall(r"python -m experiments.train(.*)", out):
        overrides = [word for word in example.split() if word != "--multirun"]
        read_config(compose_config([word.partition(",")[0] for word in overrides]))


def make_with_a_hole(hidden_sizes: list[int]):
    task = make_digits(hidden_sizes)
    task.train["x"][17, 3] = float("nan")
    return task


@pytest.mark.long
def test_run_without_a_step_ends_with_an_error_that_names_the_row(command):
    for optimizer in ("natural_gradient", "adam"):
        words = [f"task={__name__}:make_with_a_hole", f"+{SMALL[0]}", *SMALL[1:]]
        words += [f"optimizer={optimizer}", "batch_size=null", "steps=2"]
        status, out, err = command(*words)
        assert status == EXIT_CONFIG_ERROR
        assert "training loss not finite" in out
        [line] = err.splitlines()
        assert line.endswith(": row 17 of the training data, ['x'], is not finite.")


@pytest.mark.long
def test_diverging_run_is_no_error(command):
    status, out, err = command(
        *SMALL, "optimizer=sgd", "optimizer.learning_rate=1e38", "steps=2"
    )
    assert (status, err) == (0, "")
    assert "training loss not finite" in out
