"""Damping in a metric of the user's: dense algebra, and invariance of the network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from tests.marks import long_unless
from tests.transform.problems import (
    dense_fisher,
    flat,
    grad_fn,
    kl_fn,
    make_problem,
    model_fn,
    step_of,
    wide_loss_fn,
)


def _scales(params, seed=5):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(np.exp(rng.normal(size=p.shape)), p.dtype), params
    )


EXACT = {"cg": ngd.CG(300, rtol=1e-13), "cholesky": ngd.Cholesky()}


@pytest.mark.parametrize("solver", long_unless({"cg"}, EXACT.keys()))
@pytest.mark.parametrize("given", long_unless(["function"], ["tree", "function"]))
def test_direction_solves_the_system_with_the_metric(solver, given, x64):
    params, batch = make_problem(dtype=jnp.float64)
    scales = _scales(params)
    as_function = lambda tree: jax.tree.map(jnp.multiply, scales, tree)  # noqa: E731
    rule = ngd.CovariantDamping(0.1, scales if given == "tree" else as_function)
    tx = ngd.natural_gradient(
        0.3,
        model_fn,
        ngd.Categorical(),
        damping=rule,
        solver=EXACT[solver],
        momentum=0.5,
    )
    state, previous = tx.init(params), 0.0
    update = jax.jit(tx.update)
    for _ in range(2):
        grads = grad_fn(params, batch)
        metric = np.diag(flat(scales) ** -2.0)
        matrix = dense_fisher(params, batch) + 0.1 * metric
        rhs = flat(grads) + 0.1 * 0.5 * metric @ (0 * flat(grads) + previous)
        expected = np.linalg.solve(matrix, rhs)
        updates, state = update(grads, state, params, batch=batch)
        np.testing.assert_allclose(
            flat(updates), -0.3 * expected, rtol=1e-7, atol=1e-10
        )
        params, previous = optax.apply_updates(params, updates), expected


@pytest.mark.parametrize("microbatch_size", long_unless([None], [None, 5]))
def test_radius_and_report_are_those_of_the_parameters(microbatch_size):
    params, batch = make_problem()
    tx = ngd.natural_gradient(
        None,
        model_fn,
        ngd.Categorical(),
        max_kl=1e-2,
        damping=ngd.CovariantDamping(1e-2, _scales(params)),
        solver=ngd.CG(warm_start=0.9),
        metric=ngd.Metric(microbatch_size=microbatch_size),
    )
    updates, state = step_of(tx, params, batch)
    moved = optax.apply_updates(params, updates)
    kl = kl_fn(params, moved, batch)
    assert 0.92e-2 <= kl <= 1.001e-2
    np.testing.assert_allclose(state.info.measured_kl, kl, rtol=1e-4)
    _, state = step_of(tx, moved, batch, state=state)
    assert state.info.status == ngd.StepStatus.TAKEN


def _tx_of(damping):
    return ngd.natural_gradient(
        1.0, model_fn, ngd.Categorical(), damping=damping, solver=ngd.CG(10)
    )


@pytest.mark.long
def test_rules_work_in_the_coordinates(x64):
    params, batch = make_problem(dtype=jnp.float64)
    scales = _scales(params)
    relative = ngd.CovariantDamping(ngd.RelativeDamping(0.1), scales)
    tx = ngd.natural_gradient(
        1.0, model_fn, ngd.Categorical(), damping=relative, solver=ngd.CG(10)
    )
    _, state = step_of(tx, params, batch)
    diagonal = np.diag(dense_fisher(params, batch)) * flat(scales) ** 2
    np.testing.assert_allclose(state.info.damping, 0.1 * diagonal.mean(), rtol=1e-9)

    adaptive = ngd.CovariantDamping(ngd.LevenbergMarquardt(initial=10.0), scales)
    tx = ngd.natural_gradient(
        1.0, model_fn, ngd.Categorical(), damping=adaptive, solver=ngd.CG(10)
    )
    _, state = jax.jit(
        lambda g, s, p: tx.update(g, s, p, batch=batch, value_fn=wide_loss_fn)
    )(grad_fn(params, batch), tx.init(params), params)
    assert state.info.damping == 10.0
    np.testing.assert_allclose(state.damping, 10.0 * 2 / 3)


# Sigmoid and tanh: σ(x) = ½ (1 + tanh(x/2)), a linear map of the parameters.


def _sigmoid_net(params, batch):
    hidden = jax.nn.sigmoid(batch["x"] @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def _tanh_net(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def _tanh_from_sigmoid(params):
    return {
        "w1": params["w1"] / 2,
        "b1": params["b1"] / 2,
        "w2": params["w2"] / 2,
        "b2": params["b2"] + jnp.sum(params["w2"], axis=0) / 2,
    }


@functools.cache
def _teacher_and_start():
    rng = np.random.default_rng(0)
    shapes = {"w1": (2, 3), "b1": (3,), "w2": (3, 1), "b2": (1,)}
    teacher = {k: rng.normal(size=s) * 1.5 for k, s in shapes.items()}
    start = {k: v + 0.3 * rng.normal(size=v.shape) for k, v in teacher.items()}
    batch = {"x": jnp.asarray(rng.normal(size=(400, 2)))}
    batch["y"] = _sigmoid_net(jax.tree.map(jnp.asarray, teacher), batch)
    return jax.tree.map(jnp.asarray, start), batch


def _outputs_after(network, params, batch, damping, solver, *, num_steps=50):
    tx = ngd.natural_gradient(
        0.3, network, ngd.Gaussian(), damping=damping, solver=solver, momentum=0.0
    )

    def loss_fn(params):
        return jnp.mean((network(params, batch) - batch["y"]) ** 2) / 2

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(
            jax.grad(loss_fn)(params), state, params, batch=batch
        )
        return (optax.apply_updates(params, updates), state), state.info.status

    run = jax.jit(
        lambda params: jax.lax.scan(
            step, (params, tx.init(params)), None, length=num_steps
        )
    )
    (params, _), statuses = run(params)
    assert not statuses.any()
    return network(params, batch), loss_fn(params)


def _difference(damping, mapped_damping, solver):
    start, batch = _teacher_and_start()
    sigmoid, loss = _outputs_after(_sigmoid_net, start, batch, damping, solver)
    tanh, _ = _outputs_after(
        _tanh_net, _tanh_from_sigmoid(start), batch, mapped_damping, solver
    )
    first_loss = jnp.mean((_sigmoid_net(start, batch) - batch["y"]) ** 2) / 2
    assert loss < 0.1 * first_loss  # The parameters have really moved.
    return float(jnp.abs(sigmoid - tanh).max())


@pytest.mark.long
@pytest.mark.parametrize("solver", EXACT)
def test_damping_in_the_mapped_metric_keeps_the_invariance(solver, x64):
    """CLAIMS: 1e-15 undamped and in the mapped metric, 2e-3 at λ = 1e-4 for λI."""
    start, _ = _teacher_and_start()
    scales = _scales(start)
    plain = ngd.CovariantDamping(1e-4, scales)
    # S' = T S, where T mixes the last layer's weights into its bias.
    mapped = ngd.CovariantDamping(
        1e-4,
        lambda tree: _tanh_from_sigmoid(jax.tree.map(jnp.multiply, scales, tree)),
    )
    tolerance = {"cholesky": 1e-10, "cg": 1e-7}[solver]
    assert _difference(plain, mapped, EXACT[solver]) < tolerance


@pytest.mark.long
def test_damping_by_the_identity_breaks_the_invariance(x64):
    broken = [_difference(d, d, ngd.Cholesky()) for d in (1e-4, 1e-3)]
    assert 1e-5 < broken[0] < broken[1]


def test_scales_that_do_not_fit_are_refused():
    params, batch = make_problem()

    def refused(scales, match):
        rule = ngd.CovariantDamping(0.1, scales)
        tx = ngd.natural_gradient(1.0, model_fn, ngd.Categorical(), damping=rule)
        with pytest.raises(ValueError, match=match):
            step_of(tx, params, batch)

    refused({"w": jnp.ones(3)}, "`scales` must have the tree structure of `params`")
    refused(
        jax.tree.map(lambda p: jnp.ones((7, *p.shape)), params),
        "`scales` must have the shapes of `params`",
    )
    refused(jax.tree.leaves, "`scales` must have the tree structure")
    with pytest.raises(ValueError, match=r"`scales` must be positive: at \['w'\]"):
        ngd.CovariantDamping(0.1, {"w": jnp.array([1.0, 0.0])})
    with pytest.raises(TypeError, match="must not be another one"):
        ngd.CovariantDamping(ngd.CovariantDamping(0.1, {}), {})
