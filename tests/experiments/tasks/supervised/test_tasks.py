import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits as load_sklearn_digits
from sklearn.metrics import log_loss

import ngd_jax as ngd
from experiments.tasks import num_examples
from experiments.tasks.supervised.digits import load_digits, make_digits
from experiments.tasks.supervised.task import Task


@pytest.fixture
def digits():
    return make_digits([8])


class TestDigits:
    def test_split_is_a_partition_of_the_data_in_equal_proportions(self):
        train, test = load_digits()
        assert (len(train["y"]), len(test["y"])) == (1437, 360)
        rows = np.concatenate([train["x"], test["x"]])
        images, labels = load_sklearn_digits(return_X_y=True)
        np.testing.assert_array_equal(
            np.sort(rows @ np.arange(64.0)), np.sort(images / 16.0 @ np.arange(64.0))
        )
        shares = np.bincount(test["y"]) / np.bincount(labels)
        np.testing.assert_allclose(shares, 360 / 1797, atol=0.01)

    def test_pixels_are_between_zero_and_one(self):
        train, test = load_digits()
        for data in (train, test):
            assert data["x"].dtype == np.float32
            assert data["x"].min() == 0.0
            assert data["x"].max() == 1.0

    def test_split_is_the_same_every_time(self):
        first, second = load_digits(), load_digits()
        np.testing.assert_array_equal(first[1]["x"], second[1]["x"])

    def test_loss_is_that_of_scikit_learn_and_of_the_likelihood(self, digits):
        params, _ = digits.init_fn(jax.random.key(0))
        outputs = digits.model_fn(params, digits.test)
        loss = digits.loss_fn(params, digits.test)
        probabilities = jax.nn.softmax(outputs)
        expected = log_loss(digits.test["y"], np.asarray(probabilities))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        log_prob = ngd.Categorical().log_prob(outputs, digits.test["y"])
        np.testing.assert_allclose(loss, -jnp.mean(log_prob), rtol=1e-5)

    def test_accuracy_counts_the_largest_logit(self, digits):
        batch = {"y": jnp.array([1, 2, 3, 4])}
        outputs = jax.nn.one_hot(jnp.array([1, 2, 3, 5]), 10)
        assert float(digits.metrics_fn(outputs, batch)["accuracy"]) == 0.75

    def test_initial_parameters_depend_on_the_key_alone(self, digits):
        first, _ = digits.init_fn(jax.random.key(1))
        again, _ = digits.init_fn(jax.random.key(1))
        other, _ = digits.init_fn(jax.random.key(2))
        assert jax.tree.all(jax.tree.map(jnp.array_equal, first, again))
        assert not jax.tree.all(jax.tree.map(jnp.array_equal, first, other))


def test_model_state_reaches_the_predictions_but_not_the_training_outputs():
    task = Task(
        name="offset",
        train={"x": jnp.ones(3)},
        test={"x": jnp.ones(3)},
        init_fn=lambda _: ({"w": jnp.ones(())}, {"offset": jnp.ones(())}),
        model_fn=lambda params, batch: params["w"] * batch["x"],
        likelihood=ngd.Gaussian(event_ndims=0),
        output_loss_fn=lambda outputs, _: jnp.mean(outputs),
        predict_fn=lambda params, state, batch: (
            params["w"] * batch["x"] + state["offset"]
        ),
    )
    params, model_state = task.init_fn(jax.random.key(0))
    assert float(task.loss_fn(params, task.train)) == 1.0
    np.testing.assert_array_equal(task.predict(params, model_state, task.test), 2.0)


def test_data_with_unequal_numbers_of_examples_is_an_error():
    assert num_examples({"x": np.zeros((3, 2)), "y": np.zeros(3)}) == 3
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        num_examples({"x": np.zeros((3, 2)), "y": np.zeros(2)})
