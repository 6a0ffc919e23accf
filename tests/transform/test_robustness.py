"""Bad batches among good ones: nothing moves, the state stays, `status` says why."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from tests.marks import long_unless
from tests.transform.problems import flat, loss_fn, make_problem, model_fn

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


def make_step(damping):
    tx = ngd.natural_gradient(
        1.0,
        model_fn,
        ngd.Categorical(),
        max_kl=1e-2,
        damping=damping,
        momentum=0.5,
        solver=ngd.CG(5, preconditioner=ngd.Kronecker(refresh_every=2)),
    )

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(
            grads, state, params, batch=batch, value=value, value_fn=loss_fn
        )
        return optax.apply_updates(params, updates), state, value

    return tx.init(PARAMS), step


def assert_finite(values):
    """Nothing is NaN or infinite, and no report holds NaN."""
    chex.assert_tree_all_finite(values)


def assert_bitwise_equal(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


@pytest.mark.parametrize(
    "damping", long_unless({"levenberg-marquardt"}, DAMPINGS.keys())
)
def test_bad_batches_at_random_change_nothing_and_training_goes_on(damping):
    state, step = make_step(DAMPINGS[damping])
    rng = np.random.default_rng(0)
    params, values, taken, bad_seen = PARAMS, [], 0, 0
    for index in range(200):
        # The first one is bad: there is only the start to go back to.
        is_bad = index == 0 or rng.random() < 0.3
        batch = BATCH
        if is_bad:
            names = list(BAD) if index else ["all nan"]
            spoil = BAD[names[rng.integers(len(names))]]
            batch = BATCH | {"x": spoil(BATCH["x"])}
        new_params, new_state, value = step(params, state, batch)
        assert_finite(new_state)
        status = ngd.StepStatus(int(new_state.info.status))
        if is_bad and not status.is_taken:
            bad_seen += 1
            assert status.message.startswith("Refused")
            assert_bitwise_equal(new_params, params)
            # A batch that was seen may enter the averages of the solver, if finite.
            kept = new_state._replace(info=state.info, solver_state=state.solver_state)
            if status == ngd.StepStatus.NO_REDUCTION:
                # Finite but bad: the one case from which Levenberg-Marquardt learns.
                assert new_state.damping > state.damping
                kept = kept._replace(damping=state.damping)
            assert_bitwise_equal(kept, state)
        elif is_bad:
            # Finite after all, since units saturate: an ordinary step.
            assert new_state.info.measured_kl <= 1.05e-2
        if not is_bad:
            values.append(float(value))
            taken += status.is_taken
        assert_finite(new_params)
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
    tx = ngd.natural_gradient(
        1.0, model_fn, ngd.Categorical(), momentum=0.5, solver=ngd.CG(5)
    )
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
    assert flat(state.direction).any() == is_taken
    assert_finite(state)


def test_fixed_rate_that_leads_to_infinite_outputs_is_refused():
    params = {"w": jnp.ones((2, 3))}
    exponential_fn = lambda params, batch: jnp.exp(batch["x"] @ params["w"])  # noqa: E731
    tx = ngd.natural_gradient(1e20, exponential_fn, ngd.Categorical(), solver=ngd.CG(5))
    grads = {"w": -jnp.ones((2, 3)).at[0, 0].set(3.0)}
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=BATCH)
    assert state.info.status == ngd.StepStatus.NON_FINITE_KL
    assert not updates["w"].any()


def test_a_damping_that_is_not_a_number_is_refused_and_not_reported():
    params = jnp.ones(2)
    tx = ngd.natural_gradient(
        1.0,
        lambda w, x: x * w,
        ngd.Gaussian(),
        damping=lambda count: jnp.where(count == 0, 0.5, jnp.nan),
        solver=ngd.CG(2),
    )
    update = jax.jit(tx.update)
    batch = jnp.array([[1.0, 2.0], [3.0, 1.0]])
    _, before = update(params, tx.init(params), params, batch=batch)
    updates, state = update(params, before, params, batch=batch)
    assert before.info.status == ngd.StepStatus.TAKEN
    assert state.info.status == ngd.StepStatus.NON_FINITE_MODEL
    assert state.info.damping == 0.5
    assert not updates.any()
    assert_finite(state)


# --- Updates that would not be finite, whatever their KL.


@pytest.mark.parametrize("max_kl", [None, 1e-2])
def test_an_infinite_step_along_which_kl_does_not_grow_is_refused(max_kl):
    """A common shift of log densities costs no KL, and so passes any radius."""
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.full(3, 0.1)}
    tx = ngd.natural_gradient(
        1e30,
        lambda params, x: x @ params["w"],
        ngd.LogDensity(),
        max_kl=max_kl,
        damping=1e-12,
        momentum=0.5,
        solver=ngd.CG(5),
    )
    update = jax.jit(lambda g, s: tx.update(g, s, params, batch=jnp.ones((4, 3))))
    updates, state = update(grads, tx.init(params))
    assert_finite((optax.apply_updates(params, updates), state))
    if state.info.status != ngd.StepStatus.TAKEN_SHORT:
        assert state.info.status == ngd.StepStatus.NON_FINITE_UPDATE
        assert (state.count, state.info.step_scale) == (0, 0)
        assert not flat((updates, state.direction)).any()


@pytest.mark.parametrize(
    ("dtype", "start", "steps"),
    [("float16", 6e4, (3e3, 5e4, 4e5)), ("bfloat16", 3e38, (1e37, 2e38))],
)
def test_an_update_that_its_dtype_cannot_hold_is_refused(dtype, start, steps):
    """Finite in float32, infinite as it would be emitted, or as the parameters are."""
    params = {"w": jnp.full(3, start, dtype)}
    tx = ngd.natural_gradient(
        1.0,
        lambda params, x: jnp.tanh(1e-30 * (x @ params["w"].astype(jnp.float32))),
        ngd.Gaussian(event_ndims=0),
        damping=1.0,
        solver=ngd.CG(5),
    )
    x = jnp.abs(X)  # the KL is finite at infinite parameters too
    update = jax.jit(lambda g: tx.update(g, tx.init(params), params, batch=x))
    for step, is_taken in zip(steps, (True, False, False), strict=False):
        updates, state = update({"w": jnp.full(3, -step)})
        assert_finite((optax.apply_updates(params, updates), state))
        assert flat(updates).any() == is_taken
        expected = "TAKEN" if is_taken else "NON_FINITE_UPDATE"
        assert ngd.StepStatus(int(state.info.status)).name == expected


X = jnp.array([[1.0, 2.0, 0.5], [0.5, -1.0, 1.0], [3.0, 1.0, -2.0]])
RATES = {
    "quadratic model": ngd.contrib.QuadraticModelRate(),
    "to the radius": None,
    "a number": 1.0,
}


@pytest.mark.parametrize("name", long_unless({"to the radius"}, RATES.keys()))
def test_gradients_whose_products_overflow_are_refused_or_give_finite_steps(name):
    params = {"w": jnp.array([1.0, -1.0, 0.5])}
    tx = ngd.natural_gradient(
        RATES[name],
        lambda params, x: x @ params["w"],
        ngd.Gaussian(event_ndims=0),
        max_kl=1.0,
        damping=1.0,
        solver=ngd.CG(5),
        momentum=0.0 if name == "quadratic model" else 0.5,
    )
    update = jax.jit(lambda g, s: tx.update({"w": g}, s, params, batch=X))
    _, start = update(jnp.array([0.1, 0.2, 0.0]), tx.init(params))
    for size in (1e-38, 1e-30, 1e10, 1e20, 1e30, 1e35, 1e38):
        updates, state = update(jnp.array([1.0, -2.0, 1.0]) * size, start)
        assert_finite((updates, state))
        if not ngd.StepStatus(int(state.info.status)).is_taken:
            assert not flat(updates).any()
            assert state.count == start.count
            assert_bitwise_equal(state.direction, start.direction)
