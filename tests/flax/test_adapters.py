"""The adapters against plain functions on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import ngd_jax as ngd
from ngd_jax.flax import linen_model_fn, nnx_model_fn
from tests.flax.networks import (
    BATCH,
    STATS,
    LinenMasked,
    LinenNet,
    NnxMasked,
    NnxNet,
    X,
    assert_close,
    nnx_net,
    plain_net,
)
from tests.marks import long_unless


@pytest.mark.parametrize("train", long_unless([False], [True, False]))
def test_linen_nnx_and_a_plain_function_have_the_same_metric(params, train):
    linen_fn = linen_model_fn(LinenNet(), collections=("batch_stats",), train=train)
    model = nnx_net(params)
    if not train:
        model.eval()
    batch = BATCH | {"batch_stats": {"norm": STATS}}
    batch["state"] = nnx.State(batch["batch_stats"])

    def plain_fn(params, batch):
        return plain_net(params, batch["x"], None if train else STATS)

    def product(model_fn):
        @jax.jit
        def run(params, batch):
            return model_fn(params, batch), ngd.fisher_vector_product(
                model_fn, params, batch, ngd.Categorical(), params
            )

        return run(params, batch)

    outputs, expected = product(plain_fn)
    for model_fn in (linen_fn, nnx_model_fn(model, state=nnx.BatchStat)):
        actual_outputs, actual = product(model_fn)
        np.testing.assert_allclose(actual_outputs, outputs, rtol=1e-5, atol=1e-6)
        assert_close(actual, expected)


def test_running_statistics_come_from_the_batch_in_evaluation_mode(params):
    model_fn = linen_model_fn(LinenNet(), collections=("batch_stats",))
    shifted = STATS | {"mean": STATS["mean"] + 1.0}
    for stats in (STATS, shifted):
        outputs = model_fn(params, BATCH | {"batch_stats": {"norm": stats}})
        np.testing.assert_allclose(
            outputs, plain_net(params, X, stats), rtol=1e-5, atol=1e-6
        )


def test_nnx_statistics_are_those_of_construction_unless_handed_over(params):
    model = nnx_net(params, stats=jax.tree.map(jnp.copy, STATS))
    model.eval()
    model_fn = nnx_model_fn(model)
    # Donated or overwritten later on, the module no longer matters.
    nnx.update(model, {"norm": {"mean": jnp.ones(4)}})
    model.norm.var.get_value().delete()
    model.train()
    np.testing.assert_allclose(
        model_fn(params, BATCH), plain_net(params, X, STATS), rtol=1e-5, atol=1e-6
    )


def test_calls_leave_the_module_as_it_is(params):
    model = nnx_net(params, rate=0.5)
    before = [x.get_value() for x in variables_of(model)]
    model_fn = nnx_model_fn(model, rngs=("dropout",))
    batch = BATCH | {"rngs": {"dropout": jax.random.key(0)}}
    jax.jit(model_fn)(nnx.state(model, nnx.Param), batch)
    after = [x.get_value() for x in variables_of(model)]
    assert all(x is y for x, y in zip(before, after, strict=True))


def variables_of(model):
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return jax.tree.leaves(nnx.state(model), is_leaf=is_variable)


def test_nnx_params_may_be_variables_arrays_or_dicts(params):
    model = nnx_net(params)
    model_fn = nnx_model_fn(model)
    state = nnx.state(model, nnx.Param)
    outputs = [
        model_fn(p, BATCH) for p in (state, nnx.State(params), params, dict(params))
    ]
    for other in outputs[1:]:
        np.testing.assert_array_equal(outputs[0], other)


# --- Dropout, on a model whose metric can be written down.


MASKED = {
    "linen": lambda **options: linen_model_fn(LinenMasked(), **options),
    "nnx": lambda **options: nnx_model_fn(NnxMasked(nnx.Rngs(dropout=0)), **options),
    "nnx without a stream of its own name": lambda **_: nnx_model_fn(
        NnxMasked(nnx.Rngs(0)), rngs=("default",)
    ),
}


def _nnx_called(streams, name, key):
    model = NnxMasked(nnx.Rngs(**streams))
    nnx.reseed(model, **{name: key})
    return model(X)


CALLED_WITH_KEY = {
    "linen": lambda key: LinenMasked().apply(
        {"params": {"w": jnp.ones(3)}}, X, rngs={"dropout": key}
    ),
    "nnx": lambda key: _nnx_called({"dropout": 0}, "dropout", key),
    "nnx without a stream of its own name": lambda key: _nnx_called(
        {"default": 0}, "default", key
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_dropout_mask_is_the_same_in_outputs_metric_and_gradient(name):
    model_fn = MASKED[name](rngs=("dropout",))
    params = {"w": jnp.ones(3)}

    def batch_of(seed):
        key = jax.random.key(seed)
        return {"x": X, "rngs": {"dropout": key, "default": key}}

    outputs = model_fn(params, batch_of(0))
    # The mask of a loss that calls the module itself with the same key.
    np.testing.assert_array_equal(outputs, CALLED_WITH_KEY[name](jax.random.key(0)))
    assert not np.array_equal(outputs, model_fn(params, batch_of(1)))

    mask = np.asarray(outputs) != 0
    assert 0.2 < mask.mean() < 0.8
    expected = np.diag(np.mean((2 * mask * np.asarray(X)) ** 2, axis=0))
    vector = jnp.array([1.0, -2.0, 3.0])
    product = jax.jit(
        lambda v: ngd.fisher_vector_product(
            model_fn, params, batch_of(0), ngd.Gaussian(), {"w": v}
        )
    )(vector)
    np.testing.assert_allclose(product["w"], expected @ vector, rtol=1e-5)
    # Nor do the KL of a step and the metric of microbatches draw another mask.
    moved = {"w": 1 + 1e-2 * vector}
    kl = jax.jit(
        lambda moved: ngd.mean_kl(model_fn, params, moved, batch_of(0), ngd.Gaussian())
    )(moved)
    np.testing.assert_allclose(kl, 0.5e-4 * vector @ expected @ vector, rtol=1e-3)

    gradient = jax.grad(lambda p: jnp.mean(model_fn(p, batch_of(0)) ** 2))(params)
    np.testing.assert_allclose(gradient["w"], 2 * np.diag(expected) / 3, rtol=1e-5)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_dropout_is_off_where_the_call_says_so(name):
    model_fn = MASKED[name](deterministic=True)
    np.testing.assert_array_equal(model_fn({"w": jnp.ones(3)}, {"x": X}), X)


def test_nnx_mode_is_that_of_construction():
    model = NnxMasked(nnx.Rngs(0))
    model.eval()
    model_fn = nnx_model_fn(model)
    model.train()
    np.testing.assert_array_equal(model_fn({"w": jnp.ones(3)}, {"x": X}), X)


# --- Inputs and methods.


@pytest.mark.parametrize("method", ["encode", "function"])
def test_other_methods_can_be_called(params, method):
    given = {"linen": method, "nnx": method}
    if method == "function":
        given = {"linen": LinenNet.encode, "nnx": NnxNet.encode}
    for model_fn in (
        linen_model_fn(LinenNet(), method=given["linen"]),
        nnx_model_fn(nnx_net(params), method=given["nnx"]),
    ):
        np.testing.assert_array_equal(model_fn(params, {"x": X}), 2 * X)


def test_inputs_fn_gives_one_argument_or_a_tuple_of_them(params):
    model = nnx_net(params)
    expected = nnx_model_fn(model)(params, BATCH)
    one = nnx_model_fn(model, inputs_fn=lambda batch: batch)
    two = nnx_model_fn(model, inputs_fn=lambda batch: (batch[0], batch[1]))
    np.testing.assert_array_equal(one(params, X), expected)
    np.testing.assert_array_equal(two(params, (X, 3.0)), 3.0 * expected)
    linen_fn = linen_model_fn(nn.Dense(2), inputs_fn=lambda batch: batch["image"])
    dense = nn.Dense(2).init(jax.random.key(0), X)["params"]
    np.testing.assert_allclose(
        linen_fn(dense, {"image": X}), X @ dense["kernel"], rtol=1e-5, atol=1e-6
    )
