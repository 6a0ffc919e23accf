"""The promise: the KL measured from outside is within `max_kl`, or nothing moves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ngd_jax as ngd
from tests.transform.problems import make_problem, model_fn

GRAD = jax.jit(
    jax.grad(
        lambda params, batch: optax.softmax_cross_entropy_with_integer_labels(
            model_fn(params, batch).astype(jnp.float32), batch["y"]
        ).mean()
    )
)


def _step(params, batch, grads, max_kl, rate, damping):
    tx = ngd.natural_gradient(
        rate, model_fn, ngd.Categorical(), max_kl=max_kl, damping=damping
    )
    updates, state = tx.update(grads, tx.init(params), params, batch=batch)
    return updates, state.info


@jax.jit
def _kl(params, moved, batch):
    return ngd.mean_kl(model_fn, params, moved, batch, ngd.Categorical())


STEP = jax.jit(_step)


def _cg(max_kl):
    return ngd.natural_gradient(
        None,
        model_fn,
        ngd.Categorical(),
        max_kl=max_kl,
        damping=1e-3,
        momentum=1e-30,  # so that the direction is kept
        solver=ngd.CG(10),
    )


@jax.jit
def STEP_OF_CG(params, batch, grads, max_kl):
    tx = _cg(max_kl)
    updates, state = tx.update(grads, tx.init(params), params, batch=batch)
    return updates, state.info


@jax.jit
def DIRECTION_OF_CG(params, batch, grads):
    tx = _cg(1e-3)
    return tx.update(grads, tx.init(params), params, batch=batch)[1].direction


def check_promise(
    params, batch, grads, *, max_kl, rate=np.inf, damping=1e-3, tolerance=0.02
):
    """Takes a step, checks the promise, and returns KL and info."""
    updates, info = STEP(params, batch, grads, *jnp.array([max_kl, rate, damping]))
    kl = _kl(params, optax.apply_updates(params, updates), batch)
    assert info.num_kl_evaluations <= 10
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    chex.assert_tree_all_finite(info)
    if ngd.StepStatus(int(info.status)).is_taken:
        assert kl <= 1.02 * max_kl
        np.testing.assert_allclose(info.measured_kl, kl, rtol=tolerance, atol=1e-7)
    else:
        assert not any(np.any(x) for x in jax.tree.leaves(updates))
        assert info.measured_kl == info.step_scale == 0
    return float(kl), info


def scaled(tree, factor):
    return jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), tree)


def _flat_network(params):
    return params | {"out": [jnp.zeros_like(x) for x in params["out"]]}


# name: (parameters, gradient), from those of a random network
REACHABLE = {
    "random": lambda p, g: (p, g),
    "gradient of 1e30": lambda p, g: (p, scaled(g, 1e30)),
    "gradient of 1e-30": lambda p, g: (p, scaled(g, 1e-30)),
    "uniform outputs": lambda p, _: (_flat_network(p), None),
    "narrow weights": lambda p, _: (scaled(p, 1e-2), None),
    "saturated units": lambda p, _: (
        p | {"hidden": scaled(p["hidden"], 50.0)},
        None,
    ),
}


@pytest.mark.parametrize("max_kl", [1e-1, 1e-4])
@pytest.mark.parametrize("name", REACHABLE)
def test_step_goes_to_the_radius_where_it_can_be_reached(name, max_kl):
    params, batch = make_problem()
    params, grads = REACHABLE[name](params, GRAD(params, batch))
    grads = GRAD(params, batch) if grads is None else grads
    kl, info = check_promise(params, batch, grads, max_kl=max_kl)
    assert info.status == ngd.StepStatus.TAKEN
    assert kl >= 0.9 * max_kl


HARD = {
    "saturated outputs": lambda p: scaled(p, 30.0),
    "dead units": lambda p: p | {"hidden": scaled(p["hidden"], 1e4)},
    "constant network": lambda p: scaled(p, 0.0),
    "huge network": lambda p: scaled(p, 1e8),
}


@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize("name", HARD)
def test_promise_holds_where_the_quadratic_model_fails(name, damping):
    params, batch = make_problem()
    params = HARD[name](params)
    grads = GRAD(params, batch)
    check_promise(params, batch, grads, max_kl=1e-3, damping=damping)


def test_promise_holds_along_directions_that_the_metric_does_not_see():
    params, batch = make_problem()
    noise = make_problem(seed=7)[0]
    for scale in (1e-6, 1.0, 1e6):
        check_promise(params, batch, scaled(noise, scale), max_kl=1e-3, damping=0.0)


@given(
    seed=st.integers(0, 10**6),
    weight=st.floats(-2, 2),
    size=st.floats(-20, 20),
    radius=st.floats(-6, 1),
    rate=st.sampled_from([np.inf, 1e-3, 1.0, 1e3]),
    damping=st.sampled_from([0.0, 1e-8, 1e-3, 1.0]),
)
def test_promise_holds_for_any_network(seed, weight, size, radius, rate, damping):
    params, batch = make_problem(seed=seed)
    params = scaled(params, 10.0**weight)
    grads = scaled(GRAD(params, batch), 10.0**size)
    check_promise(params, batch, grads, max_kl=10.0**radius, rate=rate, damping=damping)


def test_zero_gradient_is_a_step_of_no_length():
    params, batch = make_problem()
    kl, info = check_promise(params, batch, scaled(params, 0.0), max_kl=1e-2)
    assert kl == 0
    assert info.status == ngd.StepStatus.TAKEN


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "radii"), [("bfloat16", (1e-3, 1e-5)), ("float16", (1e-5, 1e-6))]
)
def test_kl_is_that_of_the_parameters_as_rounded(dtype, radii):
    """At a small radius most of a step is lost to rounding, and so is most of its KL.

    What is measured is what is emitted: to the round-off of the KL itself, where the
    step before rounding is off by a factor.
    """
    params, batch = make_problem(dtype=dtype)
    batch = batch | {"x": batch["x"].astype(jnp.float32)}
    unrounded = 0
    for max_kl in radii:
        for scale in (0.3, 1.0, 3.0):
            at = scaled(params, scale)
            grads = GRAD(at, batch)
            updates, info = STEP_OF_CG(at, batch, grads, max_kl)
            after = jax.jit(optax.apply_updates)(at, updates)
            kl = float(_kl(at, after, batch))
            assert kl <= 1.005 * max_kl
            np.testing.assert_allclose(info.measured_kl, kl, rtol=5e-3, atol=1e-9)
            exact = jax.tree.map(
                lambda p, d, s=info.step_scale: p.astype(jnp.float32) - s * d,
                at,
                DIRECTION_OF_CG(at, batch, grads),
            )
            wide = jax.tree.map(lambda p: p.astype(jnp.float32), at)
            exact_kl = float(_kl(wide, exact, batch))
            unrounded += abs(exact_kl - kl) > 0.05 * max_kl
    assert unrounded >= 2  # or this test would show nothing


def test_steps_below_the_normal_numbers_of_float16_are_rounded_not_lost():
    grads = jnp.array([3e-6, -7.4e-7, 6.1e-5, 1e-8, 0.25])
    params = jnp.zeros(5, jnp.float16)
    tx = ngd.natural_gradient(1.0, lambda w, x: x * w, ngd.Gaussian(), damping=1.0)

    @jax.jit
    def step(grads):
        # F is zero on such a batch, and d = g.
        batch = jnp.zeros((2, 5), jnp.float32)
        return tx.update(grads, tx.init(params), params, batch=batch)[0]

    updates = np.asarray(step(grads))
    np.testing.assert_array_equal(updates, -np.asarray(grads).astype(np.float16))


def test_steps_at_the_radius_take_a_handful_of_measurements():
    params, batch = make_problem()
    for _ in range(5):
        grads = GRAD(params, batch)
        updates, info = STEP(params, batch, grads, *jnp.array([1e-2, jnp.inf, 1e-3]))
        assert info.num_kl_evaluations <= 5
        params = optax.apply_updates(params, updates)
