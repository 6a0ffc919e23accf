"""The experiment on steps measured in KL: its figures, and that they can fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from experiments.evidence import step_size
from experiments.evidence.networks import digits
from tests.evidence.helpers import assert_as_expected, run


def test_figures_are_as_expected():
    evidence = run(step_size.STEP_SIZE)
    assert_as_expected(evidence)
    assert [plot.name for plot in evidence.plots] == ["step_size"]


@pytest.mark.slow
def test_figures_of_the_full_experiment_are_as_expected():
    assert_as_expected(run(step_size.STEP_SIZE, quick=False))


def test_steps_of_another_length_than_that_measured_are_found_out(monkeypatch):
    natural_gradient = ngd.natural_gradient

    def altered(*args, max_kl, **kwargs):
        tx = natural_gradient(*args, max_kl=max_kl, **kwargs)
        # Half as long at the larger radius, twice as long at the smaller one.
        scale = jnp.where(max_kl(0) > 5e-4, 0.5, 2.0)

        def update(*args, **kwargs):
            updates, state = tx.update(*args, **kwargs)
            return jax.tree.map(lambda leaf: scale * leaf, updates), state

        return tx._replace(update=update)

    monkeypatch.setattr(ngd, "natural_gradient", altered)
    monkeypatch.setattr(step_size, "_STEPS", 3)
    with jax.enable_x64(True):
        steps = step_size._to_the_radius([(1e-3, 1e-3), (1e-4, 1e-3)], digits(50))
    assert steps.kl[0].max() < step_size.FILL * 1e-3
    assert steps.kl[1].min() > 1e-4


def test_guess_of_a_damped_step_is_close_and_its_kl_is_that_of_the_step(monkeypatch):
    monkeypatch.setattr(step_size, "_STEPS", 3)
    with jax.enable_x64(True):
        steps = step_size._to_the_radius([(1e-7, 1.0)], digits(50))
    # So short a step, so much damping: the quadratic model holds to round figures.
    np.testing.assert_allclose(steps.guess, 1e-7, rtol=1e-2)
    np.testing.assert_array_less(steps.kl, 1e-7)
    np.testing.assert_array_less(step_size.FILL * 1e-7, steps.kl)


def test_rank_is_at_most_what_dark_pixels_and_softmax_leave():
    with jax.enable_x64(True):
        batch = digits(100)
        rank, largest = step_size._rank(batch)
        lit = int((np.asarray(batch["x"]) > 0).any(0).sum())
    assert largest == (lit * 10 + 10) + (10 + 1) * 9
    assert rank <= largest
