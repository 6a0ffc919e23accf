"""Bad batches among good ones: nothing moves, the state stays, `status` says why."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from tests.test_transform import loss_fn, make_problem, model_fn

PARAMS, BATCH = make_problem()

BAD = {
    "nan": lambda x: x.at[3, 1].set(jnp.nan),
    "infinity": lambda x: x.at[0, 0].set(jnp.inf),
    "all nan": lambda x: jnp.full_like(x, jnp.nan),
    "overflow": lambda x: x.at[2].set(jnp.array([3e38, -3e38])),
}


DAMPINGS = {
    "constant": 1e-2,
    "schedule": lambda count: 1e-2 / (1 + count),
    "relative": ngd.RelativeDamping(1e-2),
    "levenberg-marquardt": ngd.LevenbergMarquardt(initial=1e-2),
}


def make_step(damping, **options):
    tx = ngd.natural_gradient(
        1.0, model_fn, ngd.Categorical(), max_kl=1e-2, damping=damping, **options
    )

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(
            grads, state, params, batch=batch, value=value, value_fn=loss_fn
        )
        return optax.apply_updates(params, updates), state, value

    return tx.init(PARAMS), step


def assert_bitwise_equal(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


@pytest.mark.parametrize("damping", DAMPINGS)
def test_bad_batches_at_random_change_nothing_and_training_goes_on(damping):
    state, step = make_step(DAMPINGS[damping], momentum=0.5)
    rng = np.random.default_rng(0)
    params, values, taken, bad_seen = PARAMS, [], 0, 0
    for index in range(200):
        # The first one is bad: nothing good to go back to but the start.
        is_bad = index == 0 or rng.random() < 0.3
        batch = BATCH
        if is_bad:
            names = list(BAD) if index else ["all nan"]
            spoil = BAD[names[rng.integers(len(names))]]
            batch = BATCH | {"x": spoil(BATCH["x"])}
        new_params, new_state, value = step(params, state, batch)
        status = ngd.StepStatus(int(new_state.info.status))
        if is_bad and status != ngd.StepStatus.TAKEN:
            bad_seen += 1
            assert status.message.startswith("Refused")
            assert_bitwise_equal(new_params, params)
            kept = new_state._replace(info=state.info)
            if status == ngd.StepStatus.NO_REDUCTION:
                # Finite, and no good: the one thing that Levenberg-Marquardt learns.
                assert new_state.damping > state.damping
                kept = kept._replace(damping=state.damping)
            assert_bitwise_equal(kept, state)
        elif is_bad:
            # Finite after all, since units saturate: an ordinary step.
            assert new_state.info.measured_kl <= 1.05e-2
        if not is_bad:
            values.append(float(value))
            taken += status == ngd.StepStatus.TAKEN
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(new_params))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(new_state.direction))
        params, state = new_params, new_state
    assert bad_seen > 30
    assert taken > 20  # Levenberg-Marquardt refuses what raises the loss
    assert values[-1] < 0.5 * values[0]


CAUSES = {
    "gradient": ({"grads": jnp.nan}, ngd.StepStatus.NON_FINITE_GRADIENT),
    "infinite gradient": ({"grads": jnp.inf}, ngd.StepStatus.NON_FINITE_GRADIENT),
    "value": ({"value": jnp.nan}, ngd.StepStatus.NON_FINITE_VALUE),
    "model": ({"x": jnp.nan}, ngd.StepStatus.NON_FINITE_MODEL),
    "nothing": ({}, ngd.StepStatus.TAKEN),
}


@pytest.fixture(scope="module")
def causes_step():
    tx = ngd.natural_gradient(1.0, model_fn, ngd.Categorical())
    grads = jax.grad(loss_fn)(PARAMS, BATCH)
    state = tx.init(PARAMS)

    @jax.jit
    def step(factor, value, x):
        spoiled = jax.tree.map(lambda g: g * factor, grads)
        batch = BATCH | {"x": BATCH["x"] * x}
        return tx.update(spoiled, state, PARAMS, batch=batch, value=value)

    return step


@pytest.mark.parametrize("name", CAUSES)
def test_status_names_the_cause(name, causes_step):
    given, status = CAUSES[name]
    updates, state = causes_step(
        *(given.get(key, 1.0) for key in ("grads", "value", "x"))
    )
    assert state.info.status == status
    is_taken = status == ngd.StepStatus.TAKEN
    assert any(np.any(x) for x in jax.tree.leaves(updates)) == is_taken
    assert state.count == int(is_taken)


def test_fixed_rate_that_leads_to_infinite_outputs_is_refused():
    params = {"w": jnp.ones((2, 3))}
    exponential_fn = lambda params, batch: jnp.exp(batch["x"] @ params["w"])  # noqa: E731
    tx = ngd.natural_gradient(1e20, exponential_fn, ngd.Categorical())
    grads = {"w": -jnp.ones((2, 3)).at[0, 0].set(3.0)}
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=BATCH)
    assert state.info.status == ngd.StepStatus.NON_FINITE_KL
    assert not updates["w"].any()


def test_every_status_has_a_message():
    messages = [status.message for status in ngd.StepStatus]
    assert len(set(messages)) == len(ngd.StepStatus)
    assert sum(message.startswith("Refused") for message in messages) == (
        len(messages) - 1
    )
