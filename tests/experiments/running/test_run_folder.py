import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.running.config import compose_config, read_config
from experiments.running.run_folder import (
    choose_folder,
    find_run,
    locked,
    open_run,
    plain_name,
    shorten,
    write_config,
    write_environment,
)
from experiments.running.settings import ConfigError
from tests.experiments.helpers import make_config


def test_a_new_run_gets_a_folder_of_its_own(tmp_path):
    arguments = (None, str(tmp_path), "digits", "adam", 3)
    first = choose_folder(*arguments)
    Path(first).mkdir(parents=True)
    second = choose_folder(*arguments)
    assert first != second
    for folder in (first, second):
        assert "digits-adam-" in folder
        assert folder.endswith("seed3")


def test_latest_is_the_run_that_started_last(tmp_path):
    for age, name in enumerate(["new", "middle", "old"]):
        (tmp_path / name / "seed0").mkdir(parents=True)
        path = tmp_path / name / "seed0" / "config.yaml"
        path.touch()
        os.utime(path, (1000.0 - age, 1000.0 - age))
    assert find_run("latest", tmp_path) == tmp_path / "new" / "seed0"
    assert choose_folder("latest", str(tmp_path), "", "", 0).endswith("new/seed0")


@pytest.mark.parametrize("resume", ["latest", "nowhere"])
def test_resuming_what_is_not_there_is_an_error(tmp_path, resume):
    with pytest.raises(ConfigError, match="resume"):
        find_run(resume, tmp_path)


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    write_config(make_config(), tmp_path)
    with pytest.raises(ConfigError, match="already holds a run"):
        open_run(compose_config([]), tmp_path, [])


def test_a_resumed_run_has_the_configuration_of_its_folder(tmp_path):
    write_config(make_config("optimizer=adam", "seed=4"), tmp_path)
    overrides = [f"resume={tmp_path}", "steps=50"]
    config = open_run(compose_config(overrides), tmp_path, overrides)
    assert (config.optimizer["name"], config.seed, config.steps) == ("adam", 4, 50)


def test_a_resumed_run_is_one_run(tmp_path):
    write_config(make_config(), tmp_path)
    overrides = [f"resume={tmp_path}"]
    with pytest.raises(ConfigError, match="leave out --multirun"):
        open_run(compose_config(overrides), tmp_path, overrides, is_sweep=True)


def test_a_bad_value_is_found_in_a_resumed_run_too(tmp_path):
    write_config(make_config(), tmp_path)
    overrides = [f"resume={tmp_path}", "steps=many"]
    with pytest.raises(ConfigError, match=r"`steps`.*many"):
        open_run(compose_config(overrides), tmp_path, overrides)


def test_configuration_file_reads_back_as_what_ran(tmp_path):
    config = make_config("optimizer.max_kl=0.25")
    write_config(config, tmp_path)
    tree = OmegaConf.load(tmp_path / "config.yaml")
    assert read_config(tree) == config


def test_environment_tells_versions_and_what_has_changed(tmp_path):
    assert write_environment(tmp_path) == []
    assert write_environment(tmp_path) == []
    path = tmp_path / "environment.json"
    environment = json.loads(path.read_text())
    assert {"python", "jax", "jaxlib", "optax", "backend", "devices"} <= {*environment}
    path.write_text(json.dumps({**environment, "jaxlib": "0.0.1"}))
    [notice] = write_environment(tmp_path)
    assert notice.startswith("The environment has changed: jaxlib was 0.0.1, is ")


def damage(path, kind):
    whole = path.read_bytes()
    damaged = {
        "emptied": b"",
        "cut": whole[: len(whole) // 2],
        "cut within the last number": whole[:-2],
        "zeros": bytes(len(whole)),
        "binary": bytes(range(100, 256)),
        "another value": b"[1, 2]\n",
    }[kind]
    path.write_bytes(damaged)
    return damaged


any_damage = pytest.mark.parametrize(
    "kind",
    [
        "emptied",
        "cut",
        "cut within the last number",
        "zeros",
        "binary",
        "another value",
    ],
)


@any_damage
def test_a_damaged_environment_is_reported_and_kept(tmp_path, kind):
    write_environment(tmp_path)
    path = tmp_path / "environment.json"
    damaged = damage(path, kind)
    [notice] = write_environment(tmp_path)
    assert notice == f"environment.json was damaged: it is kept as {path}.damaged."
    assert path.with_name("environment.json.damaged").read_bytes() == damaged
    assert write_environment(tmp_path) == []


@any_damage
def test_a_damaged_configuration_is_an_error_of_one_line(tmp_path, kind):
    write_config(make_config(), tmp_path)
    path = tmp_path / "config.yaml"
    damaged = damage(path, kind)
    overrides = [f"resume={tmp_path}"]
    with pytest.raises(ConfigError, match=r"config.yaml is damaged. To restore it,"):
        open_run(compose_config(overrides), tmp_path, overrides)
    assert path.read_bytes() == damaged


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_is_held_by_one_process_until_it_dies(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(ConfigError, match="Another process is"),
        locked(tmp_path),
    ):
        pass
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="Another process is"), locked(tmp_path):
            pass
        holder.kill()
    with locked(tmp_path):
        pass


def test_plain_names_need_no_quotes():
    assert plain_name("seed-0_sizes-[8, 4]_a=b") == "seed-0_sizes--8-4-_a-b"
    assert plain_name("optimizer.max_kl-1e-3") == "optimizer.max_kl-1e-3"


def test_paths_are_short_only_within_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shorten(tmp_path / "runs" / "a") == Path("runs", "a")
    assert shorten(tmp_path.parent / "other") == tmp_path.parent / "other"
