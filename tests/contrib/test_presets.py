"""Presets have the numbers of their sources, and each of them trains."""

import jax
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from tests.marks import long_unless
from tests.transform.problems import make_problem, model_fn, wide_loss_fn


def _halves(batch):
    return jax.tree.map(lambda x: x[::2], batch)


PRESETS = {
    "trpo": ngd.contrib.presets.trpo,
    "hessian_free": ngd.contrib.presets.hessian_free,
    "kfac": ngd.contrib.presets.kfac,
    "pascanu_bengio": lambda: ngd.contrib.presets.pascanu_bengio(_halves),
}


@pytest.mark.parametrize("name", long_unless({"kfac", "trpo"}, PRESETS.keys()))
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
    taken = np.isin(info.status, [ngd.StepStatus.TAKEN, ngd.StepStatus.TAKEN_SHORT])
    assert taken.sum() >= 10
    assert values[-1] < 0.8 * values[0]
    if name == "trpo":
        assert (info.measured_kl <= 1.0001e-2).all()
        np.testing.assert_allclose(info.damping, 1e-3)
    else:
        assert not np.allclose(state.damping, info.damping[0])


def test_the_numbers_are_those_of_the_sources():
    """As in CLAIMS, and the papers there."""
    trpo = ngd.contrib.presets.trpo()
    assert (trpo["max_kl"], trpo["solver"].max_steps) == (0.01, 10)
    assert trpo["damping"] == 1e-3
    assert trpo["accept"] == ngd.SufficientDecrease(0.1, max_halvings=10)

    free = ngd.contrib.presets.hessian_free()
    rule, solver = free["damping"], free["solver"]
    assert (rule.initial, rule.increase, rule.decrease) == (45.0, 3 / 2, 2 / 3)
    assert (rule.low, rule.high, solver.warm_start) == (1 / 4, 3 / 4, 0.95)
    assert (solver.max_steps, solver.progress_tol) == (250, 5e-4)
    assert solver.backtracking
    assert solver.preconditioner.power == 0.75

    kfac = ngd.contrib.presets.kfac()
    rule, solver = kfac["damping"], kfac["solver"]
    assert (rule.initial, rule.every) == (150.0, 5)
    np.testing.assert_allclose(rule.decrease, 0.95**5)
    assert isinstance(solver, ngd.KFAC)
    assert (solver.decay, solver.refresh_every, solver.observe_every) == (0.95, 5, 1)

    assert ngd.contrib.presets.pascanu_bengio(_halves)["damping"].initial == 6.0


def test_each_call_makes_its_own():
    ngd.contrib.presets.trpo()["max_kl"] = 1.0
    assert ngd.contrib.presets.trpo()["max_kl"] == 0.01
