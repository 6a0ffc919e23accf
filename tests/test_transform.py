"""The update against dense float64 references, for every option that changes it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from tests import reference

NUM_EXAMPLES = 12


def make_problem(num_outputs=3, dtype=jnp.float32, seed=0):
    """Parameters and a batch for `model_fn`, and labels to go with them."""
    rng = np.random.default_rng(seed)
    params = reference.network_params(rng, num_outputs, dtype=dtype)
    x = jnp.asarray(rng.normal(size=(NUM_EXAMPLES, 2)), dtype)
    labels = jnp.asarray(rng.integers(0, num_outputs, NUM_EXAMPLES))
    return params, {"x": x, "y": labels}


def model_fn(params, batch):
    return reference.network(params, batch["x"])


def loss_fn(params, batch):
    logits = model_fn(params, batch).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean()


def wide_loss_fn(params, batch):
    logits = model_fn(params, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean()


def step_of(tx, params, batch, *, state=None, grads=None, loss_fn=wide_loss_fn):
    """One jitted update from `state`, or from the start."""
    state = tx.init(params) if state is None else state
    grads = jax.grad(loss_fn)(params, batch) if grads is None else grads
    return jax.jit(tx.update)(grads, state, params, batch=batch)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def dense_fisher(params, batch):
    """F of the categorical network, by enumeration."""
    logits, rows = reference.jacobian(model_fn, params, batch)
    measure = reference.normalised(None, logits.shape[:-1])
    return reference.fisher_of(reference.categorical_metric(logits), rows, measure)


def damped_solve(fisher, gradient, damping):
    return np.linalg.solve(fisher + damping * np.eye(len(gradient)), gradient)


EXACT = {"cg": ngd.CG(200, rtol=1e-13), "cholesky": ngd.Cholesky()}


@pytest.mark.parametrize("solver", EXACT)
def test_update_equals_the_damped_dense_solve(solver, x64):
    params, batch = make_problem(dtype=jnp.float64)
    tx = ngd.natural_gradient(
        0.3, model_fn, ngd.Categorical(), damping=1e-2, solver=EXACT[solver]
    )
    updates, state = step_of(tx, params, batch)
    gradient = flat(jax.grad(wide_loss_fn)(params, batch))
    fisher = dense_fisher(params, batch)
    direction = damped_solve(fisher, gradient, 1e-2)
    np.testing.assert_allclose(flat(updates), -0.3 * direction, rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(flat(state.direction), direction, rtol=1e-8, atol=1e-11)

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


def test_scaled_direction_is_the_update_without_sign_and_rate(x64):
    params, batch = make_problem(dtype=jnp.float64)
    options = {"damping": 1e-2, "solver": ngd.Cholesky()}
    direction, _ = step_of(
        ngd.scale_by_natural_gradient(model_fn, ngd.Categorical(), **options),
        params,
        batch,
    )
    updates, _ = step_of(
        ngd.natural_gradient(0.5, model_fn, ngd.Categorical(), **options), params, batch
    )
    np.testing.assert_allclose(flat(updates), -0.5 * flat(direction), rtol=1e-12)


def test_scaled_direction_goes_to_the_radius_of_a_descent():
    params, batch = make_problem()
    tx = ngd.scale_by_natural_gradient(model_fn, ngd.Categorical(), max_kl=1e-2)
    direction, state = step_of(tx, params, batch)
    moved = jax.tree.map(jnp.subtract, params, direction)
    kl = ngd.mean_kl(model_fn, params, moved, batch, ngd.Categorical())
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
    updates, _ = step_of(tx, w, batch, loss_fn=squares_fn)
    expected = np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose(w + updates, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", EXACT)
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
        grads = jax.grad(wide_loss_fn)(params, batch)
        expected = damped_solve(
            dense_fisher(params, batch), flat(grads) + 0.1 * 0.9 * previous, 0.1
        )
        updates, state = update(grads, state, params, batch=batch)
        np.testing.assert_allclose(flat(updates), -0.2 * expected, rtol=1e-8)
        params, previous = optax.apply_updates(params, updates), expected


def test_warm_start_changes_the_way_and_not_the_solution(x64):
    params, batch = make_problem(dtype=jnp.float64)
    steps = {}
    for warm_start in (0.0, 0.95):
        tx = ngd.natural_gradient(
            0.1,
            model_fn,
            ngd.Categorical(),
            damping=1e-2,
            warm_start=warm_start,
            solver=ngd.CG(200, rtol=1e-6),
        )
        _, state = step_of(tx, params, batch)
        updates, state = step_of(tx, params, batch, state=state)
        steps[warm_start] = flat(updates), int(state.info.solver.num_steps)
    np.testing.assert_allclose(*(u for u, _ in steps.values()), rtol=1e-3, atol=1e-6)
    assert steps[0.95][1] < steps[0.0][1]


# --- Kinds, weights, microbatches.


def test_sampled_kind_draws_anew_in_every_step_from_its_key():
    params, batch = make_problem()
    grads = jax.grad(loss_fn)(params, batch)

    def tx_of(seed):
        return ngd.natural_gradient(
            1.0,
            model_fn,
            ngd.Categorical(),
            kind="sampled",
            damping=0.1,
            key=jax.random.key(seed),
        )

    tx = tx_of(0)
    update = jax.jit(tx.update)
    start = tx.init(params)
    first, state = update(grads, start, params, batch=batch)
    again, _ = update(grads, start, params, batch=batch)
    second, _ = update(grads, state, params, batch=batch)
    other, _ = step_of(tx_of(1), params, batch, grads=grads)
    np.testing.assert_array_equal(flat(first), flat(again))
    assert not np.array_equal(flat(first), flat(second))
    assert not np.array_equal(flat(first), flat(other))

    key = jax.random.fold_in(jax.random.key(0), 0)
    targets = ngd.Categorical().sample(key, model_fn(params, batch))
    sampled = _outer_products(params, batch | {"y": targets})
    expected = damped_solve(sampled, flat(grads), 0.1)
    np.testing.assert_allclose(flat(first), -expected, rtol=2e-3, atol=1e-4)


def _outer_products(params, batch):
    scores = jax.vmap(
        lambda x, y: jax.grad(loss_fn)(params, {"x": x[None], "y": y[None]})
    )(batch["x"], batch["y"])
    rows = np.asarray(jax.vmap(lambda s: ravel_pytree(s)[0])(scores), np.float64)
    measure = np.full(len(rows), 1 / len(rows))
    return reference.outer_products_of(rows, measure)


def test_empirical_kind_takes_the_targets_of_the_batch():
    params, batch = make_problem()
    tx = ngd.natural_gradient(
        1.0,
        model_fn,
        ngd.Categorical(),
        kind="empirical",
        damping=0.1,
        targets_fn=lambda batch: batch["y"],
    )
    updates, _ = step_of(tx, params, batch)
    grads = jax.grad(loss_fn)(params, batch)
    expected = damped_solve(_outer_products(params, batch), flat(grads), 0.1)
    np.testing.assert_allclose(flat(updates), -expected, rtol=2e-3, atol=1e-4)


def test_examples_of_weight_zero_might_as_well_not_be_there():
    params, batch = make_problem()
    mask = (jnp.arange(NUM_EXAMPLES) < 7).astype(jnp.float32)
    options = {"max_kl": 1e-2, "damping": 1e-2, "solver": ngd.Cholesky()}
    weighted = ngd.natural_gradient(
        None, model_fn, ngd.Categorical(), weights_fn=lambda b: b["mask"], **options
    )
    plain = ngd.natural_gradient(None, model_fn, ngd.Categorical(), **options)
    first = jax.tree.map(lambda x: x[:7], batch)
    grads = jax.grad(loss_fn)(params, first)
    actual, state = step_of(weighted, params, batch | {"mask": mask}, grads=grads)
    expected, expected_state = step_of(plain, params, first, grads=grads)
    np.testing.assert_allclose(flat(actual), flat(expected), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        state.info.measured_kl, expected_state.info.measured_kl, rtol=1e-3
    )


@pytest.mark.parametrize("microbatch_size", [4, 5])
def test_microbatches_equal_the_whole_batch(microbatch_size):
    params, batch = make_problem()
    whole, parts = (
        step_of(
            ngd.natural_gradient(
                None,
                model_fn,
                ngd.Categorical(),
                max_kl=1e-2,
                damping=1e-2,
                microbatch_size=size,
            ),
            params,
            batch,
        )
        for size in (None, microbatch_size)
    )
    np.testing.assert_allclose(flat(parts[0]), flat(whole[0]), rtol=1e-3, atol=1e-5)


# --- Damping.


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
    gradient = flat(jax.grad(wide_loss_fn)(params, batch))
    np.testing.assert_allclose(
        flat(updates), -damped_solve(fisher, gradient, damping), rtol=1e-7, atol=1e-10
    )


LOSS_GIVEN = {
    "value_fn": ({}, {"value_fn": wide_loss_fn}),
    "value and value_fn": ({}, {"value_fn": wide_loss_fn, "value": True}),
    "output_loss_fn": (
        {
            "output_loss_fn": lambda outputs, batch: (
                optax.softmax_cross_entropy_with_integer_labels(
                    outputs, batch["y"]
                ).mean()
            )
        },
        {},
    ),
}


def _levenberg_marquardt_step(rule, name, rate, params, batch, state=None):
    options, extra = LOSS_GIVEN[name]
    tx = ngd.natural_gradient(
        rate, model_fn, ngd.Categorical(), damping=rule, **options
    )
    value, grads = jax.value_and_grad(wide_loss_fn)(params, batch)
    extra = {k: value if k == "value" else v for k, v in extra.items()}

    @jax.jit
    def step(state, params):
        return tx.update(grads, state, params, batch=batch, **extra)

    return step(tx.init(params) if state is None else state, params)


@pytest.mark.parametrize(
    ("name", "initial", "factor"),
    [
        ("value_fn", 10.0, 2 / 3),
        ("value and value_fn", 0.1, 1.0),
        ("output_loss_fn", 10.0, 2 / 3),
    ],
)
def test_levenberg_marquardt_follows_the_ratio_of_reductions(name, initial, factor):
    params, batch = make_problem()
    rule = ngd.LevenbergMarquardt(initial=initial)
    updates, state = _levenberg_marquardt_step(rule, name, 1.0, params, batch)
    fisher, step = dense_fisher(params, batch), flat(updates)
    gradient = flat(jax.grad(wide_loss_fn)(params, batch))
    predicted = -gradient @ step - step @ fisher @ step / 2
    moved = optax.apply_updates(params, updates)
    actual = wide_loss_fn(params, batch) - wide_loss_fn(moved, batch)
    assert (actual / predicted > 0.75) == (factor < 1)
    assert actual / predicted > 0.25
    assert state.info.status == ngd.StepStatus.TAKEN
    np.testing.assert_allclose(state.damping, factor * initial, rtol=1e-6)
    np.testing.assert_allclose(state.info.damping, initial)


@pytest.mark.parametrize("name", ["value_fn", "output_loss_fn"])
def test_levenberg_marquardt_refuses_a_step_that_raises_the_loss(name):
    params, batch = make_problem()
    rule = ngd.LevenbergMarquardt(initial=1e-2)
    updates, state = _levenberg_marquardt_step(rule, name, 1e3, params, batch)
    assert state.info.status == ngd.StepStatus.NO_REDUCTION
    assert not flat(updates).any()
    assert not flat(state.direction).any()
    assert state.count == 0
    np.testing.assert_allclose(state.damping, 1.5e-2, rtol=1e-6)
    assert state.info.measured_kl == 0
    # And the next one, with more damping, starts from the same parameters.
    _, state = _levenberg_marquardt_step(rule, name, 1e-2, params, batch, state)
    assert state.info.status == ngd.StepStatus.TAKEN
    np.testing.assert_allclose(state.info.damping, 1.5e-2, rtol=1e-6)


# --- Learning rate and radius.


def test_radius_shortens_a_step_only_where_it_is_too_long():
    params, batch = make_problem()
    grads = jax.grad(loss_fn)(params, batch)

    def info_of(rate, max_kl):
        tx = ngd.natural_gradient(rate, model_fn, ngd.Categorical(), max_kl=max_kl)
        return step_of(tx, params, batch, grads=grads)[1].info

    plain, within = info_of(1e-2, None), info_of(1e-2, 1e-1)
    assert plain.step_scale == within.step_scale == np.float32(1e-2)
    np.testing.assert_allclose(plain.measured_kl, within.measured_kl, rtol=1e-4)
    assert within.num_kl_evaluations == 1
    shortened, at_radius = info_of(10.0, 1e-2), info_of(None, 1e-2)
    assert 0.9e-2 <= shortened.measured_kl <= 1e-2
    assert shortened.step_scale < 10.0
    np.testing.assert_allclose(shortened.step_scale, at_radius.step_scale, rtol=0.1)


SCHEDULED = {
    "learning_rate": ("step_scale", {"learning_rate": 0.1}),
    "damping": ("damping", {"learning_rate": 0.1}),
    "max_kl": ("measured_kl", {"learning_rate": None}),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_schedules_are_evaluated_at_the_number_of_steps_taken(name):
    params, batch = make_problem()
    field, options = SCHEDULED[name]
    schedule = lambda count: 1e-2 / (1.0 + count)  # noqa: E731
    options = options | {name: schedule}
    rate = options.pop("learning_rate")
    tx = ngd.natural_gradient(rate, model_fn, ngd.Categorical(), **options)
    update, state = jax.jit(tx.update), tx.init(params)
    grads = jax.grad(loss_fn)(params, batch)
    bad = jax.tree.map(lambda x: x * jnp.nan, grads)
    for step in range(3):
        _, state = update(bad, state, params, batch=batch)
        _, state = update(grads, state, params, batch=batch)
        ratio = getattr(state.info, field) * (1 + step) / 1e-2
        assert 0.9 <= ratio <= 1.0 + 1e-6


# --- Likelihoods other than Categorical.

LIKELIHOODS = {
    "bernoulli": (ngd.Bernoulli(), lambda z: z),
    "gaussian": (ngd.Gaussian(scale=0.5), lambda z: z),
    "diagonal gaussian": (
        ngd.DiagonalGaussian(),
        lambda z: {"mean": z[:, :1], "log_scale": z[:, 1:2]},
    ),
    "poisson": (ngd.Poisson(), lambda z: z),
    "product": (
        ngd.Product({"a": ngd.Categorical(), "b": ngd.Gaussian()}),
        lambda z: {"a": z[:, :2], "b": z[:, 2:]},
    ),
    "log density": (ngd.LogDensity(), lambda z: z[:, 0]),
    "log amplitude": (ngd.LogAmplitude(), lambda z: z[:, 0]),
    "from kl": (ngd.FromKL(ngd.Categorical().kl), lambda z: z),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_goes_to_its_radius(name):
    likelihood, outputs_fn = LIKELIHOODS[name]
    params, batch = make_problem()

    def any_fn(params, batch):
        return outputs_fn(model_fn(params, batch))

    # A gradient in the range of F: along others, KL does not know how far it is.
    rng = np.random.default_rng(3)
    vector = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
    tx = ngd.natural_gradient(None, any_fn, likelihood, max_kl=1e-3)

    @jax.jit
    def step(params):
        grads = ngd.fisher_vector_product(any_fn, params, batch, likelihood, vector)
        return tx.update(grads, tx.init(params), params, batch=batch)

    updates, state = step(params)
    moved = optax.apply_updates(params, updates)
    kl = ngd.mean_kl(any_fn, params, moved, batch, likelihood)
    assert state.info.status == ngd.StepStatus.TAKEN
    assert 0.9e-3 <= kl <= 1.01e-3
    np.testing.assert_allclose(state.info.predicted_kl, kl, rtol=0.5)


# --- Invariance (Amari 1998): sigmoid units are tanh units in other coordinates.


def sigmoid_fn(params, batch):
    hidden = jax.nn.sigmoid(batch["x"] @ params["w"] + params["b"])
    return hidden @ params["v"] + params["c"]


def tanh_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"])
    return hidden @ params["v"] + params["c"]


def test_natural_gradient_does_not_care_for_sigmoid_or_tanh(x64):
    rng = np.random.default_rng(4)
    shapes = {"w": (2, 3), "b": (3,), "v": (3, 1), "c": (1,)}
    teacher = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    teacher["w"] *= 2.0  # units that differ, so that F is far from singular
    batch = {"x": jnp.asarray(rng.normal(size=(400, 2)))}
    targets = sigmoid_fn(teacher, batch)
    start = {
        k: v + 0.3 * jnp.asarray(rng.normal(size=v.shape)) for k, v in teacher.items()
    }
    # σ(x) = ½ (1 + tanh(x/2))
    mapped = {
        "w": start["w"] / 2,
        "b": start["b"] / 2,
        "v": start["v"] / 2,
        "c": start["c"] + start["v"].sum(0) / 2,
    }

    def outputs_after(make, fn, params):
        tx = make(fn)

        def squares(params):
            return jnp.mean((fn(params, batch) - targets) ** 2) / 2

        @jax.jit
        def train(params):
            def step(carry, _):
                params, state = carry
                updates, state = tx.update(
                    jax.grad(squares)(params), state, params, batch=batch
                )
                return (optax.apply_updates(params, updates), state), None

            carry = (params, tx.init(params))
            (params, _), _ = jax.lax.scan(step, carry, length=50)
            return fn(params, batch)

        return np.asarray(train(params))

    def natural(fn):
        return ngd.natural_gradient(
            1.0, fn, ngd.Gaussian(), damping=0.0, solver=ngd.Cholesky()
        )

    def plain(_fn):
        return optax.with_extra_args_support(optax.sgd(1.0))

    def difference(make):
        one = outputs_after(make, sigmoid_fn, start)
        return np.max(np.abs(one - outputs_after(make, tanh_fn, mapped)))

    assert difference(natural) < 1e-13
    assert difference(plain) > 0.1
