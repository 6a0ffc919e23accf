"""The experiment on the order of examples: its figures, and what they rest on."""

import numpy as np
import optax

from experiments.claims import order


def test_influence_is_none_where_nothing_is_learned_and_grows_with_the_rate():
    sizes = order._Sizes(segments=3, steps=4, draws=3, seeds=1)
    contestant = order._Contestant("SGD", "rate", (0.0, 0.01, 0.1), optax.sgd)
    result = order._measure(contestant, sizes)
    assert result.influence.shape == (3, 3)
    assert (result.influence[0] < 1e-14).all()
    assert (result.influence[1] > 0).all()
    assert (result.influence[2] > 10 * result.influence[1]).all()


def test_examples_of_the_stream_are_digits_shifted_by_a_pixel_at_most(monkeypatch):
    monkeypatch.setattr(order, "_NOISE", 0.0)
    images = {"x": np.eye(64)[[27, 36]], "y": np.array([3, 7])}
    drawn = order._draw_examples(np.random.default_rng(0), images, (50, 4))
    assert drawn["x"].shape == (50, 4, 64)
    row, column = np.divmod(drawn["x"].argmax(-1), 8)
    middle = np.where(drawn["y"] == 3, 3, 4)
    assert set(np.unique(row - middle)) == {-1, 0, 1}
    assert set(np.unique(column - middle)) == {-1, 0, 1}


def test_influences_are_compared_at_the_loss_asked_for():
    result = order._Result(
        loss=np.array([2.0, 1.0]), influence=np.array([[1e-2, 1.0], [1.0, 1.0]])
    )
    np.testing.assert_allclose(order._at_loss(result, 1.5), [1e-1, 1.0])
    np.testing.assert_allclose(order._at_loss(result, 9.0), [1e-2, 1.0])
    np.testing.assert_allclose(order._at_loss(result, 0.5), [1.0, 1.0])
