"""The Flax adapters against plain functions on the same weights."""

import dataclasses
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state as flax_train_state

import ngd_jax as ngd
from ngd_jax.flax import TrainState, linen_model_fn, nnx_model_fn

X = jax.random.normal(jax.random.key(0), (16, 3))
LABELS = jnp.argmax(X @ jax.random.normal(jax.random.key(1), (3, 2)), axis=-1)
BATCH = {"x": X, "y": LABELS}


class LinenNet(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="hidden")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(self.rate, deterministic=not train)(nn.tanh(x))
        return nn.Dense(2, name="out")(x)

    def encode(self, x):
        return 2.0 * x


class NnxNet(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x, scale=1.0):
        x = self.dropout(nnx.tanh(self.norm(self.hidden(x))))
        return scale * self.out(x)

    def encode(self, x):
        return 2.0 * x


def plain_net(params, x, stats=None):
    """The same network in evaluation mode with `stats`, else in training mode."""
    x = x @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    if stats is None:
        mean, variance = x.mean(0), jnp.mean(x**2, 0) - x.mean(0) ** 2
    else:
        mean, variance = stats["mean"], stats["var"]
    x = (x - mean) / jnp.sqrt(variance + 1e-5)
    x = jnp.tanh(x * params["norm"]["scale"] + params["norm"]["bias"])
    return x @ params["out"]["kernel"] + params["out"]["bias"]


STATS = {"mean": jnp.array([0.1, -0.2, 0.3, 0.0]), "var": jnp.array([0.5, 1.0, 2.0, 1])}


@pytest.fixture(scope="module")
def params():
    params = jax.jit(LinenNet().init)(jax.random.key(2), X)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noise = [
        0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(
        structure, [x + e for x, e in zip(leaves, noise, strict=True)]
    )


def nnx_net(params, rate=0.0, stats=None):
    model = NnxNet(nnx.Rngs(params=0, dropout=1), rate)
    nnx.update(model, params)
    if stats is not None:
        nnx.update(model, {"norm": stats})
    return model


def assert_close(actual, expected, rtol=2e-4, atol=1e-6):
    actual, expected = (nnx.to_pure_dict(nnx.State(t)) for t in (actual, expected))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol, atol), actual, expected
    )


def step_of(model_fn, params, batch, **options):
    options = {"max_kl": 1e-2, "solver": ngd.CG(5)} | options
    tx = ngd.natural_gradient(None, model_fn, ngd.Categorical(), **options)

    def loss_fn(params):
        return cross_entropy(model_fn(params, batch), LABELS)

    @jax.jit
    def step(params):
        state = tx.init(params)
        return tx.update(jax.grad(loss_fn)(params), state, params, batch=batch)

    return step(params)


def cross_entropy(logits, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


@pytest.mark.parametrize("train", [True, False])
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


class LinenMasked(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=False):
        w = self.param("w", nn.initializers.ones, (3,))
        return nn.Dropout(0.5, deterministic=deterministic)(x * w)


class NnxMasked(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jnp.ones(3))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, deterministic=None):
        return self.dropout(x * self.w[...], deterministic=deterministic)


MASKED = {
    "linen": lambda **options: linen_model_fn(LinenMasked(), **options),
    "nnx": lambda **options: nnx_model_fn(NnxMasked(nnx.Rngs(dropout=0)), **options),
    "nnx without a stream of its own name": lambda **_: nnx_model_fn(
        NnxMasked(nnx.Rngs(0)), rngs=("default",)
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
    np.testing.assert_array_equal(outputs, model_fn(params, batch_of(0)))
    assert not np.array_equal(outputs, model_fn(params, batch_of(1)))

    mask = np.asarray(outputs) != 0
    assert 0.2 < mask.mean() < 0.8
    fisher = ngd.dense_fisher(model_fn, params, batch_of(0), ngd.Gaussian())
    expected = np.diag(np.mean((2 * mask * np.asarray(X)) ** 2, axis=0))
    np.testing.assert_allclose(fisher, expected, rtol=1e-5, atol=1e-6)

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


# --- Architectures.


class LinenTied(nn.Module):
    def setup(self):
        self.layer = nn.Dense(3)

    def __call__(self, x):
        return self.layer(nn.tanh(self.layer(x)))


class NnxTied(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.second = self.first

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


def test_shared_weights_are_one_parameter(params):
    linen_params = LinenTied().init(jax.random.key(0), X)["params"]
    model = NnxTied(nnx.Rngs(0))
    nnx.update(model, {"first": linen_params["layer"]})

    def plain_fn(params, batch):
        layer = params["layer"]
        x = jnp.tanh(batch["x"] @ layer["kernel"] + layer["bias"])
        return x @ layer["kernel"] + layer["bias"]

    expected, _ = step_of(plain_fn, linen_params, BATCH)
    from_linen, _ = step_of(linen_model_fn(LinenTied()), linen_params, BATCH)
    assert_close(from_linen, expected)
    from_nnx, _ = step_of(nnx_model_fn(model), nnx.state(model, nnx.Param), BATCH)
    assert_close(nnx.to_pure_dict(from_nnx)["first"], expected["layer"])


class LinenLSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(nn.LSTMCell(4))(x[..., None])[:, -1])


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x[..., None])
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2)(x))
        return nn.Dense(2)(x.mean(1))


class LinenConv(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Conv(4, (2,))(x[..., None])).reshape(16, -1))


class NnxLSTM(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(1, 4, rngs=rngs))
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.rnn(x[..., None])[:, -1])


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(1, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x[..., None])
        return self.out(self.norm(x + self.attention(x)).mean(1))


class NnxConv(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (2,), rngs=rngs)
        self.out = nnx.Linear(12, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.conv(x[..., None])).reshape(16, -1))


@pytest.mark.parametrize("module", [LinenLSTM, LinenAttention, LinenConv])
def test_linen_training_by_train_state_reduces_the_loss(module):
    net = module()
    model_fn = linen_model_fn(net)
    tx = ngd.natural_gradient(None, model_fn, ngd.Categorical(), max_kl=1e-2)
    params = jax.jit(net.init)(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)

    @jax.jit
    def train_step(state, batch):
        def loss_fn(params):
            return cross_entropy(model_fn(params, batch), batch["y"])

        value, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads, batch=batch, value=value), value

    values = []
    for _ in range(9):
        state, value = train_step(state, BATCH)
        values.append(float(value))
        assert state.opt_state.info.status == ngd.StepStatus.TAKEN
        assert 0.9 * 1e-2 <= state.opt_state.info.measured_kl <= 1e-2
    assert values[-1] < 0.75 * values[0]


@pytest.mark.parametrize("module", [NnxLSTM, NnxAttention, NnxConv])
def test_nnx_training_by_nnx_optimizer_reduces_the_loss(module):
    model = module(nnx.Rngs(0))
    model_fn = nnx_model_fn(model)
    tx = ngd.natural_gradient(None, model_fn, ngd.Categorical(), max_kl=1e-2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    traces = []

    @nnx.jit
    def train_step(model, optimizer, batch):
        traces.append(1)

        def loss_fn(model):
            return cross_entropy(model(batch["x"]), batch["y"])

        value, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads, batch=batch)
        return value

    values = [float(train_step(model, optimizer, BATCH)) for _ in range(9)]
    info = optax.tree.get(optimizer.opt_state, "NaturalGradientInfo")
    assert info.status.get_value() == ngd.StepStatus.TAKEN
    assert 0.9 * 1e-2 <= info.measured_kl.get_value() <= 1e-2
    assert values[-1] < 0.75 * values[0]
    assert len(traces) == 1


def test_nnx_optimizer_makes_the_updates_of_the_plain_transformation(params):
    model = nnx_net(params)
    model_fn = nnx_model_fn(model)
    tx = ngd.natural_gradient(0.5, model_fn, ngd.Categorical(), max_kl=1e-2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: cross_entropy(model(X), LABELS))(model)
    # Evaluated before: the optimizer moves the model.
    update = jax.jit(tx.update)
    expected, _ = update(nnx.to_pure_dict(grads), tx.init(params), params, batch=BATCH)
    expected = optax.apply_updates(params, expected)
    nnx.jit(lambda model, optimizer: optimizer.update(model, grads, batch=BATCH))(
        model, optimizer
    )
    assert_close(nnx.state(model, nnx.Param), expected, rtol=1e-5)
    assert optimizer.step.get_value() == 1
    # Nothing traced is left behind, neither in the model nor in model_fn.
    np.testing.assert_allclose(
        model_fn(expected, BATCH), model(X), rtol=1e-4, atol=1e-6
    )


def test_nnx_optimizer_runs_without_jit_too():
    model = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
    tx = ngd.natural_gradient(
        1.0, nnx_model_fn(model), ngd.Gaussian(), damping=0.0, solver=ngd.Cholesky()
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    weights = jnp.array([[1.0, -1.0], [2.0, 0.0], [3.0, 0.5]])
    loss_fn = lambda model: jnp.sum((model(X) - X @ weights) ** 2) / 32  # noqa: E731
    optimizer.update(model, nnx.grad(loss_fn)(model), batch={"x": X})
    np.testing.assert_allclose(model.kernel.get_value(), weights, rtol=1e-4, atol=1e-5)


def test_filters_other_than_param_train_their_part_only():
    class Adapter(nnx.Param):
        pass

    model = NnxNet(nnx.Rngs(0))
    model.out.kernel = Adapter(model.out.kernel.get_value())
    model_fn = nnx_model_fn(model, wrt=Adapter)
    tx = ngd.natural_gradient(None, model_fn, ngd.Categorical(), max_kl=1e-2)
    optimizer = nnx.Optimizer(model, tx, wrt=Adapter)
    grads = nnx.grad(
        lambda model: cross_entropy(model(X), LABELS),
        argnums=nnx.DiffState(0, Adapter),
    )(model)
    before = model.hidden.kernel.get_value()
    moved = model.out.kernel.get_value()
    nnx.jit(lambda model, optimizer: optimizer.update(model, grads, batch=BATCH))(
        model, optimizer
    )
    np.testing.assert_array_equal(before, model.hidden.kernel.get_value())
    assert not np.array_equal(moved, model.out.kernel.get_value())


# --- TrainState.


class StateWithStats(TrainState):
    batch_stats: Any = None


def test_train_state_replaces_fields_and_forwards_everything_else(params):
    received = {}

    def update(updates, state, params=None, **extra_args):
        received.update(extra_args)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda _: (), update)
    state = StateWithStats.create(apply_fn=None, params=params, tx=tx, batch_stats=1)
    state = state.apply_gradients(
        grads=params, batch=BATCH, value=3.0, batch_stats=2, anything=4
    )
    assert state.batch_stats == 2
    assert received == {"batch": BATCH, "value": 3.0, "anything": 4}
    assert isinstance(state, StateWithStats)
    assert state.step == 1


def test_train_state_equals_that_of_flax_with_plain_optimizers(params):
    tx = optax.adamw(1e-2)
    ours, theirs = (
        cls.create(apply_fn=None, params=params, tx=tx)
        for cls in (TrainState, flax_train_state.TrainState)
    )
    for _ in range(2):
        ours = ours.apply_gradients(grads=params, batch=BATCH)
        theirs = theirs.apply_gradients(grads=params)
    assert_close(ours.params, theirs.params, rtol=0, atol=0)
    assert ours.step == theirs.step == 2


def test_train_state_overwrites_with_gradients_as_flax_does():
    inner = {"w": jnp.ones(2)}
    params = {"params": inner, OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones(3)}}
    grads = {"params": inner, OVERWRITE_WITH_GRADIENT: {"scale": jnp.zeros(3)}}
    ours, theirs = (
        cls.create(apply_fn=None, params=params, tx=optax.adam(0.1))
        for cls in (TrainState, flax_train_state.TrainState)
    )
    ours = ours.apply_gradients(grads=grads, batch=BATCH)
    theirs = theirs.apply_gradients(grads=grads)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    np.testing.assert_array_equal(ours.params[OVERWRITE_WITH_GRADIENT]["scale"], 0)


def test_train_state_equals_the_plain_transformation(params):
    model_fn = linen_model_fn(LinenNet(), collections=("batch_stats",), train=True)
    batch = BATCH | {"batch_stats": {"norm": STATS}}
    tx = ngd.natural_gradient(None, model_fn, ngd.Categorical(), max_kl=1e-2)
    grads = jax.grad(lambda p: cross_entropy(model_fn(p, batch), LABELS))(params)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    step = jax.jit(lambda state: state.apply_gradients(grads=grads, batch=batch))
    state = step(state)
    update = jax.jit(lambda p: tx.update(grads, tx.init(p), p, batch=batch))
    updates, opt_state = update(params)
    assert_close(state.params, optax.apply_updates(params, updates), 1e-6, 1e-7)
    np.testing.assert_allclose(
        state.opt_state.info.measured_kl, opt_state.info.measured_kl, rtol=1e-5
    )


def test_train_state_serves_line_searches(params):
    model_fn = linen_model_fn(LinenNet(), collections=("batch_stats",), train=True)
    batch = BATCH | {"batch_stats": {"norm": STATS}}

    def value_fn(params, batch):
        return cross_entropy(model_fn(params, batch), batch["y"])

    tx = optax.chain(
        ngd.natural_gradient(1.0, model_fn, ngd.Categorical(), max_kl=0.5),
        optax.scale_by_backtracking_linesearch(15),
    )
    state = TrainState.create(apply_fn=None, params=params, tx=tx)

    @jax.jit
    def train_step(state):
        value, grad = jax.value_and_grad(value_fn)(state.params, batch)
        return state.apply_gradients(
            grads=grad, batch=batch, value=value, grad=grad, value_fn=value_fn
        )

    before = value_fn(state.params, batch)
    assert value_fn(train_step(state).params, batch) < before


# --- Errors.


def test_importing_the_library_does_not_import_flax():
    code = "import ngd_jax, sys; assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


LINEN_ERRORS = {
    "no mapping": (X, {}, r'`batch` lacks the entry "x"'),
    "no inputs": ({"y": LABELS}, {}, r'`batch` lacks the entry "x".*got \[\'y\'\]'),
    "collection missing": (
        BATCH,
        {"collections": ("batch_stats",)},
        r'lacks the entry "batch_stats", which `collections` asks for',
    ),
    "collection not named": (BATCH, {}, r'collections=\("batch_stats",\)'),
    "no keys": (
        BATCH,
        {"rngs": ("dropout",)},
        r'lacks the entry "rngs", which `rngs` asks for',
    ),
    "key missing": (
        BATCH | {"rngs": {"noise": jax.random.key(0)}},
        {"rngs": ("dropout",)},
        "'dropout' is missing",
    ),
    "stream not named": (
        BATCH | {"batch_stats": {"norm": STATS}},
        {"collections": ("batch_stats",), "train": True},
        r'rngs=\("dropout",\)',
    ),
    "collection written but not named": (
        BATCH | {"rngs": {"dropout": jax.random.key(0)}},
        {"rngs": ("dropout",), "train": True},
        "collections",
    ),
}


@pytest.mark.parametrize("name", LINEN_ERRORS)
def test_linen_calls_that_lack_something_say_what(params, name):
    batch, options, message = LINEN_ERRORS[name]
    model_fn = linen_model_fn(LinenNet(rate=0.5), **options)
    with pytest.raises(ValueError, match=message):
        model_fn(params, batch)


def test_writing_to_a_collection_that_is_not_named_says_so():
    class Counter(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.put_variable("counts", "n", 1)
            return x

    with pytest.raises(ValueError, match="not among `collections`"):
        linen_model_fn(Counter())({}, BATCH)


NNX_ERRORS = {
    "no inputs": ({"y": LABELS}, {}, r'`batch` lacks the entry "x"'),
    "no state": (
        BATCH,
        {"state": nnx.BatchStat},
        r'lacks the entry "state", which `state` asks for',
    ),
    "other state": (
        BATCH | {"state": {"norm": {"mean": jnp.ones(4)}}},
        {"state": nnx.BatchStat},
        r"missing \['norm/var'\]",
    ),
    "no keys": (BATCH, {"rngs": ("dropout",)}, r'lacks the entry "rngs"'),
    "stream not named": (BATCH, {}, r"rngs=\('dropout',\)"),
}


@pytest.mark.parametrize("name", NNX_ERRORS)
def test_nnx_calls_that_lack_something_say_what(params, name):
    batch, options, message = NNX_ERRORS[name]
    model_fn = nnx_model_fn(nnx_net(params, rate=0.5), **options)
    with pytest.raises(ValueError, match=message):
        model_fn(params, batch)


def test_nnx_params_of_another_model_are_refused(params):
    model_fn = nnx_model_fn(nnx_net(params))
    with pytest.raises(ValueError, match=r"`params`.*missing \['out/bias'"):
        model_fn({k: v for k, v in params.items() if k != "out"}, BATCH)


CONSTRUCTION_ERRORS = {
    "linen class": (
        lambda: linen_model_fn(LinenNet),
        TypeError,
        "`module` must be a flax.linen.Module",
    ),
    "nnx for linen": (
        lambda: linen_model_fn(NnxTied(nnx.Rngs(0))),
        TypeError,
        "`module` must be",
    ),
    "linen for nnx": (lambda: nnx_model_fn(LinenNet()), TypeError, "`model` must be"),
    "string of rngs": (
        lambda: linen_model_fn(LinenNet(), rngs="dropout"),
        TypeError,
        r"`rngs` must be a sequence of names.*\('dropout',\)",
    ),
    "params as a collection": (
        lambda: linen_model_fn(LinenNet(), collections=("params",)),
        ValueError,
        "`collections` must not hold 'params'",
    ),
    "unknown argument, linen": (
        lambda: linen_model_fn(LinenNet(), trian=True),
        TypeError,
        "`trian` is neither an option .* nor an argument",
    ),
    "unknown argument, nnx": (
        lambda: nnx_model_fn(NnxTied(nnx.Rngs(0)), train=True),
        TypeError,
        "`train` is neither an option .* nor an argument",
    ),
    "unknown method": (
        lambda: linen_model_fn(LinenNet(), method="decode"),
        ValueError,
        "`method` must be a method of `module`.*'decode'",
    ),
    "nothing selected": (
        lambda: nnx_model_fn(NnxTied(nnx.Rngs(0)), wrt=nnx.LoRAParam),
        ValueError,
        "`wrt` selects none",
    ),
    "unknown stream": (
        lambda: nnx_model_fn(NnxMasked(nnx.Rngs(0)), rngs=("dropout",)),
        ValueError,
        r"`rngs` must name streams of the model.*\['default'\]",
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTION_ERRORS)
def test_construction_refuses(name):
    make, error, message = CONSTRUCTION_ERRORS[name]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("field", ["step", "params", "opt_state"])
def test_train_state_refuses_fields_that_the_step_sets(field):
    params = {"w": jnp.ones(2)}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1))
    assert field in {f.name for f in dataclasses.fields(state)}
    with pytest.raises(TypeError, match=f"sets .*{field}.* itself"):
        state.apply_gradients(grads=params, **{field: 1})
