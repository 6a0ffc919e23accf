"""The metric from other data than the gradient, through every kind of Fisher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from tests import reference
from tests.marks import long_unless
from tests.transform.problems import (
    damped_solve,
    flat,
    grad_fn,
    kl_fn,
    loss_of_outputs,
    make_problem,
    model_fn,
    step_of,
    wide_loss_fn,
)


def first_examples(batch):
    return ngd.take_examples(batch, 5)


def compiled_fisher(params, batch, **options):
    fisher = jax.jit(
        lambda params: ngd.dense_fisher(
            model_fn, params, batch, ngd.Categorical(), **options
        )
    )
    return np.asarray(fisher(params))


OTHER = make_problem(dtype=jnp.float32, seed=7)[1]
METRIC_BATCHES = {"a part": first_examples, "another": lambda _: OTHER}


@pytest.mark.parametrize(
    ("kind", "name"),
    long_unless(
        [("exact", "a part")],
        [("exact", "a part"), ("sampled", "another"), ("empirical", "another")],
    ),
)
def test_metric_is_that_of_the_other_batch(kind, name):
    params, batch = make_problem()
    metric_batch = METRIC_BATCHES[name](batch)
    key = jax.random.key(3)
    options = {
        "exact": ({}, {}),
        "sampled": ({"key": key}, {"key": jax.random.fold_in(key, 0)}),
        "empirical": (
            {"targets_fn": lambda batch: batch["y"]},
            {"targets": metric_batch["y"]},
        ),
    }
    for_transform, for_fisher = options[kind]
    tx = ngd.natural_gradient(
        0.1,
        model_fn,
        ngd.Categorical(),
        damping=1e-2,
        solver=ngd.Cholesky(),
        metric=ngd.Metric(kind, batch_fn=METRIC_BATCHES[name], **for_transform),
    )
    updates, state = step_of(tx, params, batch)
    fisher = compiled_fisher(params, metric_batch, kind=kind, **for_fisher)
    gradient = flat(grad_fn(params, batch))
    expected = damped_solve(np.asarray(fisher, np.float64), gradient, 1e-2)
    size = np.abs(expected).max()
    np.testing.assert_allclose(flat(updates), -0.1 * expected, atol=1e-4 * size)
    moved = optax.apply_updates(params, updates)
    kl = kl_fn(params, moved, metric_batch)
    np.testing.assert_allclose(state.info.measured_kl, kl, rtol=1e-4)


def test_radius_and_weights_are_those_of_the_metric_batch():
    params, batch = make_problem()
    batch = {**batch, "weights": jnp.arange(12.0)}
    tx = ngd.natural_gradient(
        None,
        model_fn,
        ngd.Categorical(),
        max_kl=1e-2,
        solver=ngd.CG(10),
        metric=ngd.Metric(
            batch_fn=first_examples, weights_fn=lambda batch: batch["weights"]
        ),
    )
    updates, state = step_of(tx, params, batch)
    part = first_examples(batch)
    before, after = (
        np.asarray(model_fn(p, part), float)
        for p in (params, optax.apply_updates(params, updates))
    )
    kl = np.average(reference.categorical_kl(before, after), weights=np.arange(5.0))
    assert 0.92e-2 <= kl <= 1.001e-2
    np.testing.assert_allclose(state.info.measured_kl, kl, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("given", "microbatch_size"),
    [("value_fn", None), ("loss_fn", None), ("loss_fn", 4)],
)
def test_reduction_is_weighed_on_the_batch_of_the_gradient(given, microbatch_size):
    params, batch = make_problem()

    def batch_fn(batch):
        """With labels that the step unlearns; the metric does not need them."""
        part = first_examples(batch)
        return part | {"y": jnp.ones_like(part["y"])}

    options, extra = {
        "value_fn": ({}, {"value_fn": wide_loss_fn}),
        "loss_fn": ({"loss_fn": loss_of_outputs}, {}),
    }[given]
    tx = ngd.natural_gradient(
        1.0,
        model_fn,
        ngd.Categorical(),
        damping=ngd.LevenbergMarquardt(initial=10.0),
        solver=ngd.CG(20),
        metric=ngd.Metric(batch_fn=batch_fn, microbatch_size=microbatch_size),
        **options,
    )
    update = jax.jit(lambda g, s, p, b: tx.update(g, s, p, batch=b, **extra))
    updates, state = update(grad_fn(params, batch), tx.init(params), params, batch)
    fisher = compiled_fisher(params, first_examples(batch))
    step, gradient = flat(updates), flat(grad_fn(params, batch))
    predicted = -gradient @ step - step @ fisher @ step / 2
    moved = optax.apply_updates(params, updates)
    actual = wide_loss_fn(params, batch) - wide_loss_fn(moved, batch)
    ratio = float(actual / predicted)
    factor = 2 / 3 if ratio > 0.75 else 1.0 if ratio >= 0.25 else 1.5
    assert min(abs(ratio - 0.75), abs(ratio - 0.25)) > 0.01
    np.testing.assert_allclose(state.damping, 10.0 * factor, rtol=1e-6)
    # On the metric's batch the rule would have given another result.
    there = batch_fn(batch)
    rise = wide_loss_fn(moved, there) - wide_loss_fn(params, there)
    assert rise > 0
    assert factor < 1
    assert state.info.status == ngd.StepStatus.TAKEN


def test_a_gradient_in_output_space_has_no_meaning_on_another_batch():
    with pytest.raises(ValueError, match=r"`loss_fn` is for.*batch_fn"):
        ngd.natural_gradient(
            1.0,
            model_fn,
            ngd.Categorical(),
            solver=ngd.SampleSpace(),
            loss_fn=lambda *_: 0.0,
            metric=ngd.Metric(batch_fn=first_examples),
        )
