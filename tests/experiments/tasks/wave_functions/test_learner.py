"""The task `vmc` through its program: quality, resumption, pictures, mistakes."""

import io
import shutil

import jax
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from experiments.running.config import compose_config, read_config
from experiments.running.loop import run_training
from experiments.running.run_folder import read_json_lines
from experiments.running.settings import ConfigError
from experiments.tasks.wave_functions.learner import WaveFunctionLearner, annealed
from experiments.tasks.wave_functions.pictures import _draw_energy
from tests.experiments.helpers import assert_same_bits

SMALL = (
    "task=vmc",
    "task.num_spins=6",
    "task.model.features=[6]",
    "batch_size=64",
    "steps=4",
    "steps_per_dispatch=2",
    "eval_every=2",
    "checkpoint_every=2",
)
METROPOLIS = (
    "sampler=metropolis",
    "task.sampler.num_chains=16",
    "task.sampler.burn_in=5",
    "task.sampler.eval_samples=64",
)


def train(folder, *overrides, console=None):
    config = read_config(compose_config([*SMALL, *overrides]))
    return run_training(config, folder, console or Console(quiet=True))


@pytest.mark.long
def test_finds_the_ground_state_within_the_radius(tmp_path):
    train(
        tmp_path,
        "model=rbm",
        "steps=20",
        "optimizer.max_kl=0.05",
        "optimizer.learning_rate=1",
    )
    records = read_json_lines(tmp_path / "metrics.jsonl")
    errors = [r["test_energy_error"] for r in records if "test_energy_error" in r]
    assert 0 < errors[-1] < 0.02 < errors[0]
    assert all(record["measured_kl"] <= 0.05 for record in records)
    # Of independent samples, √(variance / N).
    found = [record["loss_standard_error"] ** 2 for record in records]
    variances = np.array([record["energy_variance"] for record in records])
    np.testing.assert_allclose(found, variances / (64 - 1) / 6**2)
    assert not {"moves_taken", "autocorrelation_time"} & set(records[0])
    picture = matplotlib.image.imread(tmp_path / "curves.png")
    assert picture.shape[:2] == (960, 1320)


@pytest.mark.long
def test_with_all_configurations_nothing_is_random(tmp_path):
    console = Console(record=True, width=200, file=io.StringIO())
    train(
        tmp_path,
        *("model=rbm", "sampler=all", "batch_size=null", "steps=100", "eval_every=100"),
        *("optimizer.learning_rate=null", "optimizer.max_kl=0.1"),
        *("task.last_max_kl=1e-8", "optimizer.damping=1e-4"),
        console=console,
    )
    records = read_json_lines(tmp_path / "metrics.jsonl")
    last = records[-1]
    assert last["loss_standard_error"] == 0
    assert -1e-13 < last["test_energy_error"] < 1e-7
    # The radius that is shown is that of the step, which fills it.
    radii = np.array([record["max_kl"] for record in records])
    np.testing.assert_allclose(radii, 0.1 * 1e-7 ** (np.arange(100) / 100), rtol=1e-5)
    filled = np.array([record["measured_kl"] for record in records]) / radii
    assert 0.9 <= np.min(filled) <= np.max(filled) <= 1 + 1e-6
    # Energies of neighbouring steps differ in the fourth digit.
    title, *rows = (line.split() for line in console.export_text().splitlines()[1:])
    assert " ".join(title).count("per spin") == 1
    assert "loss" not in title
    [shown] = (row for row in rows if row[0] == "100")
    assert f"{last['loss']:.5f}" in shown


STILL = ("optimizer=sgd", "optimizer.learning_rate=1e-12")


@pytest.mark.long
def test_error_bars_of_markov_chains_are_the_spread_of_the_energy(tmp_path):
    """Of parameters that stay, so that all steps measure the same."""
    console = Console(record=True, width=200, file=io.StringIO())
    overrides = (*STILL, *METROPOLIS, "steps=100", "steps_per_dispatch=100")
    train(tmp_path, *overrides, "eval_every=100", console=console)
    records = read_json_lines(tmp_path / "metrics.jsonl")
    columns = {
        name: np.array([record[name] for record in records])
        for name in ("loss", "loss_standard_error", "moves_taken")
    }
    bar = np.sqrt(np.mean(columns["loss_standard_error"] ** 2))
    assert bar == pytest.approx(np.std(columns["loss"]), rel=0.3)
    energy = records[-1]["test_energy"] / 6  # of all configurations
    assert abs(np.mean(columns["loss"]) - energy) < 5 * bar / np.sqrt(100)
    assert ((columns["moves_taken"] > 0.3) & (columns["moves_taken"] < 1)).all()
    assert 0.5 < np.mean([r["autocorrelation_time"] for r in records]) < 4
    assert "test_energy_standard_error" not in records[-1]
    heading = console.export_text().splitlines()[1]
    assert "std error" in heading
    assert "moves autocorr" in heading


@pytest.mark.long
def test_error_bars_of_evaluations_are_the_spread_of_the_energy():
    overrides = ("task.num_spins=18", *METROPOLIS, "task.sampler.sweeps=5")
    learner = WaveFunctionLearner(read_config(compose_config([*SMALL, *overrides])))
    state = learner.first_state
    found = [
        learner.evaluate(state._replace(key=jax.random.key(seed))) for seed in range(60)
    ]
    energies, bars = (
        np.array([values[name] for values in found])
        for name in ("test_energy", "test_energy_standard_error")
    )
    assert np.sqrt(np.mean(bars**2)) == pytest.approx(np.std(energies), rel=0.4)


def test_the_curve_of_the_energy_has_a_band():
    records = [
        {"step": step, "loss": -1.0 / step, "loss_standard_error": 0.1 / step}
        for step in (1, 2, 3)
    ]
    axis = Figure().subplots()
    _draw_energy(axis, records, None)
    [band] = axis.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.round(6)}
    edges = ((0, -1.1), (0, -0.9), (1, -0.55), (1, -0.45))
    assert {tuple(map(float, edge)) for edge in edges} <= corners


def test_radius_and_damping_shrink_by_the_same_factor_in_every_step():
    config = read_config(
        compose_config(
            [*SMALL, "optimizer.max_kl=0.1", "task.last_max_kl=0.001", "steps=8"]
        )
    )
    optimizer = annealed(config.optimizer, config.task, config.steps)
    assert optimizer["damping"] == config.optimizer["damping"] == 0.01
    radii = [float(optimizer["max_kl"](step)) for step in range(9)]
    np.testing.assert_allclose(radii, 0.1 * 0.01 ** (np.arange(9) / 8), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [(), (*METROPOLIS, "task.hamiltonian=heisenberg")],
    ids=["exact", "metropolis"],
)
def test_resumes_to_the_same_bits(tmp_path, overrides):
    whole = train(tmp_path / "whole", "model=rbm", *overrides)
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", folder)
    (folder / "checkpoints" / f"{whole.steps}.sha256").unlink()
    again = train(folder, "model=rbm", *overrides)
    assert_same_bits(again.state, whole.state)
    metrics = (folder / "metrics.jsonl").read_bytes()
    assert metrics == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("model=cnn", "task.model.features=[4,4]", "optimizer=adam"),
        ("model=gcnn", "task.model.features=[2]"),
        (
            *("model=transformer", "task.model.features=[8]"),
            *("optimizer.learning_rate=null", "optimizer.max_kl=0.1"),
            *("task.last_max_kl=0.001", "task.last_damping=0.001"),
        ),
        ("model=rbm", "task.model.complex_parameters=true"),
        ("model=rbm", "task.precision=float32", "optimizer/solver=cg"),
        ("model=rbm", "optimizer/damping=relative"),
        (
            *("model=rbm", "optimizer/damping=levenberg_marquardt"),
            "optimizer/accept=sufficient_decrease",
        ),
        ("model=rbm", "task.num_spins=18", *METROPOLIS),
    ],
    ids=[
        *("cnn", "gcnn", "transformer"),
        *("complex", "float32", "relative", "weighed", "large"),
    ],
)
def test_every_choice_lowers_the_energy(tmp_path, overrides):
    train(tmp_path, "steps=30", "eval_every=2", *overrides)
    records = read_json_lines(tmp_path / "metrics.jsonl")
    energies = [r["test_energy"] for r in records if "test_energy" in r]
    assert energies[-1] < energies[0]
    assert np.isfinite([record["measured_kl"] for record in records]).all()


@pytest.mark.slow
@pytest.mark.parametrize(("momentum", "bound"), [(0.0, 4e-4), (0.8, 9e-5)])
@pytest.mark.parametrize("seed", range(3))
def test_shipped_settings_reach_the_quality_of_netket(tmp_path, momentum, bound, seed):
    """NetKet, measured before: 2.2e-4 to 4e-4, with momentum 5.5e-5 to 8.4e-5."""
    overrides = ["task=vmc", f"seed={seed}", f"optimizer.momentum={momentum}"]
    config = read_config(compose_config([*overrides, "eval_every=300"]))
    result = run_training(config, tmp_path, Console(quiet=True))
    assert result.metrics["test_energy_error"] <= bound


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_shrinking_radius_is_better_by_a_factor(tmp_path, seed):
    """At a fixed rate with this momentum: 5.1e-5 to 7.6e-5."""
    overrides = [
        *("task=vmc", f"seed={seed}", "eval_every=300"),
        *("optimizer.learning_rate=null", "optimizer.max_kl=0.05"),
        *("optimizer.momentum=0.8", "task.last_max_kl=5e-6", "task.last_damping=1e-4"),
    ]
    config = read_config(compose_config(overrides))
    result = run_training(config, tmp_path, Console(quiet=True))
    assert result.metrics["test_energy_error"] <= 2e-5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("task.num_spins=18",), "`task.num_spins` must be at most 16 with sampler="),
        (("task.hamiltonian=heisenberg", "task.field=1"), "takes .* field=0"),
        (("task.hamiltonian=xy",), "`task.hamiltonian` must be one of ising, .* own"),
        (("batch_size=null",), "`batch_size` must be the number of samples"),
        (("sampler=all",), "`batch_size` must be .* and null with sampler=all"),
        (
            ("sampler=all", "batch_size=null", "task.num_spins=18"),
            "at most 16 with sampler=all",
        ),
        (("task.sampler.sweeps=2",), "`task.sampler.sweeps` is for sampler=metrop"),
        (
            ("sampler=metropolis", "task.sampler.burn_in=null"),
            "`task.sampler.burn_in` must be a number",
        ),
        (
            (*METROPOLIS, "task.sampler.num_chains=1"),
            "`task.sampler.num_chains` must be at least 2, got 1",
        ),
        ((*METROPOLIS, "batch_size=60"), "`batch_size` must be a multiple of the"),
        (("model=cnn", "task.model.kernel_size=null"), "`task.model.kernel_size` is"),
        (("model=gcnn", "task.model.kernel_size=4"), "`task.model.kernel_size` must"),
        (("model=gcnn", "task.model.symmetries=[flip]"), "`task.model.symmetries` m"),
        (
            ("model=transformer", "task.model.patch_size=null"),
            "`task.model.patch_size`",
        ),
        (("model=rbm", "task.model.phase=true"), "`task.model.phase` is not for"),
        (("model=rbm", "task.model.symmetries=[all]"), "one of translations, p"),
        (("task.coupling=1",), "`task.hamiltonian=ising`: .* 'coupling'"),
        (
            ("model=transformer", "task.model.features=[4]", "task.model.patch_size=4"),
            "`task.model=transformer`: Patches of side 4 do not fill .* \\(6,\\)",
        ),
        (("model=rbm", "task.model.features=[2,2]"), "must be one number of hidden"),
        (("task.model.complex_parameters=true",), "is for model=rbm, got model=mlp"),
        (
            ("model=transformer", "task.model.features=[8,4]"),
            "`task.model.features` must repeat one width",
        ),
        (("optimizer/solver=damping_search",), "`optimizer.solver` must not use the"),
        (
            ("task.last_max_kl=0.1",),
            "`task.last_max_kl` needs a number optimizer.max_kl",
        ),
        (
            ("task.last_damping=0.1", "optimizer/damping=relative"),
            "`task.last_damping` needs a number optimizer.damping",
        ),
        (("stream_above=1",), "`stream_above` is about a training set, and task=vmc"),
    ],
)
def test_settings_that_do_not_fit_are_errors(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match="^.*" + message):
        train(tmp_path, *overrides)
