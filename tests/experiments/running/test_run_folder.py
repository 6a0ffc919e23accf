import json
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.running.config import compose_config, read_config
from experiments.running.run_folder import (
    choose_folder,
    find_run,
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
    with pytest.raises(ConfigError, match="holds a run already"):
        open_run(compose_config([]), tmp_path, [])


def test_a_resumed_run_has_the_configuration_of_its_folder(tmp_path):
    write_config(make_config("optimizer=adam", "seed=4"), tmp_path)
    overrides = [f"resume={tmp_path}", "steps=50"]
    config = open_run(compose_config(overrides), tmp_path, overrides)
    assert (config.optimizer.name, config.seed, config.steps) == ("adam", 4, 50)


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
    [difference] = write_environment(tmp_path)
    assert difference.startswith("jaxlib was 0.0.1, is ")


def test_plain_names_need_no_quotes():
    assert plain_name("seed-0_sizes-[8, 4]_a=b") == "seed-0_sizes--8-4-_a-b"
    assert plain_name("optimizer.max_kl-1e-3") == "optimizer.max_kl-1e-3"


def test_paths_are_short_only_within_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shorten(tmp_path / "runs" / "a") == Path("runs", "a")
    assert shorten(tmp_path.parent / "other") == tmp_path.parent / "other"
