"""Layers in loops: a block for each layer of a stack, one for a weight of all times.

The truth is the same model without the loop: with a weight of its own for each layer,
or for each time.
"""

import functools
import itertools

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ngd_jax as ngd
from experiments.tasks.supervised.rows import RowGRU
from ngd_jax import tree
from ngd_jax.coordinates import random_signs
from ngd_jax.gram import gram
from ngd_jax.jacobian import linearize
from ngd_jax.kfac import Kronecker, claims
from ngd_jax.kfac.groups import Member, Room, groups_of, rooms_of
from ngd_jax.layers import Wanted, read_backward
from tests.test_dense import columns
from tests.test_layers import backward_pass

DEPTH, WIDTH, HIDDEN, COUNT, DAMPING = 3, 4, 6, 7, 0.1


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def fisher_of(model_fn, params, x, **options):
    return ngd.linearize_fisher(model_fn, params, x, ngd.Categorical(), **options)


def solved(model_fn, params, x, vector, scales=None, **options):
    """M⁻¹ v."""

    @jax.jit
    def run(params, x, vector):
        fisher = fisher_of(model_fn, params, x, **options)
        if scales is not None:
            fisher = ngd.CovariantDamping(1.0, scales).coordinates(fisher)
        return Kronecker()(fisher, DAMPING)(vector)

    return run(params, x, vector)


def check_layers(model_fn, params, x):
    """Every layer that is found adds up to the gradient of its weight and bias."""
    sizes = []

    @jax.jit
    def run(params, x):
        linearization = linearize(model_fn, params, x)
        like = linearization.outputs
        cotangents = jax.random.normal(jax.random.key(9), like.shape, like.dtype)
        backward = read_backward(linearization.pull, cotangents, params)
        found = backward.layers
        sizes[:] = [(one.num_inputs, one.num_outputs) for one in found]

        def product(values):
            weight = tree.contract(values.inputs, values.cotangents, (0,), (0,))
            return weight, jnp.sum(values.cotangents, 0)

        results = backward.evaluate([Wanted(x.weight, x, product) for x in found])
        gradients = jax.tree.leaves(linearization.pull(cotangents))
        errors = []
        for layer, (weight, bias) in zip(found, results, strict=True):
            weight = weight if layer.inputs_first else jnp.swapaxes(weight, -1, -2)
            expected = gradients[layer.weight]
            errors.append(jnp.abs(weight.reshape(expected.shape) - expected).max())
            if layer.bias is not None:
                expected = gradients[layer.bias]
                errors.append(jnp.abs(bias.reshape(expected.shape) - expected).max())
        return errors

    assert max(run(params, x), default=0.0) < 1e-12
    return sizes


# --- A stack of layers


def block(params, x):
    x = params["scale"] * x
    return x + jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"].T


def stack_params(depth=DEPTH, width=WIDTH, hidden=HIDDEN):
    return {
        "head": normal(4, width, 3),
        "stack": {
            "bias": normal(1, depth, hidden),
            "down": normal(2, depth, width, hidden) / 2,
            "scale": 1 + normal(3, depth, width) / 4,
            "up": normal(5, depth, width, hidden) / 2,
        },
    }


def scanned(params, x, step=block, **options):
    x, _ = jax.lax.scan(lambda x, p: (step(p, x), None), x, params["stack"], **options)
    return x @ params["head"]


def unrolled(params, x, step=block):
    for one in params["stack"]:
        x = step(one, x)
    return x @ params["head"]


def taken_apart(params):
    """A list of layers in place of a stack."""
    layers = params["stack"]
    depth = len(jax.tree.leaves(layers)[0])
    parts = [jax.tree.map(lambda x, k=k: x[k], layers) for k in range(depth)]
    return params | {"stack": parts}


def put_together(params):
    return params | {"stack": jax.tree.map(lambda *x: jnp.stack(x), *params["stack"])}


def masked(params, x):
    return jnp.where(x > 0, block(params, x), x)


def emitting(params, x):
    """More results than the carry, all of which are used."""

    def step(x, params):
        x = block(params, x)
        return x, x.sum(-1)

    x, sums = jax.lax.scan(step, x, params["stack"])
    return x @ params["head"] + sums.sum(0)[..., None]


def emitting_unrolled(params, x):
    total = 0.0
    for one in params["stack"]:
        x = block(one, x)
        total = total + x.sum(-1)
    return x @ params["head"] + total[..., None]


def backwards(params, x):
    turned = params | {"stack": params["stack"][::-1]}
    return unrolled(turned, x)


def nested_calls(params, x):
    call = jax.checkpoint(jax.jit(jax.checkpoint(block)))
    return jax.jit(functools.partial(scanned, step=call))(params, x)


checkpointed = jax.checkpoint(block, prevent_cse=False)
STACKS = {  # a model with a loop, and the same without
    "plain": (scanned, unrolled),
    "checkpoint": (functools.partial(scanned, step=checkpointed), unrolled),
    "nested calls": (nested_calls, unrolled),
    "unroll": (functools.partial(scanned, unroll=2), unrolled),
    "reverse": (functools.partial(scanned, reverse=True), backwards),
    "mask": (
        functools.partial(scanned, step=masked),
        functools.partial(unrolled, step=masked),
    ),
    "emitting": (emitting, emitting_unrolled),
}


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("plain", ()),
        ("nested calls", (5,)),
        *(
            pytest.param(name, (), marks=pytest.mark.long)
            for name in STACKS
            if name != "plain"
        ),
        pytest.param("plain", (5,), marks=pytest.mark.long),
        pytest.param("checkpoint", (5,), marks=pytest.mark.long),
    ],
)
def test_blocks_of_a_stack_are_those_of_separate_layers(name, places, x64):
    with_loop, without = STACKS[name]
    params, x = stack_params(), normal(0, COUNT, *places, WIDTH)
    vector = jax.tree.map(lambda leaf: normal(8, *leaf.shape), params)
    assert claims(fisher_of(with_loop, params, x)) == [
        "dense 4 → 3",
        "bias of ['stack']['up']",
        "3 × dense 6 → 4",
        "diagonal",
        "3 × dense 4 → 6 with bias ['stack']['bias']",
    ]
    assert len(check_layers(with_loop, params, x)) == 3
    found = solved(with_loop, params, x, vector)
    apart = solved(without, taken_apart(params), x, taken_apart(vector))
    for one, other in zip(
        *map(jax.tree.leaves, (found, put_together(apart))), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("how", ["scales", "microbatches", "averages", "blocks"])
def test_stacks_are_those_of_separate_layers_in_all_else(how, x64):
    params, x = stack_params(), normal(0, COUNT, WIDTH)
    vector = jax.tree.map(lambda leaf: normal(8, *leaf.shape), params)
    models = (
        (scanned, params, vector),
        (
            unrolled,
            taken_apart(params),
            taken_apart(vector),
        ),
    )
    results = []
    for model_fn, own_params, own_vector in models:
        if how in ("averages", "blocks"):
            kronecker = Kronecker(max_block=4 if how == "blocks" else None)
            state = kronecker.init(own_params)
            for k in range(3):
                fisher = fisher_of(model_fn, own_params, x + k)
                precondition, state = kronecker.prepare(fisher, state, DAMPING)
            results.append(precondition(own_vector))
            continue
        options = {}
        if how == "scales":
            options["scales"] = jax.tree.map(lambda p: 1 + p**2, own_params)
        else:
            options["microbatch_size"] = 3
        results.append(solved(model_fn, own_params, x, own_vector, **options))
    found, apart = results[0], put_together(results[1])
    for one, other in zip(*map(jax.tree.leaves, (found, apart)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


# --- One weight at all times


def cell(params, state, x):
    return jnp.tanh(state @ params["u"] + x @ params["w"] + params["b"])


def recurrent(params, x, **options):
    def step(state, x):
        state = cell(params, state, x)
        return state, state

    start = jnp.zeros((len(x), WIDTH))
    _, states = jax.lax.scan(step, start, x.swapaxes(0, 1), **options)
    return states.swapaxes(0, 1)


def recurrent_params():
    return {
        "b": normal(1, WIDTH),
        "u": normal(2, WIDTH, WIDTH) / 2,
        "w": normal(3, 2, WIDTH),
    }


def copied(params, x):
    """The same with a copy of the parameters for each time."""
    state, states = jnp.zeros((len(x), WIDTH)), []
    for time, own in enumerate(params):
        state = cell(own, state, x[:, time])
        states.append(state)
    return jnp.stack(states, 1)


@pytest.mark.parametrize("options", [{}, {"unroll": 5}], ids=str)
def test_the_block_of_a_recurrent_weight_is_of_all_times_together(options, x64):
    params, x = recurrent_params(), normal(0, COUNT, 5, 2)
    model_fn = functools.partial(recurrent, **options)
    fisher = fisher_of(model_fn, params, x)
    assert claims(fisher) == [
        "diagonal",  # two weights feed the sum that it is added to
        "dense 4 → 4 in a loop",
        "dense 2 → 4 in a loop",
    ]
    assert len(check_layers(model_fn, params, x)) == 2
    blocks, factors = ngd.kfac.factors.batch_factors(
        fisher, jnp.zeros((), jnp.int32), 2048
    )

    copies = [params] * 5
    other = fisher_of(copied, copies, x)
    like = jax.eval_shape(other.metric.sqrt_matvec, other.outputs)
    signs = random_signs(like, 0)
    found, values, _ = backward_pass(
        other.pullback, other.sqrt_cotangents(signs), copies
    )
    for one, (inputs, outputs) in zip(blocks[1:], factors[1:], strict=True):
        times = [
            value
            for layer, value in zip(found, values, strict=True)
            if layer.weight % 3 == one.weight
        ]
        a = np.concatenate([x.inputs for x in times])
        delta = np.concatenate([x.cotangents for x in times])
        assert len(a) == COUNT * 5
        np.testing.assert_allclose(inputs, a.T @ a / len(a), rtol=1e-10)
        np.testing.assert_allclose(outputs, delta.T @ delta, rtol=1e-10)


@pytest.mark.parametrize("solver", [ngd.KFAC(), ngd.CG(2)], ids=["KFAC", "CG"])
def test_a_loop_over_no_times_has_no_layers(solver):
    """Its weights do nothing; the layer after it still learns."""
    params = recurrent_params() | {"head": normal(4, WIDTH, 3)}

    def model_fn(params, x):
        start = jnp.ones((len(x), WIDTH))
        times = x.swapaxes(0, 1)
        end, _ = jax.lax.scan(lambda h, x: (cell(params, h, x), None), start, times)
        return end @ params["head"]

    no_times = jnp.ones((COUNT, 0, 2))
    found = claims(fisher_of(model_fn, params, no_times))
    assert not any("in a loop" in claim for claim in found)
    tx = ngd.natural_gradient(
        None, model_fn, ngd.Categorical(), solver=solver, max_kl=0.1
    )
    gradient = jax.tree.map(jnp.zeros_like, params) | {"head": params["head"]}
    _, state = tx.update(gradient, tx.init(params), params, batch=no_times)
    assert int(state.info.status) == ngd.StepStatus.TAKEN
    assert 0.09 < float(state.info.measured_kl) <= 0.1


def test_a_linear_recurrent_layer_without_a_loop_has_the_same_solution(x64):
    # Σₜ xₜ W over five times is a dense layer at five places.
    params, x = {"w": normal(1, 3, WIDTH)}, normal(0, COUNT, 5, 3)

    def looped(params, x):
        return jax.lax.map(lambda x: x @ params["w"], x.swapaxes(0, 1)).swapaxes(0, 1)

    def whole(params, x):
        return x @ params["w"]

    vector = {"w": normal(2, 3, WIDTH)}
    found, expected = (solved(fn, params, x, vector)["w"] for fn in (looped, whole))
    assert claims(fisher_of(looped, params, x)) == ["dense 3 → 4 in a loop"]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["plain", "nested calls"])
def test_the_gram_matrix_leaves_loops_to_the_rows(name, x64):
    model_fn, params, x = STACKS[name][0], stack_params(), normal(0, COUNT, WIDTH)
    fisher = fisher_of(model_fn, params, x)
    root = columns(model_fn, params, x, ngd.Categorical())
    np.testing.assert_allclose(gram(fisher), root @ root.T, rtol=1e-9, atol=1e-12)


# --- Loops in loops


def stack_at_all_times(params, x):
    def at_time(state, x):
        state, _ = jax.lax.scan(
            lambda state, p: (jnp.tanh(state @ p + x), None), state, params["w"]
        )
        return state, None

    return jax.lax.scan(at_time, x[0], x)[0]


def times_in_every_layer(params, x):
    def layer(x, w):
        def at_time(state, x):
            state = jnp.tanh(state @ w + x)
            return state, state

        return jax.lax.scan(at_time, x[0], x)[1], None

    return jax.lax.scan(layer, x, params["w"])[0].sum(0)


@pytest.mark.parametrize("model_fn", [stack_at_all_times, times_in_every_layer])
def test_a_stack_and_a_loop_over_time_may_be_nested(model_fn, x64):
    params, x = {"w": normal(1, DEPTH, WIDTH, WIDTH) / 2}, normal(0, 5, COUNT, WIDTH)
    assert check_layers(model_fn, params, x) == [(WIDTH, WIDTH)]
    assert claims(fisher_of(model_fn, params, x)) == ["3 × dense 4 → 4"]


def test_a_stack_of_stacks_has_factors_of_gradients(x64):
    params, x = {"w": normal(1, 2, DEPTH, WIDTH, WIDTH) / 2}, normal(0, COUNT, WIDTH)

    def model_fn(params, x):
        def outer(x, ws):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0], None

        return jax.lax.scan(outer, x, params["w"])[0]

    assert check_layers(model_fn, params, x) == [(WIDTH, WIDTH)]
    assert claims(fisher_of(model_fn, params, x)) == [
        "2 × factors from gradients 12 × 4"
    ]


# --- What is not certain is not claimed


def over_time(params, x, step, start=None):
    start = x[0] if start is None else start
    return jax.lax.scan(step, start, x)[0]


def used_outside(params, x):
    step = lambda state, x: (jnp.tanh(state @ params["w"] + x), None)  # noqa: E731
    return over_time(params, x, step) @ params["w"]


def used_twice_inside(params, x):
    def step(state, x):
        return jnp.tanh(jnp.tanh(state @ params["w"]) @ params["w"] + x), None

    return over_time(params, x, step)


def scaled_inside(params, x):
    def step(state, x):
        return jnp.tanh(state @ (params["w"] * params["gain"]) + x), None

    return over_time(params, x, step)


def carried(params, x):
    """The weight is in the carry, and changes."""

    def step(carry, x):
        state, w = carry
        return (jnp.tanh(state @ w + x), 0.9 * w), None

    return jax.lax.scan(step, (x[0], params["w"]), x)[0][0]


def penalized(params, x):
    """Its gradient has another term in each iteration."""

    def step(state, x):
        return jnp.tanh(state @ params["w"] + x) + jnp.sum(params["w"] ** 2), None

    return over_time(params, x, step)


def scaled_stack(params, x):
    ws = params["gain"] * jnp.stack([params["w"]] * 3)
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x[0], ws)[0]


def turned_over(params, x):
    ws = params["stack"][::-1]
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x[0], ws)[0]


def on_the_second_axis(params, x):
    ws = params["stack"].swapaxes(0, 1)
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x[0], ws)[0]


def half_of_a_stack(params, x):
    ws = params["stack"][:2]
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x[0], ws)[0]


NOT_CERTAIN = (
    used_outside,
    used_twice_inside,
    scaled_inside,
    carried,
    penalized,
    scaled_stack,
    turned_over,
    on_the_second_axis,
    half_of_a_stack,
)


@pytest.mark.parametrize("model_fn", NOT_CERTAIN)
def test_what_is_not_certain_is_not_claimed(model_fn, x64):
    x = normal(0, 5, COUNT, WIDTH)
    params = {
        "gain": 1.5 * jnp.ones(()),
        "stack": normal(1, WIDTH, WIDTH, WIDTH) / 2,
        "w": normal(2, WIDTH, WIDTH) / 2,
    }
    assert check_layers(model_fn, params, x) == []
    vector = jax.tree.map(lambda leaf: normal(8, *leaf.shape), params)
    found = solved(model_fn, params, x, vector)
    assert 0 < tree.vdot(found, vector) < tree.vdot(vector, vector) / DAMPING * 1.001


def test_a_loop_that_starts_from_something_is_not_a_sum(x64):
    # A pullback may be any linear program: here one whose total starts at its input.
    a, like = normal(1, 5, COUNT, WIDTH), jnp.zeros((WIDTH, 3))

    cotangents = normal(2, COUNT, 3)
    ones = jnp.ones((WIDTH, COUNT))
    starts = {
        "zero": jnp.zeros_like,
        "gradient": None,
        "constant": jnp.ones_like,
    }

    def pull(cotangents, start):
        def step(total, a):
            return total + a.T @ cotangents, None

        first = ones @ cotangents if start is None else start(like)
        return jax.lax.scan(step, first, a)[0]

    counts = {}
    for name, start in starts.items():
        of_start = functools.partial(pull, start=start)
        counts[name] = len(read_backward(of_start, cotangents, like).layers)
    assert counts == {"zero": 1, "gradient": 0, "constant": 0}


@pytest.mark.parametrize("how", ["doubled", "read", "returned"])
def test_a_total_that_is_used_for_more_is_not_a_sum(how, x64):
    a, like = normal(1, 5, COUNT, WIDTH), (jnp.zeros((WIDTH, 3)), jnp.zeros(()))

    def pull(cotangents):
        def step(carry, a):
            total, other = carry
            new = total + a.T @ cotangents
            if how == "doubled":
                new = 2 * new
            elif how == "read":
                other = other + jnp.sum(total)
            return (new, other), total if how == "returned" else None

        start = (jnp.zeros((WIDTH, 3)), jnp.zeros(()))
        (total, other), rest = jax.lax.scan(step, start, a)
        return total, other + (0 if rest is None else jnp.sum(rest))

    assert read_backward(pull, normal(2, COUNT, 3), like).layers == []


def test_inputs_that_depend_on_the_carry_of_cotangents_are_not_inputs(x64):
    like = jnp.zeros((DEPTH, WIDTH, WIDTH))

    def pull(cotangents):
        def step(carry, _):
            moving, still = carry
            # From the second iteration on, the first factor moves too.
            return (moving, moving), still.T @ moving

        start = (cotangents, jnp.ones((COUNT, WIDTH)))
        return jax.lax.scan(step, start, length=DEPTH)[1]

    assert read_backward(pull, normal(2, COUNT, WIDTH), like).layers == []


def one_bias_for_all(params, x):
    """A stack of weights that share one bias: no layer owns it."""

    def step(x, w):
        return jnp.tanh(x @ w + params["b"]), None

    return jax.lax.scan(step, x, params["w"])[0]


def test_a_bias_that_a_stack_shares_belongs_to_none(x64):
    params = {"b": normal(1, WIDTH), "w": normal(2, DEPTH, WIDTH, WIDTH)}
    found = claims(fisher_of(one_bias_for_all, params, normal(0, COUNT, WIDTH)))
    assert found == ["diagonal", "3 × dense 4 → 4"]


# --- Networks of Flax


class Layer(linen.Module):
    """Attention and a feed-forward layer, with norms."""

    @linen.compact
    def __call__(self, x, _):
        x = x + linen.MultiHeadDotProductAttention(2)(linen.LayerNorm()(x))
        hidden = linen.gelu(linen.Dense(2 * WIDTH)(linen.LayerNorm()(x)))
        return x + linen.Dense(WIDTH)(hidden), None


def linen_case(checkpoint):
    layer = linen.remat(Layer, prevent_cse=False) if checkpoint else Layer
    network = linen.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=DEPTH,
    )()
    x = normal(0, COUNT, 5, WIDTH)
    params = network.init(jax.random.key(1), x, None)["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)

    def with_loop(params, x):
        return network.apply({"params": params["stack"]}, x, None)[0]

    def without(params, x):
        for one in params["stack"]:
            x, _ = Layer().apply({"params": one}, x, None)
        return x

    return with_loop, without, {"stack": params}, x


class NnxLayer(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


def nnx_case():
    @nnx.split_rngs(splits=DEPTH)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return NnxLayer(rngs)

    graph, params = nnx.split(make(nnx.Rngs(0)))
    single, _ = nnx.split(NnxLayer(nnx.Rngs(0)))

    def with_loop(params, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        return run(x, nnx.merge(graph, params["stack"]))

    def without(params, x):
        for one in params["stack"]:
            x = nnx.merge(single, one)(x)
        return x

    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    return with_loop, without, {"stack": params}, normal(0, COUNT, WIDTH)


@pytest.mark.long
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(linen_case, False),
        functools.partial(linen_case, True),
        nnx_case,
    ],
    ids=["linen", "linen with remat", "nnx"],
)
def test_scans_of_flax_are_stacks(make, x64):
    with_loop, without, params, x = make()
    vector = jax.tree.map(lambda leaf: normal(8, *leaf.shape), params)
    words = claims(fisher_of(with_loop, params, x))
    assert all(
        word.startswith(("3 × dense", "bias of", "diagonal")) for word in words
    ), words
    found = solved(with_loop, params, x, vector)
    apart = solved(without, taken_apart(params), x, taken_apart(vector))
    for one, other in zip(
        *map(jax.tree.leaves, (found, put_together(apart))), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.long
def test_weights_of_recurrent_networks_are_found():
    network = RowGRU(6)
    rows, length = normal(0, COUNT, 5, 4), jnp.array([5, 3, 1, 2, 4, 5, 5])
    params = network.init(jax.random.key(1), rows, length)["params"]

    def model_fn(params, batch):
        return network.apply({"params": params}, *batch)

    words = claims(fisher_of(model_fn, params, (rows, length)))
    kernels = [word for word in words if word.startswith("dense")]
    assert len(kernels) == 7
    assert sum("in a loop" in word for word in kernels) == 6
    assert not any("gradients" in word for word in words)


# --- The state and the program


def test_a_stack_is_one_member_of_a_group():
    shapes = [(24, 16), (24, 16, 64), (24, 64), (24, 64, 16), (64, 16)]
    leaves = [jnp.zeros(shape) for shape in shapes]
    stack = Room(2, True)
    rooms = rooms_of(leaves, 2048)
    assert [stack in own for own in rooms] == [False, True, False, True, False]
    (group,) = [x for x in groups_of(leaves, 2048) if x.shape == (64, 16)]
    assert group.members == (Member(3, stack, 0, 24), Member(4, Room(1, False), 0, 1))
    assert group.num_places == 25


@pytest.mark.parametrize(
    ("num_devices", "parts"), [(5, [25]), (8, [24, 1]), (7, [21, 4])]
)
def test_the_layers_of_a_stack_are_divided_among_devices(num_devices, parts):
    leaves = [jnp.zeros((25, 16, 64)), jnp.zeros((25, 64))]
    groups = [x for x in groups_of(leaves, 2048, num_devices) if x.shape == (16, 64)]
    assert [group.num_places for group in groups] == parts
    layers = [range(m.first, m.first + m.num_layers) for g in groups for m in g.members]
    assert list(itertools.chain(*layers)) == list(range(25))


def test_kernels_of_large_convolutions_have_no_room_for_stacks():
    shapes = [(3, 3, 64, 128), (128,), (3, 3, 128, 128), (128, 10)]
    rooms = rooms_of([jnp.zeros(shape) for shape in shapes], 2048)
    assert Room(3, True) not in [room for own in rooms for room in own]


def lowered_step(depth):
    params, x = stack_params(depth), normal(0, COUNT, WIDTH)
    step = functools.partial(scanned, step=checkpointed)
    tx = ngd.natural_gradient(
        1.0, step, ngd.Categorical(), max_kl=0.1, solver=ngd.KFAC()
    )

    def update(params, state, x):
        grads = jax.grad(lambda params: jnp.sum(step(params, x) ** 2))(params)
        return tx.update(grads, state, params, batch=x)

    return jax.jit(update).lower(params, tx.init(params), x)


@pytest.mark.long
def test_the_size_of_the_program_does_not_depend_on_the_depth():
    # Other numbers than the sizes of anything else: equal functions are shared.
    programs = [lowered_step(depth) for depth in (5, 9)]
    counts = [program.as_text().count(" = ") for program in programs]
    assert counts[0] == counts[1]
    # XLA places a few copies otherwise.
    counts = [program.compile().as_text().count(" = ") for program in programs]
    assert abs(counts[0] - counts[1]) < 0.005 * counts[0]


@pytest.mark.long
def test_rows_of_all_layers_are_never_in_memory_together():
    """With `jax.checkpoint`, a layer adds its input and its factors, and no rows."""
    count, width, hidden = 4096, 8, 128

    def of_factors(depth):
        params, x = stack_params(depth, width, hidden), normal(0, count, width)
        step = functools.partial(scanned, step=checkpointed)

        def factors(params, x):
            fisher = fisher_of(step, params, x)
            zero = jnp.zeros((), jnp.int32)
            return ngd.kfac.factors.batch_factors(fisher, zero, 2048)[1]

        return jax.jit(factors).lower(params, x).compile().memory_analysis()

    few, many = of_factors(2), of_factors(10)
    added = (many.temp_size_in_bytes - few.temp_size_in_bytes) / 8
    factors = (many.output_size_in_bytes - few.output_size_in_bytes) / 8
    # The input of each layer is kept; δ of `up` alone would be 16 times as much.
    assert added <= 2 * (4 * count * width) + 2 * factors
    assert added < 0.25 * 4 * count * hidden
