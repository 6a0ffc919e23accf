"""The experiment on steps measured in KL: its figures, and that they can fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from experiments.claims import step_size
from experiments.claims.networks import digits


@pytest.fixture(scope="module")
def altered_steps():
    """One run: steps at half the right length, at twice that, and as they are."""
    natural_gradient = ngd.natural_gradient

    def altered(*args, max_kl, **kwargs):
        tx = natural_gradient(*args, max_kl=max_kl, **kwargs)
        scale = jnp.where(max_kl(0) > 5e-4, 0.5, jnp.where(max_kl(0) > 5e-6, 2.0, 1.0))

        def update(*args, **kwargs):
            updates, state = tx.update(*args, **kwargs)
            return jax.tree.map(lambda leaf: scale * leaf, updates), state

        return tx._replace(update=update)

    runs = [(1e-3, 1e-3), (1e-4, 1e-3), (1e-7, 1.0)]
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(ngd, "natural_gradient", altered)
        patch.setattr(step_size, "_STEPS", 3)
        return step_size._to_the_radius(runs, digits(50))


def test_steps_of_another_length_than_that_measured_are_found_out(altered_steps):
    half, double, _ = altered_steps.kl
    assert half.max() < step_size.FILL * 1e-3
    assert double.min() > 1e-4


def test_guess_of_a_short_and_damped_step_is_right(altered_steps):
    np.testing.assert_allclose(altered_steps.guess[2], 1e-7, rtol=1e-2)
    np.testing.assert_array_less(altered_steps.kl[2], 1e-7)
    np.testing.assert_array_less(step_size.FILL * 1e-7, altered_steps.kl[2])


def test_rank_is_at_most_what_dark_pixels_and_softmax_leave():
    with jax.enable_x64(True):
        batch = digits(100)
        rank, largest = step_size._rank(batch)
        lit = int((np.asarray(batch["x"]) > 0).any(0).sum())
    assert largest == (lit * 10 + 10) + (10 + 1) * 9
    assert rank <= largest
