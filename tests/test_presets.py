"""Presets: the numbers of their sources, and that each of them trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from tests.test_transform import make_problem, model_fn, wide_loss_fn


def _halves(batch):
    return jax.tree.map(lambda x: x[::2], batch)


PRESETS = {
    "trpo": ngd.presets.trpo,
    "hessian_free": ngd.presets.hessian_free,
    "kfac": ngd.presets.kfac,
    "pascanu_bengio": lambda: ngd.presets.pascanu_bengio(_halves),
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_trains(name):
    params, batch = make_problem()
    tx = ngd.natural_gradient(
        model_fn=model_fn, likelihood=ngd.Categorical(), **PRESETS[name]()
    )

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(wide_loss_fn)(params, batch)
        updates, state = tx.update(
            grads, state, params, batch=batch, value=value, value_fn=wide_loss_fn
        )
        params = optax.apply_updates(params, updates)
        return (params, state), (value, state.info)

    (_, state), (values, info) = jax.jit(
        lambda params: jax.lax.scan(step, (params, tx.init(params)), None, length=40)
    )(params)
    taken = info.status == ngd.StepStatus.TAKEN
    assert taken.sum() >= 10
    assert values[-1] < 0.8 * values[0]
    if name == "trpo":
        assert (info.measured_kl <= 1.0001e-2).all()
        np.testing.assert_allclose(info.damping, 1e-3)
    else:
        assert not np.allclose(state.damping, info.damping[0])


def test_the_numbers_are_those_of_the_sources():
    """As in CLAIMS, and the papers there."""
    trpo = ngd.presets.trpo()
    assert (trpo["max_kl"], trpo["solver"].max_steps) == (0.01, 10)
    assert trpo["damping"] == 1e-3
    assert trpo["acceptance"] == ngd.SufficientDecrease(0.1, max_halvings=10)

    free = ngd.presets.hessian_free()
    rule, solver = free["damping"], free["solver"]
    assert (rule.initial, rule.increase, rule.decrease) == (45.0, 3 / 2, 2 / 3)
    assert (rule.low, rule.high, free["warm_start"]) == (1 / 4, 3 / 4, 0.95)
    assert (solver.max_steps, solver.progress_tol) == (250, 5e-4)
    assert solver.backtracking
    assert solver.preconditioner.power == 0.75

    kfac = ngd.presets.kfac()
    rule, solver = kfac["damping"], kfac["solver"]
    assert (rule.initial, rule.every) == (150.0, 5)
    np.testing.assert_allclose(rule.decrease, 0.95**5)
    assert solver.preconditioner.decay == 0.95
    assert solver.preconditioner.refresh_every == 5

    assert ngd.presets.pascanu_bengio(_halves)["damping"].initial == 6.0


def test_each_call_makes_its_own():
    ngd.presets.trpo()["max_kl"] = 1.0
    assert ngd.presets.trpo()["max_kl"] == 0.01


@pytest.mark.parametrize("every", [1, 3])
def test_damping_is_adapted_at_every_so_many_steps(every):
    params, batch = make_problem()
    rule = ngd.LevenbergMarquardt(initial=100.0, every=every)
    tx = ngd.natural_gradient(0.1, model_fn, ngd.Categorical(), damping=rule)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, batch=batch, value_fn=_loss))
    state, dampings = tx.init(params), []
    for _ in range(6):
        updates, state = update(jax.grad(_loss)(params, batch), state, params)
        params = optax.apply_updates(params, updates)
        dampings.append(float(state.damping))
    changes = np.diff([100.0, *dampings]) != 0
    expected = [(i + 1) % every == 0 for i in range(6)]
    np.testing.assert_array_equal(changes, expected)


def test_a_refused_step_is_followed_by_more_damping_at_once():
    params, batch = make_problem()
    rule = ngd.LevenbergMarquardt(initial=1e-2, every=100)
    tx = ngd.natural_gradient(1e4, model_fn, ngd.Categorical(), damping=rule)
    updates, state = jax.jit(
        lambda g, s, p: tx.update(g, s, p, batch=batch, value_fn=_loss)
    )(jax.grad(_loss)(params, batch), tx.init(params), params)
    assert state.info.status == ngd.StepStatus.NO_REDUCTION
    np.testing.assert_allclose(state.damping, 1.5e-2)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))


def _loss(params, batch):
    return wide_loss_fn(params, batch)
