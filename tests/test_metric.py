"""The metric of outputs: weights, masks, blocks, and the examples it is made from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax import dense
from ngd_jax.metric import join, leading_size, output_metric, split, terms
from tests import reference
from tests.conftest import unchecked
from tests.fisher_cases import CASES, assert_close, matvec, random_like
from tests.marks import long_unless

WEIGHTED = {
    "example weights": ("categorical", (7,)),
    "token weights": ("categorical over tokens", (4, 3)),
    "weights by sequence": ("categorical over tokens", (4, 1)),
    "weights by position": ("categorical over tokens", (3,)),
    "log density": ("log density", (7,)),
    "complex amplitude": ("complex amplitude", (7,)),
    "one weight": ("poisson", ()),
}


@pytest.mark.parametrize(
    ("name", "shape"),
    long_unless(("token weights", "one weight"), WEIGHTED),
)
def test_weighted_means_equal_dense_definition(name, shape, x64, rng):
    case = CASES[name]
    params, x = case.make(rng, "float64")
    vector = random_like(params, rng)
    new_params = jax.tree.map(lambda p, v: p + 0.1 * v, params, vector)
    weights = np.asarray(rng.uniform(0.1, 3.0, size=shape))
    if weights.size > 1:
        weights.flat[::3] = 0.0
    outputs, jacobian = reference.jacobian(case.model_fn, params, x)
    new_outputs, _ = reference.jacobian(case.model_fn, new_params, x)
    truth = case.true_fisher(outputs, jacobian, weights)

    @jax.jit
    def weighted(params, weights):
        fisher = ngd.linearize_fisher(
            case.model_fn, params, x, case.likelihood, weights=weights
        )
        kl = fisher.kl(new_params)
        return fisher.matvec(vector), dense.diagonal(fisher), kl

    product, diagonal, kl = weighted(params, jnp.asarray(weights))
    assert_close(reference.flat(product), truth @ reference.flat(vector), 1e-12)
    if not case.complex_params:  # else it is in real coordinates
        assert_close(diagonal, np.diag(truth).real, 1e-12)
    assert_close(kl, case.true_kl(outputs, new_outputs, weights), 1e-11)


def test_blocks_of_a_product_have_weights_of_their_own(x64, rng):
    case = CASES["product"]
    params, x = case.make(rng, "float64")
    vector = random_like(params, rng)
    weights = {"label": jnp.asarray(rng.uniform(size=7)), "box": None}
    truth = case.true_fisher(
        *reference.jacobian(case.model_fn, params, x),
        {"label": np.asarray(weights["label"]), "box": None},
    )
    product = matvec(case.model_fn, params, x, case.likelihood, vector, weights=weights)
    assert_close(reference.flat(product), truth @ reference.flat(vector), 1e-12)


@pytest.mark.parametrize("microbatch_size", long_unless([None], [None, 3]))
@pytest.mark.parametrize("name", ["categorical", "log density"])
def test_examples_of_weight_zero_do_not_count_in_the_kl_even_as_nan(
    name, microbatch_size, rng
):
    case = CASES[name]
    params, x = case.make(rng)
    new_params = jax.tree.map(lambda p: 0.9 * p, params)
    weights = jnp.array([1.0, 0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    keep = np.flatnonzero(weights)

    def model_fn(params, batch):
        x, is_broken = batch
        # A model that fails at the other parameters, on masked examples only.
        is_moved = params["scale"] < 0.75
        failure = jnp.where(is_broken & is_moved, jnp.nan, 0.0)
        outputs = case.model_fn(params, x)
        return outputs + failure.reshape((-1,) + (1,) * (outputs.ndim - 1))

    def kl(x, is_broken, weights, size):
        return jax.jit(
            ngd.mean_kl, static_argnums=(0, 4), static_argnames="microbatch_size"
        )(
            model_fn,
            params,
            new_params,
            (x, is_broken),
            case.likelihood,
            weights=weights,
            microbatch_size=size,
        )

    masked = kl(x, weights == 0, weights, microbatch_size)
    left_out = kl(x[keep], jnp.zeros(4, bool), weights[keep], None)
    np.testing.assert_allclose(masked, left_out, rtol=1e-5)
    assert float(masked) > 0


def test_constant_weights_change_nothing(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)
    vector = random_like(params, rng)
    arguments = (case.model_fn, params, x, case.likelihood, vector)
    plain = matvec(*arguments)
    weighted = matvec(*arguments, weights=jnp.full(7, 5.0))
    assert_close(reference.flat(weighted), reference.flat(plain), 1e-6)


def test_boolean_masks_are_weights(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)
    vector = random_like(params, rng)
    mask = jnp.array([True] * 4 + [False] * 3)
    masked = matvec(case.model_fn, params, x, case.likelihood, vector, weights=mask)
    first = matvec(case.model_fn, params, x[:4], case.likelihood, vector)
    assert_close(reference.flat(masked), reference.flat(first), 1e-6)


# --- Terms.


NESTED = ngd.Product(
    {
        "a": ngd.Product(
            {"b": ngd.Gaussian(event_ndims=0), "c": ngd.Bernoulli()},
            weights={"b": 2.0, "c": 3.0},
        ),
        "d": ngd.LogDensity(),
    },
    weights={"a": 0.5, "d": 1.0},
)


def test_terms_of_nested_products_have_the_product_of_their_weights():
    assert [weight for _, weight in terms(NESTED)] == [1.0, 1.5, 1.0]
    values = {"a": {"b": 1, "c": 2}, "d": 3}
    assert split(NESTED, values) == [1, 2, 3]
    assert join(NESTED, [1, 2, 3]) == values


@pytest.mark.long
def test_weights_of_each_term_add_up_to_that_of_its_block():
    outputs = {"a": {"b": jnp.zeros(5), "c": jnp.zeros((4, 2))}, "d": jnp.zeros(3)}
    metric = output_metric(
        NESTED,
        outputs,
        weights={"a": {"b": None, "c": jnp.arange(4.0)}, "d": jnp.ones(())},
    )
    totals = [float(mu.sum()) for mu in metric.measure]
    np.testing.assert_allclose(totals, [1.0, 1.5, 1.0], rtol=1e-6)
    assert float(metric.kl(outputs)) == 0.0
    assert leading_size(NESTED, outputs) is None
    same = jax.tree.map(lambda x: x[:3], outputs)
    assert leading_size(NESTED, same) == 3


@pytest.mark.parametrize("likelihood", [ngd.LogDensity(), ngd.LogAmplitude()], ids=repr)
def test_root_of_a_covariance_in_a_block_equals_the_dense_matrix(likelihood, x64, rng):
    # A = diag(√μ) (1 - 1 μᵀ / Σμ) for any Σμ, that is, for any weight of the block.
    block, weights = ngd.Product({"a": likelihood}, weights={"a": 2.0}), rng.random(5)
    z, t, u = (
        {"a": jnp.asarray(x + 1j * y if likelihood == ngd.LogAmplitude() else x)}
        for x, y in rng.normal(size=(3, 2, 5))
    )
    metric = output_metric(block, z, weights={"a": jnp.asarray(weights)})
    mu = 2.0 * weights / weights.sum()
    root = np.sqrt(mu)[:, None] * (np.eye(5) - mu / mu.sum())
    forward, back = metric.sqrt_matvec(t)["a"], metric.sqrt_rmatvec(u)["a"]
    assert_close(forward, root @ np.asarray(t["a"]), 1e-12)
    assert_close(back, root.T @ np.asarray(u["a"]), 1e-12)
    assert_close(jnp.vdot(forward, u["a"]), jnp.vdot(t["a"], back), 1e-12)


# --- Which examples.


BATCH = {
    "x": jnp.arange(24.0).reshape(8, 3),
    "y": jnp.arange(8),
    "temperature": 2.0,
    "rngs": {"dropout": jax.random.key(0)},
    "nothing": None,
}


def test_examples_are_taken_and_the_rest_is_left_whole():
    part = ngd.take_examples(BATCH, 2)
    np.testing.assert_array_equal(part["x"], BATCH["x"][:2])
    np.testing.assert_array_equal(part["y"], [0, 1])
    assert part["temperature"] == 2.0
    assert part["rngs"]["dropout"] is BATCH["rngs"]["dropout"]
    assert jax.tree.structure(part) == jax.tree.structure(BATCH)
    # All of them if there are no more; inside a jitted function too.
    taken = jax.jit(lambda batch: ngd.take_examples(batch, 100)["x"])(BATCH)
    np.testing.assert_array_equal(taken, BATCH["x"])


def test_size_says_which_leaves_hold_examples():
    batch = BATCH | {"batch_stats": {"mean": jnp.zeros(3)}}
    message = r"(?s)`take_examples` cannot tell.*\['batch_stats'\]\['mean'\]"
    with pytest.raises(ValueError, match=message):
        ngd.take_examples(batch, 2)
    part = ngd.take_examples(batch, 2, size=8)
    assert part["x"].shape == (2, 3)
    assert part["batch_stats"]["mean"].shape == (3,)
    with pytest.raises(ValueError, match=r"no leaf with a leading axis of `size` = 7"):
        ngd.take_examples(batch, 2, size=7)
    with pytest.raises(ValueError, match="cannot tell"):
        ngd.take_examples({"key": jax.random.key(0)}, 2)


@pytest.mark.parametrize(
    ("count", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError)]
)
def test_counts_that_are_none_are_refused(count, error):
    with pytest.raises(error, match="`count` must be"):
        unchecked(ngd.take_examples)(BATCH, count)


def test_a_part_of_a_batch_with_scalars_is_a_metric_batch():
    """Keys and statistics in the batch do not hinder a metric of fewer examples."""
    params = {"w": jnp.ones((3, 2))}
    tx = ngd.natural_gradient(
        1.0,
        lambda p, b: b["x"] @ p["w"] / b["temperature"],
        ngd.Categorical(),
        solver=ngd.CG(3),
        metric=ngd.Metric(batch_fn=lambda batch: ngd.take_examples(batch, 4)),
    )
    _, state = jax.jit(lambda g: tx.update(g, tx.init(g), g, batch=BATCH))(params)
    assert state.info.status == ngd.StepStatus.TAKEN


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kind": "exakt"}, ValueError, "`kind` must be one of .*'exakt'"),
        ({"kind": "sampled"}, ValueError, "`key` is needed for kind='sampled'"),
        ({"kind": "empirical"}, ValueError, "`targets_fn` is needed"),
        ({"key": jax.random.key(0)}, ValueError, "`key` is for kind='sampled' only"),
        (
            {"targets_fn": lambda batch: batch["y"]},
            ValueError,
            "`targets_fn` is for kind='empirical' only",
        ),
        ({"batch_fn": 3}, TypeError, "`batch_fn` must be a function of the batch"),
        ({"microbatch_size": 0}, ValueError, "`microbatch_size` must be at least 1"),
        ({"microbatch_size": True}, TypeError, "`microbatch_size` must be a Python"),
        ({"microbatch_size": 2.0}, TypeError, "`microbatch_size` must be a Python"),
    ],
)
def test_metrics_that_make_no_sense_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        ngd.Metric(**options)


def test_coefficients_of_a_covariance_leave_out_what_shifts_all_densities():
    # A common shift of log densities changes no distribution: no u gives it.
    log_density = jnp.array([0.0, -1.0, 2.0])
    weights = jnp.array([1.0, 2.0, 1.0])
    metric = output_metric(ngd.LogDensity(), log_density, weights=weights)
    cotangents = jnp.array([0.5, 1.0, 0.25])
    coefficients = metric.sqrt_solve(cotangents)
    (mu,) = metric.measure
    np.testing.assert_allclose(jnp.sum(jnp.sqrt(mu) * coefficients), 0, atol=1e-6)
    shift = mu * jnp.sum(cotangents) / jnp.sum(mu)
    np.testing.assert_allclose(
        metric.sqrt_rmatvec(coefficients), cotangents - shift, rtol=1e-5
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_covariance_keeps_its_digits_beside_a_large_mean(weighted, rng):
    size = 200
    weights = rng.uniform(0.5, 1.5, size) if weighted else np.ones(size)
    metric = output_metric(
        ngd.LogDensity(), jnp.zeros(size), weights=jnp.asarray(weights, jnp.float32)
    )
    tangents = (1e6 + rng.normal(size=size)).astype(np.float32)
    mu = np.asarray(metric.measure[0], np.float64)
    centred = tangents - (mu @ tangents.astype(np.float64)) / mu.sum()
    expected = {"matvec": mu * centred, "sqrt_matvec": np.sqrt(mu) * centred}
    for name, product in expected.items():
        found = np.asarray(jax.jit(getattr(metric, name))(jnp.asarray(tangents)))
        assert np.linalg.norm(found - product) < 1e-3 * np.linalg.norm(product), name
