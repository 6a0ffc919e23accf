"""The experiment on wrong labels: its figures, and that they can fail."""

import jax
import numpy as np
import pytest

import ngd_jax as ngd
from experiments.claims import bad_batches, outliers
from experiments.claims.bad_batches import CLASSIFICATION, REGRESSION, SHIFT


def test_natural_gradient_without_a_radius_is_found_out():
    with jax.enable_x64(True):
        streams = bad_batches.draw(REGRESSION, [0], 250)
        natural = outliers._natural_gradient(REGRESSION)
        (free,) = outliers._compare(REGRESSION, natural, streams, {"": {}}).values()
    names = (
        outliers._SGD,
        outliers._CLIPPED,
        outliers._ADAM,
        outliers._FIXED,
        outliers._LIMITED,
    )
    checks = outliers._checks(dict.fromkeys(names, free), {"one": free, "all": free})
    failed = [check.name for check in checks if not check.holds]
    assert len([name for name in failed if "KL ≤ 1e-3" in name]) == 3
    assert not [name for name in failed if "fixed rate: KL" in name]


@pytest.mark.parametrize("task", [REGRESSION, CLASSIFICATION])
def test_streams_are_of_the_shapes_and_the_frequency_of_outliers_that_are_claimed(task):
    stream = bad_batches.draw(task, [3, 4], 500)
    assert stream.x.shape == (2, 500, bad_batches.BATCH, 8)
    assert stream.y.shape[:3] == (2, 500, bad_batches.BATCH)
    assert stream.wrong.shape == stream.y.shape
    assert abs(stream.is_outlier.mean() - bad_batches.PROBABILITY) < 0.04
    assert not np.allclose(stream.x[0], stream.x[1])


def test_wrong_labels_are_off_by_the_shift_and_of_another_class():
    values = bad_batches.draw(REGRESSION, [0], 5)
    np.testing.assert_allclose(values.wrong - values.y, SHIFT)
    classes = bad_batches.draw(CLASSIFICATION, [0], 5)
    assert (classes.wrong != classes.y).all()
    assert set(np.unique(classes.wrong)) == {0, 1, 2}


def test_noise_of_the_labels_is_that_of_the_likelihood():
    rng = np.random.default_rng(0)
    outputs = np.full((20_000, 1), 7.0)
    labels = REGRESSION.label_fn(rng, outputs)
    assert abs(labels.mean() - 7) < 0.03
    assert abs(labels.std() - ngd.Gaussian().scale) < 0.03
    logits = np.log([0.5, 0.3, 0.2]) * np.ones((20_000, 1))
    frequencies = np.bincount(CLASSIFICATION.label_fn(rng, logits)) / 20_000
    np.testing.assert_allclose(frequencies, [0.5, 0.3, 0.2], atol=0.02)
