"""Damping relative to the metric, and damping that follows the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from tests.transform.problems import (
    damped_solve,
    dense_fisher,
    flat,
    grad_fn,
    loss_of_outputs,
    make_problem,
    model_fn,
    step_of,
    wide_loss_fn,
)


@pytest.mark.long
def test_relative_damping_is_in_units_of_the_mean_eigenvalue(x64):
    params, batch = make_problem(dtype=jnp.float64)
    tx = ngd.natural_gradient(
        1.0,
        model_fn,
        ngd.Categorical(),
        damping=ngd.RelativeDamping(0.1),
        solver=ngd.Cholesky(),
    )
    updates, state = step_of(tx, params, batch)
    fisher = dense_fisher(params, batch)
    damping = 0.1 * np.trace(fisher) / len(fisher)
    np.testing.assert_allclose(state.info.damping, damping, rtol=1e-10)
    gradient = flat(grad_fn(params, batch))
    np.testing.assert_allclose(
        flat(updates), -damped_solve(fisher, gradient, damping), rtol=1e-7, atol=1e-10
    )


PARAMS, BATCH = make_problem()

long = functools.partial(pytest.param, marks=pytest.mark.long)
LOSS_GIVEN = {
    "value_fn": ({}, {"value_fn": wide_loss_fn}),
    "value_fn of the parameters": (
        {},
        {"value_fn": lambda params: wide_loss_fn(params, BATCH)},
    ),
    "value and value_fn": ({}, {"value_fn": wide_loss_fn, "value": True}),
    "loss_fn": (
        {"loss_fn": loss_of_outputs},
        {},
    ),
    # A loss of outputs whose value is that of another one; `value_fn` decides.
    "value_fn before loss_fn": (
        {"loss_fn": lambda outputs, _: (outputs**2).mean() * 1e3},
        {"value_fn": wide_loss_fn},
    ),
}


@functools.cache
def _levenberg_marquardt(initial, name):
    """A jitted step with a learning rate, and where it starts from."""
    options, extra = LOSS_GIVEN[name]

    def make(rate):
        rule = ngd.LevenbergMarquardt(initial=initial)
        return ngd.natural_gradient(
            rate,
            model_fn,
            ngd.Categorical(),
            damping=rule,
            solver=ngd.CG(20),
            **options,
        )

    @jax.jit
    def step(rate, state, params, batch):
        value, grads = jax.value_and_grad(wide_loss_fn)(params, batch)
        given = {k: value if k == "value" else v for k, v in extra.items()}
        return make(rate).update(grads, state, params, batch=batch, **given)

    return step, make(1.0).init


@pytest.mark.parametrize(
    ("name", "initial", "factor"),
    [
        long("value_fn of the parameters", 10.0, 2 / 3),
        ("value and value_fn", 0.1, 1.0),
        ("loss_fn", 10.0, 2 / 3),
        long("value_fn before loss_fn", 10.0, 2 / 3),
    ],
)
def test_levenberg_marquardt_follows_the_ratio_of_reductions(name, initial, factor):
    params, batch = make_problem()
    step_fn, init_fn = _levenberg_marquardt(initial, name)
    updates, state = step_fn(1.0, init_fn(params), params, batch)
    fisher, step = dense_fisher(params, batch), flat(updates)
    gradient = flat(grad_fn(params, batch))
    predicted = -gradient @ step - step @ fisher @ step / 2
    moved = optax.apply_updates(params, updates)
    actual = wide_loss_fn(params, batch) - wide_loss_fn(moved, batch)
    assert (actual / predicted > 0.75) == (factor < 1)
    assert actual / predicted > 0.25
    assert state.info.status == ngd.StepStatus.TAKEN
    np.testing.assert_allclose(state.damping, factor * initial, rtol=1e-6)
    np.testing.assert_allclose(state.info.damping, initial)


@pytest.mark.parametrize(
    ("name", "initial"), [long("value and value_fn", 0.1), ("loss_fn", 10.0)]
)
def test_levenberg_marquardt_refuses_a_step_that_raises_the_loss(name, initial):
    params, batch = make_problem()
    step_fn, init_fn = _levenberg_marquardt(initial, name)
    updates, state = step_fn(1e3, init_fn(params), params, batch)
    assert state.info.status == ngd.StepStatus.NO_REDUCTION
    assert not flat(updates).any()
    assert state.count == 0
    np.testing.assert_allclose(state.damping, 1.5 * initial, rtol=1e-6)
    assert state.info.measured_kl == 0
    # And the next one, with more damping, starts from the same parameters.
    _, state = step_fn(1e-2, state, params, batch)
    assert state.info.status == ngd.StepStatus.TAKEN
    np.testing.assert_allclose(state.info.damping, 1.5 * initial, rtol=1e-6)


@pytest.mark.long
def test_a_refused_step_keeps_parameters_and_state_to_the_bit():
    """With momentum and a preconditioner, whose last values the next step needs."""
    params, batch = make_problem()
    rule = ngd.LevenbergMarquardt(initial=1.0)
    precondition = ngd.contrib.Nystrom(rank=3, key=jax.random.key(0), refresh_every=4)

    def make(rate):
        return ngd.natural_gradient(
            rate,
            model_fn,
            ngd.Categorical(),
            damping=rule,
            momentum=0.5,
            solver=ngd.CG(preconditioner=precondition),
        )

    @jax.jit
    def step(rate, grads, state, params):
        return make(rate).update(
            grads, state, params, batch=batch, value_fn=wide_loss_fn
        )

    tx = make(1.0)
    state, grads = tx.init(params), grad_fn(params, batch)
    updates, state = step(0.5, grads, state, params)
    assert state.info.status == ngd.StepStatus.TAKEN
    params = optax.apply_updates(params, updates)
    grads = grad_fn(params, batch)
    bad = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grads)
    for rate, gradient, expected in (
        (0.5, bad, ngd.StepStatus.NON_FINITE_GRADIENT),
        (1e4, grads, ngd.StepStatus.NO_REDUCTION),
    ):
        updates, refused = step(rate, gradient, state, params)
        assert refused.info.status == expected
        moved = optax.apply_updates(params, updates)
        for old, new in (
            (params, moved),
            (state.direction, refused.direction),
            (state.count, refused.count),
        ):
            jax.tree.map(np.testing.assert_array_equal, old, new)
        is_weighed = expected == ngd.StepStatus.NO_REDUCTION
        assert refused.damping == state.damping * (1.5 if is_weighed else 1.0)
        # The sketch is of these parameters, and ages whether or not the step is taken.
        assert refused.solver_state.age == state.solver_state.age + 1


@pytest.mark.long
@pytest.mark.parametrize("every", [1, 3])
def test_damping_is_adapted_at_every_so_many_steps(every):
    rule = ngd.LevenbergMarquardt(initial=100.0, every=every)
    update, state = _plain_rule(rule, 0.1)
    params, dampings = PARAMS, []
    for _ in range(6):
        updates, state = update(grad_fn(params, BATCH), state, params)
        params = optax.apply_updates(params, updates)
        dampings.append(float(state.damping))
    changes = np.diff([100.0, *dampings]) != 0
    expected = [(i + 1) % every == 0 for i in range(6)]
    np.testing.assert_array_equal(changes, expected)


@pytest.mark.long
def test_a_refused_step_is_followed_by_more_damping_at_once():
    update, state = _plain_rule(ngd.LevenbergMarquardt(initial=1e-2, every=100), 1e4)
    updates, state = update(grad_fn(PARAMS, BATCH), state, PARAMS)
    assert state.info.status == ngd.StepStatus.NO_REDUCTION
    np.testing.assert_allclose(state.damping, 1.5e-2)
    assert not flat(updates).any()


def _plain_rule(rule, rate):
    tx = ngd.natural_gradient(
        rate, model_fn, ngd.Categorical(), damping=rule, solver=ngd.CG(5)
    )
    update = jax.jit(
        lambda g, s, p: tx.update(g, s, p, batch=BATCH, value_fn=wide_loss_fn)
    )
    return update, tx.init(PARAMS)
