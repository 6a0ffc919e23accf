"""Every task, small and on synthetic data: loss, shapes, a run, a resumption."""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from experiments.running.config import CONFIG_DIR, compose_config, read_config
from experiments.running.optimizers import make_optimizer
from experiments.running.run_folder import read_json_lines
from experiments.running.settings import ConfigError
from experiments.tasks import make_task
from experiments.tasks.supervised import charlm, regression
from experiments.tasks.supervised.images import to_unit_interval
from experiments.tasks.supervised.imbalance import load_imbalanced
from experiments.tasks.supervised.training import init_state, make_evaluate_fn
from tests.experiments.helpers import assert_same_bits, train_config
from tests.experiments.tasks.supervised.small_tasks import (
    DOCUMENTS,
    SMALL,
    concrete_like,
    configure,
    first_batch,
)
from tests.marks import long_unless

# Their steps take long to compile.
LARGE = {"autoencoder", "charlm", "fashion_cnn", "row_transformer"}
RUN = ("steps=3", "steps_per_dispatch=2", "eval_every=3", "checkpoint_every=2")


def names_of(*names):
    """Parameters of the tests; the tasks that take long are left to the slow tests."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name
        for name in sorted(names)
    ]


@pytest.fixture(params=sorted(SMALL))
def config(request, data_dir):
    return configure(request.param, data_dir, *RUN)


def targets(batch):
    """The labels, the next characters, or the images themselves."""
    if "tokens" in batch:
        return batch["tokens"][:, 1:]
    return batch["y"] if "y" in batch else to_unit_interval(batch["x"])


def test_every_task_is_tested_here():
    files = (CONFIG_DIR / "task").glob("*.yaml")
    others = {"digits", "j1j2_4x4", "own", "pinn", "trpo", "vmc"}
    assert set(SMALL) | others == {path.stem for path in files}


class TestEveryTask:
    # The loss of the VAE has another term; see `test_vae`.
    @pytest.mark.parametrize(
        "config",
        long_unless(SMALL.keys() - LARGE, sorted(SMALL.keys() - {"vae"})),
        indirect=True,
    )
    def test_loss_is_minus_the_mean_log_likelihood(self, config):
        task = make_task(config.task)
        params, _ = task.init_fn(jax.random.key(0))
        batch = first_batch(task)
        outputs = task.model_fn(params, batch)
        log_prob = task.likelihood.log_prob(outputs, targets(batch))
        mean = np.average(log_prob, weights=task.weights(batch))
        np.testing.assert_allclose(task.loss_fn(params, batch), -mean, rtol=1e-5)

    def test_outputs_are_finite_and_as_many_as_the_examples(self, config):
        task = make_task(config.task)
        params, state = task.init_fn(jax.random.key(0))
        outputs = task.predict(params, state, first_batch(task))
        for leaf in jax.tree.leaves(outputs):
            assert leaf.shape[0] == 7
            assert jnp.isfinite(leaf).all()

    @pytest.mark.long
    @pytest.mark.parametrize("config", names_of(*SMALL), indirect=True)
    def test_trains_with_finite_numbers_and_resumes_to_the_same_bits(
        self, config, tmp_path
    ):
        result = train_config(config, tmp_path / "run")
        rows = read_json_lines(tmp_path / "run" / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3]
        for row in rows:
            assert all(math.isfinite(value) for value in row.values())
            assert row["measured_kl"] <= config.optimizer["max_kl"]
        assert {"train_loss", "test_loss"} <= result.metrics.keys()
        resumed = tmp_path / "resumed"
        shutil.copytree(tmp_path / "run", resumed)
        (resumed / "checkpoints" / "3.sha256").unlink()
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


class TestAutoencoder:
    @pytest.mark.parametrize("init", ["dense", "sparse"])
    def test_layers_mirror_each_other_around_a_linear_code(self, data_dir, init):
        config = configure("autoencoder", data_dir, f"task.init={init}")
        task = make_task(config.task)
        params, _ = task.init_fn(jax.random.key(0))
        kernels = [params[f"Dense_{i}"]["kernel"] for i in range(4)]
        shapes = [kernel.shape for kernel in kernels]
        assert shapes == [(784, 5), (5, 3), (3, 5), (5, 784)]
        batch = first_batch(task)
        x = to_unit_interval(batch["x"])
        for i, kernel in enumerate(kernels):
            x = x @ kernel + params[f"Dense_{i}"]["bias"]
            x = 1 / (1 + jnp.exp(-x)) if i in (0, 2) else x
        np.testing.assert_allclose(task.model_fn(params, batch), x, atol=1e-4)

    def test_sparse_start_has_fifteen_weights_into_each_unit(self, data_dir):
        config = configure(
            "autoencoder", data_dir, "task.init=sparse", "task.widths=[20,3]"
        )
        params, _ = make_task(config.task).init_fn(jax.random.key(0))
        incoming = [
            set(np.count_nonzero(params[f"Dense_{i}"]["kernel"], axis=0).tolist())
            for i in range(4)
        ]
        assert incoming == [{15}, {15}, {3}, {15}]

    @pytest.mark.long
    def test_evaluation_of_a_part_of_the_training_set(self, data_dir, tmp_path):
        whole = configure("autoencoder", data_dir, *RUN)
        part = configure("autoencoder", data_dir, *RUN, "eval_train_examples=8")
        results = [
            train_config(config, tmp_path / name)
            for config, name in ((whole, "whole"), (part, "part"))
        ]
        losses = [result.metrics["train_loss"] for result in results]
        tests = [result.metrics["test_loss"] for result in results]
        assert losses[0] != losses[1]
        assert tests[0] == tests[1]


class TestRegression:
    def test_outliers_are_as_many_and_as_large_as_asked_for(self):
        labels = np.random.default_rng(1).normal(size=200)
        moved = regression.add_outliers(labels, 0.1, 10.0) - labels
        assert np.count_nonzero(moved) == 20
        np.testing.assert_allclose(np.abs(moved[moved != 0]), 10.0 * labels.std())
        assert 0 < np.count_nonzero(moved > 0) < 20

    def test_flag_touches_the_training_labels_alone(self, data_dir):
        plain = make_task(configure("regression", data_dir).task)
        wrong = make_task(configure("regression", data_dir, "task.outliers=true").task)
        moved = np.abs(wrong.train["y"] - plain.train["y"])
        assert np.count_nonzero(moved) == round(0.1 * len(moved))
        np.testing.assert_allclose(moved[moved != 0], 10.0, rtol=1e-5)
        np.testing.assert_array_equal(wrong.train["x"], plain.train["x"])
        assert_same_bits(wrong.test, plain.test)

    def test_error_is_in_the_units_of_the_data(self, data_dir):
        task = make_task(configure("regression", data_dir).task)
        batch = {"y": jnp.zeros(4)}
        outputs = {"mean": jnp.ones(4), "log_scale": jnp.zeros(4)}
        (error,) = task.metrics_fn(outputs, batch).values()
        _, y = concrete_like(60)
        assert float(error) == pytest.approx(y.std(), rel=0.3)

    def test_no_error_bar_is_below_the_floor(self, data_dir):
        config = configure("regression", data_dir, "task.min_scale=0.5")
        task = make_task(config.task)
        params, _ = task.init_fn(jax.random.key(0))
        outputs = task.model_fn(jax.tree.map(lambda p: -50 * p, params), task.train)
        assert float(outputs["log_scale"].min()) >= math.log(0.5) - 1e-6


class TestFashionCNN:
    def test_as_shipped_it_has_about_half_a_million_parameters(self, data_dir):
        config = read_config(
            compose_config(["task=fashion_cnn", f"task.data_dir={data_dir}"])
        )
        shapes, _ = jax.eval_shape(make_task(config.task).init_fn, jax.random.key(0))
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert 450_000 < count < 550_000

    def test_training_mode_normalises_by_the_batch_alone(self, data_dir):
        task = make_task(configure("fashion_cnn", data_dir).task)
        params, _ = task.init_fn(jax.random.key(0))
        seven, four = first_batch(task), first_batch(task, 4)
        outputs = task.model_fn(params, seven)
        assert not np.allclose(outputs[:4], task.model_fn(params, four), atol=1e-4)

    def test_statistics_of_one_batch_repeated_predict_what_training_did(self, data_dir):
        config = configure("fashion_cnn", data_dir, "task.statistics_decay=0.5")
        task = make_task(config.task)
        params, state = task.init_fn(jax.random.key(0))
        batch = first_batch(task)
        before = task.predict(params, state, batch)
        for _ in range(30):
            state = task.update_model_state(params, state, batch)
        expected = task.model_fn(params, batch)
        assert not np.allclose(before, expected, atol=1e-2)
        np.testing.assert_allclose(
            task.predict(params, state, batch), expected, rtol=1e-3, atol=1e-4
        )


class TestCharLM:
    @pytest.fixture
    def task(self, data_dir):
        return make_task(configure("charlm", data_dir, "task.dropout=0.5").task)

    def test_windows_predict_every_character_but_the_first_of_a_document_once(self):
        windows, characters = charlm.cut_into_windows(DOCUMENTS, 12)
        predicted = ""
        for tokens, length in zip(windows["tokens"], windows["length"], strict=True):
            assert 1 <= length <= 12
            predicted += "".join(characters[token] for token in tokens[1 : length + 1])
        assert predicted == "".join(document[1:] for document in DOCUMENTS)

    def test_logits_depend_on_no_later_character_and_on_every_earlier_one(self, task):
        params, _ = task.init_fn(jax.random.key(0))
        tokens = jnp.zeros((1, 13), jnp.uint8)
        before = task.model_fn(params, {"tokens": tokens})
        after = task.model_fn(params, {"tokens": tokens.at[0, 5].set(1)})
        differs = np.abs(before - after).max(-1)[0] > 1e-7
        assert differs.tolist() == [False] * 5 + [True] * 7

    def test_masked_characters_do_not_count(self, task):
        params, _ = task.init_fn(jax.random.key(0))
        batch = {"tokens": jnp.ones((2, 13), jnp.uint8), "length": jnp.array([12, 3])}
        other = {**batch, "tokens": batch["tokens"].at[1, 4:].set(2)}
        assert float(task.weights(batch).sum()) == 15
        np.testing.assert_allclose(
            task.loss_fn(params, batch), task.loss_fn(params, other), rtol=1e-6
        )

    def test_output_weights_are_the_embeddings(self, task):
        params, _ = task.init_fn(jax.random.key(0))
        width, characters = 8, len(set("".join(DOCUMENTS)))
        shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
        assert shapes.count((characters, width)) == 1
        assert (width, characters) not in shapes
        assert params["embedding"]["embedding"].shape == (characters, width)

    def test_dropout_is_that_of_the_keys_and_of_each_window(self, task):
        params, _ = task.init_fn(jax.random.key(0))
        batch = first_batch(task)
        drawn = task.draw_fn(jax.random.key(1), batch)
        outputs = task.model_fn(params, drawn)
        np.testing.assert_array_equal(outputs, task.model_fn(params, drawn))
        part = jax.tree.map(lambda leaf: leaf[2:4], drawn)
        np.testing.assert_allclose(
            outputs[2:4], task.model_fn(params, part), rtol=1e-4, atol=1e-6
        )
        other = task.draw_fn(jax.random.key(2), batch)
        assert not np.allclose(outputs, task.model_fn(params, other))
        assert not np.allclose(outputs, task.model_fn(params, batch))

    @pytest.mark.slow
    def test_evaluation_in_pieces_is_the_mean_over_all_characters(self, task):
        config = configure("charlm", None)
        tx = make_optimizer(config.optimizer, task)
        state = init_state(task, tx, 0)
        pieces = make_evaluate_fn(task, batch_size=5)(state, task.train)
        whole = task.loss_fn(state.params, task.train)
        np.testing.assert_allclose(pieces["loss"], whole, rtol=1e-5)

    def test_heads_that_do_not_divide_the_width_are_an_error(self, data_dir):
        config = configure("charlm", data_dir, "task.num_heads=3")
        with pytest.raises(ConfigError, match=r"task.num_heads.*got 3 and 8"):
            make_task(config.task)


@pytest.mark.long
@pytest.mark.parametrize("name", names_of(*set(SMALL) - {"fashion_cnn"}))
def test_microbatches_change_the_steps_by_round_off_alone(name, data_dir, tmp_path):
    if name == "imbalance":
        pytest.skip("raw columns amplify round-off within a step")
    losses = []
    for size in ("null", "3"):
        config = configure(
            name, data_dir, *RUN, f"optimizer.metric.microbatch_size={size}"
        )
        losses.append(train_config(config, tmp_path / size).metrics["train_loss"])
    np.testing.assert_allclose(*losses, rtol=2e-3)


@pytest.mark.slow
def test_solver_on_rows_says_that_batch_normalisation_mixes_examples(
    data_dir, tmp_path
):
    config = configure("fashion_cnn", data_dir, *RUN, "optimizer/solver=sample_space")
    train_config(config, tmp_path)
    rows = read_json_lines(tmp_path / "metrics.jsonl")
    assert {row["solver_status"] for row in rows} == {ngd.SolverStatus.NOT_SEPARABLE}
    assert not any(ngd.StepStatus(row["status"]).is_taken for row in rows)
