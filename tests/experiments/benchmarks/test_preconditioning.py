"""The table of preconditioners: its problems, and how products are counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from experiments.benchmarks import preconditioning, systems
from experiments.benchmarks.settings import PreconditionersSettings
from experiments.running.settings import ConfigError, check_rules

SETTINGS = PreconditionersSettings(
    widths=[784, 20, 4],
    num_examples=6,
    training_steps=1,
    steps_between=1,
    dampings=[1.0],
    raw_dampings=[1e-4, 1.0],
    ranks=[10],
    num_probes=3,
    exact_limit=1,
    rtol=1e-3,
    few_products=3,
    max_products=50,
    seed=0,
)


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(systems, "_train", lambda problem, _settings, **_: problem)


def test_images_are_mixed_and_have_mnists_shape():
    images = systems.load_images(50)
    assert images.shape == (50, 784)
    assert images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
    np.testing.assert_array_equal(images[:9], systems.load_images(9))


def test_autoencoder_is_symmetric_and_starts_sparse(no_training):
    problem = systems.make_autoencoder(SETTINGS)
    shapes = [layer["w"].shape for layer in problem.params]
    assert shapes == [(784, 20), (20, 4), (4, 20), (20, 784)]
    incoming = [(np.asarray(layer["w"]) != 0).sum(0) for layer in problem.params]
    assert [set(counts.tolist()) for counts in incoming] == [{15}, {15}, {4}, {15}]
    assert problem.model_fn(problem.params, problem.batch).shape == (6, 784)
    assert jnp.isfinite(problem.loss_fn(problem.params, problem.batch))


@pytest.mark.slow
def test_rows_count_products_and_hold_the_true_residual(no_training, monkeypatch):
    both = preconditioning._contestants

    def contestants(problem, settings):
        return [
            c for c in both(problem, settings) if c.name in ("none", "Nyström, rank 10")
        ]

    monkeypatch.setattr(preconditioning, "_contestants", contestants)
    with jax.enable_x64(True):
        problem = systems.make_raw_wine(SETTINGS)
        rows = preconditioning._measure(problem, SETTINGS.raw_dampings, SETTINGS)
        fisher = ngd.dense_fisher(
            problem.model_fn, problem.params, problem.batch, problem.likelihood
        )
    largest = np.linalg.eigvalsh(fisher)[-1]
    assert [row.damping for row in rows] == [1.0, 1.0, 1e-4, 1e-4]
    assert [row.build for row in rows] == [0, 10, 0, 10]
    for row in rows:
        assert row.condition == pytest.approx(largest / row.damping, rel=1e-2)
        assert row.reached
        assert row.residual <= 1.01e-3
        assert 1 < row.products <= 50
        assert 0 < row.gain <= 1 + 1e-9
    assert rows[2].condition > 1e8
    assert rows[3].gain > 2 * rows[2].gain
    cells = preconditioning.cells(rows[3])
    assert len(cells) == len(preconditioning.HEAD)
    assert cells[4:7] == ["10", str(rows[3].products), str(10 + rows[3].products)]
    missed = preconditioning.cells(rows[3]._replace(reached=False))
    assert missed[5] == f"> {rows[3].products}"


def test_settings_have_rules():
    check_rules(SETTINGS)
    with pytest.raises(ConfigError, match="`ranks` must be at least 1"):
        check_rules(dataclasses.replace(SETTINGS, ranks=[0]))
