"""Steps that are halved or refused because of what they do to the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from tests.marks import long_unless
from tests.transform.problems import (
    flat,
    grad_fn,
    kl_fn,
    loss_of_outputs,
    make_problem,
    model_fn,
    step_of,
)
from tests.transform.problems import wide_loss_fn as loss_fn

MAX_KL = 0.1
SOLVER = ngd.CG(30)


def make(accept, **options):
    settings = {"max_kl": MAX_KL, "damping": 1e-2, "solver": SOLVER, **options}
    return ngd.natural_gradient(
        None, model_fn, ngd.Categorical(), accept=accept, **settings
    )


# Steps of different programs are compared to the bit.
pytestmark = pytest.mark.usefixtures("optimized")


@functools.cache
def problem():
    """A problem in 64 bits, its gradient and the whole step to the radius."""
    params, batch = make_problem(dtype=jnp.float64)
    grads = grad_fn(params, batch)
    updates, state = step_of(make(None), params, batch)
    return params, batch, grads, updates, state


def penalized(weight):
    """A loss with the same gradient at the start, and a penalty for leaving it."""
    start = problem()[0]

    def value_fn(params, batch):
        moved = optax.tree.sub(params, start)
        return loss_fn(params, batch) + weight * optax.tree.vdot(moved, moved)

    return value_fn


def halvings_by_hand(value_fn, fraction, max_halvings):
    """The first of 1, 1/2, 1/4, ... of the whole step that is good enough."""
    params, batch, grads, updates, _ = problem()
    before = float(value_fn(params, batch))
    for count in range(max_halvings + 1):
        step = 0.5**count * flat(updates)
        moved = jax.tree.map(lambda p, u, k=count: p + 0.5**k * u, params, updates)
        promised = -float(np.dot(flat(grads), step))
        if before - float(value_fn(moved, batch)) >= fraction * promised:
            return count
    return None


def update(tx, value_fn, **extra):
    params, batch, grads, _, _ = problem()
    arguments = {"batch": batch, "value_fn": value_fn, **extra}
    return jax.jit(
        lambda grads, state, params: tx.update(grads, state, params, **arguments)
    )(grads, tx.init(params), params)


@pytest.mark.long
@pytest.mark.parametrize(("weight", "fraction"), [(1.0, 0.1), (5.0, 0.1), (0.3, 0.9)])
def test_step_is_the_longest_halving_that_decreases_enough(x64, weight, fraction):
    params, batch, _, whole, whole_state = problem()
    expected = halvings_by_hand(penalized(weight), fraction, 10)
    assert expected is not None
    assert expected >= 1
    rule = ngd.SufficientDecrease(fraction)
    updates, state = update(make(rule), penalized(weight))
    assert state.info.status == ngd.StepStatus.TAKEN
    np.testing.assert_allclose(flat(updates), 0.5**expected * flat(whole), rtol=1e-12)
    scale = 0.5**expected * whole_state.info.step_scale
    np.testing.assert_allclose(state.info.step_scale, scale, rtol=1e-12)
    measured = kl_fn(params, optax.apply_updates(params, updates), batch)
    np.testing.assert_allclose(state.info.measured_kl, measured, rtol=1e-9)
    evaluations = whole_state.info.num_kl_evaluations + expected
    assert state.info.num_kl_evaluations == evaluations


@pytest.mark.long
def test_good_step_is_left_as_it_is(x64):
    *_, whole, whole_state = problem()
    assert halvings_by_hand(loss_fn, 0.1, 0) == 0
    updates, state = update(make(ngd.SufficientDecrease(0.1)), loss_fn)
    np.testing.assert_array_equal(flat(updates), flat(whole))
    assert state.info.measured_kl == whole_state.info.measured_kl


@pytest.mark.parametrize("max_halvings", long_unless([2], [0, 2]))
def test_step_that_never_decreases_enough_is_refused(x64, max_halvings):
    assert halvings_by_hand(penalized(1e3), 0.1, max_halvings) is None
    tx = make(ngd.SufficientDecrease(0.1, max_halvings=max_halvings))
    updates, state = update(tx, penalized(1e3))
    assert state.info.status == ngd.StepStatus.NO_REDUCTION
    assert not flat(updates).any()
    assert (state.count, state.info.measured_kl, state.info.step_scale) == (0, 0, 0)


def test_loss_that_is_not_a_number_refuses(x64):
    tx = make(ngd.SufficientDecrease(0.0, max_halvings=1))
    start = loss_fn(*problem()[:2])
    updates, state = update(tx, lambda *_: jnp.nan, value=start)
    assert state.info.status == ngd.StepStatus.NO_REDUCTION
    assert not flat(updates).any()


def test_halved_step_is_measured_anew_and_kept_within_the_radius(x64):
    """A model whose KL is larger by a fifth at half of the step than at all of it."""

    def bump_fn(params, batch):
        # s = 1 is at the radius; outputs move further where the step is halved.
        s = params[0] * batch
        return jnp.where(jnp.abs(params[0] - 0.5) < 0.01, jnp.sqrt(1.2), 1.0) * (
            jnp.where(jnp.abs(params[0]) > 0.4, 1.0, s)
        )

    def value_fn(params, _batch):
        return jnp.where(params[0] > 0.6, 1.0, -params[0])

    batch = jnp.ones((2, 1))
    tx = ngd.natural_gradient(
        1.0,
        bump_fn,
        ngd.Gaussian(),
        max_kl=0.5,
        damping=0.0,
        accept=ngd.SufficientDecrease(0.0),
        solver=ngd.CG(2),
    )
    params, grads = (jnp.zeros(()),), (-jnp.ones(()),)
    (update,), state = jax.jit(
        lambda g, s, p: tx.update(g, s, p, batch=batch, value_fn=value_fn)
    )(grads, tx.init(params), params)
    assert state.info.status == ngd.StepStatus.TAKEN
    np.testing.assert_allclose(update, 0.25)
    np.testing.assert_allclose(state.info.measured_kl, 0.25**2 / 2)


@pytest.mark.long
def test_the_loss_may_be_one_of_outputs():
    params, batch = make_problem()
    tx = make(ngd.SufficientDecrease(), loss_fn=loss_of_outputs)
    updates, state = step_of(tx, params, batch)
    assert state.info.status == ngd.StepStatus.TAKEN
    assert loss_fn(optax.apply_updates(params, updates), batch) < loss_fn(params, batch)
