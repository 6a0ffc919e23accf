"""The update against dense float64 references, for every option that changes it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from tests import reference
from tests.marks import long_unless
from tests.transform.problems import (
    NUM_EXAMPLES,
    damped_solve,
    dense_fisher,
    flat,
    grad_fn,
    kl_fn,
    loss_fn,
    make_problem,
    model_fn,
    step_of,
    wide_loss_fn,
)

CG = ngd.CG(30)
EXACT = {"cg": ngd.CG(200, rtol=1e-13), "cholesky": ngd.Cholesky()}


@pytest.mark.parametrize("solver", EXACT)
def test_update_equals_the_damped_dense_solve(solver, x64):
    params, batch = make_problem(dtype=jnp.float64)
    tx = ngd.natural_gradient(
        0.3, model_fn, ngd.Categorical(), damping=1e-2, solver=EXACT[solver]
    )
    updates, state = step_of(tx, params, batch)
    gradient = flat(grad_fn(params, batch))
    fisher = dense_fisher(params, batch)
    direction = damped_solve(fisher, gradient, 1e-2)
    np.testing.assert_allclose(flat(updates), -0.3 * direction, rtol=1e-8, atol=1e-11)
    assert state.direction == ()  # without momentum nothing is kept

    info = state.info
    assert info.status == ngd.StepStatus.TAKEN
    assert state.count == 1
    assert info.damping == 1e-2
    assert info.step_scale == 0.3
    assert info.num_kl_evaluations == 1
    predicted = 0.3**2 * direction @ fisher @ direction / 2
    np.testing.assert_allclose(info.predicted_kl, predicted, rtol=1e-8)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
        info.measured_kl,
        np.mean(
            reference.categorical_kl(
                np.asarray(model_fn(params, batch)), np.asarray(model_fn(moved, batch))
            )
        ),
        rtol=1e-8,
    )


PREDICTIONS = {
    "one step of cg": {"solver": ngd.CG(1, rtol=0.0)},
    "three steps, by auto": {"solver": ngd.Auto(otherwise=ngd.CG(3), exactness=0.0)},
    "converged": {"solver": ngd.CG(40, rtol=1e-10)},
    "with residuals replaced": {"solver": ngd.CG(120, rtol=1e-12)},
    "to the end": {"solver": ngd.CG(120, rtol=0.0)},
    "momentum": {"solver": ngd.CG(3), "momentum": 0.9},
    "warm start": {"solver": ngd.CG(3, warm_start=0.9)},
    "backtracking": {
        "solver": ngd.contrib.BacktrackingCG(9, rtol=0.0, backtracking=True)
    },
    "lsmr": {"solver": ngd.LSMR(5), "momentum": 0.9},
    "quadratic model": {"rate": ngd.contrib.QuadraticModelRate(), "solver": ngd.CG(2)},
    "factors": {"solver": ngd.KFAC(), "momentum": 0.9},
    "the direction of factors": {
        "rate": ngd.contrib.QuadraticModelRate(),
        "solver": ngd.KFAC(exact_length=False),
    },
    "microbatches": {
        "solver": ngd.CG(3),
        "momentum": 0.9,
        "metric": ngd.Metric(microbatch_size=5),
    },
}


@pytest.mark.long
@pytest.mark.parametrize("name", PREDICTIONS)
def test_predicted_kl_is_that_of_the_update(name, x64):
    """Whatever J d comes from: compared with the update and F by enumeration."""
    params, batch = make_problem(dtype=jnp.float64)
    options = {"rate": 0.3, "momentum": 0.0} | PREDICTIONS[name]
    rate = options.pop("rate")
    tx = ngd.natural_gradient(
        rate, model_fn, ngd.Categorical(), max_kl=0.02, damping=1e-3, **options
    )
    update_fn = jax.jit(
        lambda grads, state, params: tx.update(
            grads, state, params, batch=batch, value_fn=wide_loss_fn
        )
    )
    state = tx.init(params)
    for _ in range(3):
        updates, state = update_fn(grad_fn(params, batch), state, params)
        update = flat(updates)
        expected = update @ dense_fisher(params, batch) @ update / 2
        assert state.info.status == ngd.StepStatus.TAKEN
        assert expected > 0
        np.testing.assert_allclose(state.info.predicted_kl, expected, rtol=1e-7)
        params = optax.apply_updates(params, updates)


@pytest.mark.long
def test_scaled_direction_has_neither_sign_nor_rate(x64):
    params, batch = make_problem(dtype=jnp.float64)
    tx = ngd.scale_by_natural_gradient(
        model_fn, ngd.Categorical(), damping=1e-2, solver=ngd.Cholesky()
    )
    direction, _ = step_of(tx, params, batch)
    expected = damped_solve(
        dense_fisher(params, batch), flat(grad_fn(params, batch)), 1e-2
    )
    np.testing.assert_allclose(flat(direction), expected, rtol=1e-8, atol=1e-11)


def test_scaled_direction_goes_to_the_radius_of_a_descent():
    params, batch = make_problem()
    tx = ngd.scale_by_natural_gradient(
        model_fn, ngd.Categorical(), max_kl=1e-2, solver=CG
    )
    direction, state = step_of(tx, params, batch)
    moved = jax.tree.map(jnp.subtract, params, direction)
    kl = kl_fn(params, moved, batch)
    assert 0.9e-2 <= kl <= 1.001e-2
    np.testing.assert_allclose(kl, state.info.measured_kl, rtol=1e-3)


def test_least_squares_is_solved_in_one_step(x64):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 4)), rng.normal(size=(20, 2))
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    linear_fn = lambda w, batch: batch["x"] @ w  # noqa: E731

    def squares_fn(w, batch):
        return jnp.sum((linear_fn(w, batch) - batch["y"]) ** 2) / 40

    tx = ngd.natural_gradient(
        1.0, linear_fn, ngd.Gaussian(), damping=0.0, solver=ngd.CG(8, rtol=1e-14)
    )
    w = jnp.zeros((4, 2))
    grads = jax.jit(jax.grad(squares_fn))(w, batch)
    updates, _ = step_of(tx, w, batch, grads=grads)
    expected = np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose(w + updates, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", long_unless({"cg"}, EXACT.keys()))
def test_momentum_is_proximal_to_the_last_direction(solver, x64):
    params, batch = make_problem(dtype=jnp.float64)
    tx = ngd.natural_gradient(
        0.2,
        model_fn,
        ngd.Categorical(),
        damping=0.1,
        momentum=0.9,
        solver=EXACT[solver],
    )
    state, previous = tx.init(params), 0.0
    update = jax.jit(tx.update)
    for _ in range(3):
        grads = grad_fn(params, batch)
        expected = damped_solve(
            dense_fisher(params, batch), flat(grads) + 0.1 * 0.9 * previous, 0.1
        )
        updates, state = update(grads, state, params, batch=batch)
        np.testing.assert_allclose(flat(updates), -0.2 * expected, rtol=1e-8)
        params, previous = optax.apply_updates(params, updates), expected


@pytest.mark.long
def test_warm_start_changes_the_way_and_not_the_solution(x64):
    params, batch = make_problem(dtype=jnp.float64)
    steps = {}
    for warm_start in (0.0, 0.95):
        tx = ngd.natural_gradient(
            0.1,
            model_fn,
            ngd.Categorical(),
            damping=1e-2,
            solver=ngd.CG(200, rtol=1e-6, warm_start=warm_start),
        )
        _, state = step_of(tx, params, batch)
        updates, state = step_of(tx, params, batch, state=state)
        steps[warm_start] = flat(updates), int(state.info.solver.num_steps)
    np.testing.assert_allclose(*(u for u, _ in steps.values()), rtol=1e-3, atol=1e-6)
    assert steps[0.95][1] < steps[0.0][1]


# --- Kinds, weights, microbatches.


@pytest.mark.long
def test_sampled_kind_draws_anew_in_every_step_from_its_key():
    params, batch = make_problem()
    grads = grad_fn(params, batch)

    @jax.jit
    def update(key, state):
        metric = ngd.Metric("sampled", key=key)
        tx = ngd.natural_gradient(
            1.0, model_fn, ngd.Categorical(), damping=0.1, solver=CG, metric=metric
        )
        state = tx.init(params) if state is None else state
        return tx.update(grads, state, params, batch=batch)

    key = jax.random.key(0)
    first, state = update(key, None)
    again, _ = update(key, None)
    second, _ = update(key, state)
    other, _ = update(jax.random.key(1), None)
    np.testing.assert_array_equal(flat(first), flat(again))
    assert not np.array_equal(flat(first), flat(second))
    assert not np.array_equal(flat(first), flat(other))

    key = jax.random.fold_in(key, 0)
    targets = ngd.Categorical().sample(key, model_fn(params, batch))
    sampled = _outer_products(params, batch | {"y": targets})
    expected = damped_solve(sampled, flat(grads), 0.1)
    np.testing.assert_allclose(flat(first), -expected, rtol=2e-3, atol=1e-4)


def _outer_products(params, batch):
    @jax.jit
    @jax.vmap
    def score(x, y):
        grads = jax.grad(loss_fn)(params, {"x": x[None], "y": y[None]})
        return ravel_pytree(grads)[0]

    rows = np.asarray(score(batch["x"], batch["y"]), np.float64)
    measure = np.full(len(rows), 1 / len(rows))
    return reference.outer_products_of(rows, measure)


def test_empirical_kind_takes_the_targets_of_the_batch():
    params, batch = make_problem()
    tx = ngd.natural_gradient(
        1.0,
        model_fn,
        ngd.Categorical(),
        damping=0.1,
        solver=CG,
        metric=ngd.Metric("empirical", targets_fn=lambda batch: batch["y"]),
    )
    updates, _ = step_of(tx, params, batch)
    grads = grad_fn(params, batch)
    expected = damped_solve(_outer_products(params, batch), flat(grads), 0.1)
    np.testing.assert_allclose(flat(updates), -expected, rtol=2e-3, atol=1e-4)


@pytest.mark.long
def test_examples_of_weight_zero_might_as_well_not_be_there():
    params, batch = make_problem()
    mask = (jnp.arange(NUM_EXAMPLES) < 7).astype(jnp.float32)
    options = {"max_kl": 1e-2, "damping": 1e-2, "solver": CG}
    metric = ngd.Metric(weights_fn=lambda batch: batch["mask"])
    weighted = ngd.natural_gradient(
        None, model_fn, ngd.Categorical(), metric=metric, **options
    )
    plain = ngd.natural_gradient(None, model_fn, ngd.Categorical(), **options)
    first = jax.tree.map(lambda x: x[:7], batch)
    grads = grad_fn(params, first)
    actual, state = step_of(weighted, params, batch | {"mask": mask}, grads=grads)
    expected, expected_state = step_of(plain, params, first, grads=grads)
    np.testing.assert_allclose(flat(actual), flat(expected), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        state.info.measured_kl, expected_state.info.measured_kl, rtol=1e-3
    )


@pytest.mark.long
def test_microbatches_equal_the_whole_batch():
    params, batch = make_problem()
    whole, parts = (
        step_of(
            ngd.natural_gradient(
                None,
                model_fn,
                ngd.Categorical(),
                max_kl=1e-2,
                damping=1e-2,
                solver=CG,
                metric=ngd.Metric(microbatch_size=size),
            ),
            params,
            batch,
        )
        for size in (None, 5)  # with a rest of 2
    )
    np.testing.assert_allclose(flat(parts[0]), flat(whole[0]), rtol=1e-3, atol=1e-5)


# --- Learning rate and radius.


@pytest.mark.long
def test_radius_shortens_a_step_only_where_it_is_too_long():
    params, batch = make_problem()
    # An exact solver and a rate that rounds nothing: programs differ by round-off only.
    solver, rate = ngd.Cholesky(), 2.0**-4
    grads = grad_fn(params, batch)

    @jax.jit
    def info_of(rate, max_kl):
        tx = ngd.natural_gradient(
            rate, model_fn, ngd.Categorical(), max_kl=max_kl, solver=solver
        )
        return tx.update(grads, tx.init(params), params, batch=batch)[1].info

    tx = ngd.natural_gradient(rate, model_fn, ngd.Categorical(), solver=solver)
    plain, within = step_of(tx, params, batch)[1].info, info_of(rate, 1e-1)
    assert plain.step_scale == within.step_scale == rate
    np.testing.assert_allclose(plain.measured_kl, within.measured_kl, rtol=1e-4)
    assert within.num_kl_evaluations == 1
    shortened, at_radius = info_of(10.0, 1e-2), info_of(jnp.inf, 1e-2)
    assert 0.9e-2 <= shortened.measured_kl <= 1e-2
    assert shortened.step_scale < 10.0
    np.testing.assert_allclose(shortened.step_scale, at_radius.step_scale, rtol=0.1)


SCHEDULED = {
    "learning_rate": ("step_scale", {"learning_rate": 0.1}),
    "damping": ("damping", {"learning_rate": 0.1}),
    "max_kl": ("measured_kl", {"learning_rate": None}),
}


@pytest.mark.parametrize("name", long_unless({"damping"}, SCHEDULED.keys()))
def test_schedules_are_evaluated_at_the_number_of_steps_taken(name):
    params, batch = make_problem()
    field, options = SCHEDULED[name]
    schedule = lambda count: 1e-2 / (1.0 + count)  # noqa: E731
    options = options | {name: schedule}
    rate = options.pop("learning_rate")
    tx = ngd.natural_gradient(rate, model_fn, ngd.Categorical(), solver=CG, **options)
    update, state = jax.jit(tx.update), tx.init(params)
    grads = grad_fn(params, batch)
    bad = jax.tree.map(lambda x: x * jnp.nan, grads)
    for step in range(3):
        _, state = update(bad, state, params, batch=batch)
        _, state = update(grads, state, params, batch=batch)
        ratio = getattr(state.info, field) * (1 + step) / 1e-2
        assert 0.9 <= ratio <= 1.0 + 1e-6


# --- Parameters without entries.


@pytest.mark.long
@pytest.mark.parametrize(
    "solver",
    [
        ngd.Auto(),
        ngd.CG(5, preconditioner=ngd.Kronecker()),
        ngd.KFAC(),
        ngd.LSMR(10),
        ngd.SampleSpace(),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_leaves_without_entries_are_parameters(solver):
    params = {"w": jnp.ones((3, 2)), "none": jnp.zeros((0, 3))}
    tx = ngd.natural_gradient(
        1.0,
        lambda params, batch: batch["x"] @ params["w"],
        ngd.Gaussian(),
        max_kl=1e-2,
        momentum=0.5,
        solver=solver,
    )
    batch = {"x": jnp.ones((4, 3)) + jnp.eye(4, 3)}
    update = jax.jit(lambda s: tx.update(params, s, params, batch=batch))
    updates, state = update(tx.init(params))
    assert ngd.StepStatus(int(state.info.status)).is_taken
    assert updates["none"].shape == (0, 3)
    assert updates["w"].all()


@pytest.mark.long
def test_no_zero_step_counts_as_taken_where_products_overflow():
    # (J d)² overflows in float32, where half a step of 4e-26 is the whole radius.
    solver = ngd.KFAC(exact_length=False)
    tx = ngd.natural_gradient(
        None, lambda w, x: 1e25 * x @ w, ngd.Gaussian(), max_kl=0.1, solver=solver
    )
    params, x = jnp.zeros((2, 3)), jnp.ones((4, 2))
    grads = jnp.ones_like(params)
    updates, state = tx.update(grads, tx.init(params), params, batch=x)
    assert np.asarray(updates).any()
    assert ngd.StepStatus(int(state.info.status)) == ngd.StepStatus.TAKEN
    assert 0.09 <= float(state.info.measured_kl) <= 0.1
