"""Every task, small and on synthetic data: loss, shapes, a run, a resumption."""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import compose_config, read_config
from experiments.data import fashion_mnist, mnist5k
from experiments.run_folder import read_json_lines
from experiments.settings import ConfigError
from experiments.tasks import TASKS, make_task
from experiments.tasks.imbalance import load_imbalanced
from tests.experiments.data_files import sum_of, write_fashion_mnist, write_mnist5k
from tests.experiments.helpers import assert_same_bits, train_config

# A few neurons for each.
SMALL = {
    "fashion_mlp": ("task.hidden_sizes=[6]", "task.data_dir={data}", "batch_size=16"),
    "imbalance": ("task.hidden_sizes=[4]",),
}
RUN = ("steps=3", "steps_per_dispatch=2", "eval_every=3", "checkpoint_every=2")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with small data in place of the real one, under its known sums."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion_mnist, "SUMS", write_fashion_mnist(folder, 40, 20))
        patch.setattr(mnist5k, "SUM", sum_of(write_mnist5k(folder, 50)))
        yield folder


def configure(name, data_dir, *overrides):
    small = [override.format(data=data_dir) for override in SMALL[name]]
    return read_config(
        compose_config([f"task={name}", "optimizer.cg.max_steps=3", *small, *overrides])
    )


@pytest.fixture(params=sorted(SMALL))
def config(request, data_dir):
    return configure(request.param, data_dir, *RUN)


def first_batch(task, count=7):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[:count]), task.train)


def test_every_task_is_tested_here():
    assert set(SMALL) | {"digits"} == set(TASKS)


class TestEveryTask:
    def test_loss_is_minus_the_mean_log_likelihood(self, config):
        task = make_task(config.task)
        params, _ = task.init_fn(jax.random.key(0))
        batch = first_batch(task)
        outputs = task.model_fn(params, batch)
        log_prob = task.likelihood.log_prob(outputs, batch["y"])
        np.testing.assert_allclose(
            task.loss_fn(params, batch), -jnp.mean(log_prob), rtol=1e-5
        )

    def test_outputs_are_finite_and_as_many_as_the_examples(self, config):
        task = make_task(config.task)
        params, state = task.init_fn(jax.random.key(0))
        outputs = task.predict(params, state, first_batch(task))
        for leaf in jax.tree.leaves(outputs):
            assert leaf.shape[0] == 7
            assert jnp.isfinite(leaf).all()

    def test_trains_with_finite_numbers_and_resumes_to_the_same_bits(
        self, config, tmp_path
    ):
        result = train_config(config, tmp_path / "run")
        rows = read_json_lines(tmp_path / "run" / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3]
        for row in rows:
            assert all(math.isfinite(value) for value in row.values())
            assert row["measured_kl"] <= config.optimizer.max_kl
        assert {"train_loss", "test_loss"} <= result.metrics.keys()
        resumed = tmp_path / "resumed"
        shutil.copytree(tmp_path / "run", resumed)
        shutil.rmtree(resumed / "checkpoints" / "3")
        assert_same_bits(train_config(config, resumed).state, result.state)


class TestImbalance:
    @pytest.mark.parametrize(("data", "columns"), [("wine", 13), ("breast_cancer", 30)])
    def test_rarest_class_alone_is_thinned_out(self, data, columns):
        whole, test = load_imbalanced(data, 1.0)
        thinned, same_test = load_imbalanced(data, 0.2)
        assert whole["x"].shape[1] == columns
        counts, thinned_counts = np.bincount(whole["y"]), np.bincount(thinned["y"])
        rare = counts.argmin()
        assert thinned_counts[rare] == int(0.2 * counts[rare])
        assert (np.delete(thinned_counts, rare) == np.delete(counts, rare)).all()
        np.testing.assert_array_equal(test["x"], same_test["x"])

    def test_columns_are_in_raw_units_unless_standardized(self, data_dir):
        raw = make_task(configure("imbalance", data_dir).task).train["x"]
        assert raw.std(0).max() / raw.std(0).min() > 1000
        config = configure("imbalance", data_dir, "task.standardize=true")
        x = make_task(config.task).train["x"]
        np.testing.assert_allclose(x.mean(0), 0.0, atol=1e-5)
        np.testing.assert_allclose(x.std(0), 1.0, rtol=1e-5)

    def test_share_that_leaves_none_is_an_error(self):
        with pytest.raises(ConfigError, match="rare_share"):
            load_imbalanced("wine", 0.001)
