"""What Optax promises of a transformation; what does not work raises an error."""

import functools

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import ngd_jax as ngd
from tests.marks import long_unless
from tests.transform.problems import (
    assert_same,
    flat,
    grad_fn,
    loss_fn,
    make_problem,
    model_fn,
)

PARAMS, BATCH = make_problem()
GRADS = grad_fn(PARAMS, BATCH)
# Small to compile, with a state of its own.
SOLVER = ngd.CG(5, preconditioner=ngd.Kronecker(refresh_every=2))


def make_tx(learning_rate=None, *, max_kl=1e-2, **options):
    options = {"damping": 0.1, "momentum": 0.5, "solver": SOLVER} | options
    return ngd.natural_gradient(
        learning_rate, model_fn, ngd.Categorical(), max_kl=max_kl, **options
    )


TX = make_tx()
UPDATE = jax.jit(TX.update)


@functools.cache
def plain_step():
    return UPDATE(GRADS, TX.init(PARAMS), PARAMS, batch=BATCH)


def info_of(state):
    return optax.tree.get(state, "NaturalGradientInfo")


# --- Shapes and dtypes.


def test_updates_and_state_keep_structure_shapes_and_dtypes():
    updates, state = plain_step()
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, TX.init(PARAMS))


@pytest.mark.parametrize("mixed", long_unless([True], [False, True]))
def test_narrow_parameters_keep_their_dtype_and_directions_are_wide(mixed):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    if mixed:
        params["out"] = PARAMS["out"]
    grads = grad_fn(params, BATCH)
    state = TX.init(params)
    updates, new_state = UPDATE(grads, state, params, batch=BATCH)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert {x.dtype for x in jax.tree.leaves(new_state.direction)} == {
        np.dtype(np.float32)
    }
    expected = flat(plain_step()[0])
    cosine = flat(updates) @ expected / np.linalg.norm(flat(updates))
    assert cosine / np.linalg.norm(expected) > 0.98


@pytest.mark.long
def test_float64_is_kept_throughout(x64):
    params, batch = make_problem(dtype=jnp.float64)
    state = TX.init(params)
    grads = params
    updates, new_state = jax.jit(TX.update)(grads, state, params, batch=batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert new_state.info.measured_kl.dtype == np.float64


@pytest.mark.long
def test_jit_equals_eager():
    tx = make_tx(solver=ngd.CG(2))
    arguments = GRADS, tx.init(PARAMS), PARAMS
    eager = tx.update(*arguments, batch=BATCH)
    assert_same(eager, jax.jit(tx.update)(*arguments, batch=BATCH), 1e-3, 1e-5)


def test_update_leaves_its_arguments_alone():
    assert_same(plain_step(), UPDATE(GRADS, TX.init(PARAMS), PARAMS, batch=BATCH))


# --- Extra arguments and chains.


def test_unknown_extra_arguments_are_ignored():
    actual = UPDATE(
        GRADS, TX.init(PARAMS), PARAMS, batch=BATCH, value=1.0, grad=GRADS, unknown=3
    )
    assert_same(actual, plain_step(), rtol=1e-4, atol=1e-6)


CHAINS = {
    "chain": lambda: optax.chain(TX, optax.scale(0.5)),
    "named chain": lambda: optax.named_chain(("ngd", TX), ("scale", optax.scale(0.5))),
    "nested chain": lambda: optax.chain(optax.chain(TX), optax.scale(0.5)),
    "apply if finite": lambda: optax.apply_if_finite(
        optax.chain(TX, optax.scale(0.5)), 3
    ),
    "flattened state": lambda: optax.chain(
        optax.clip_by_global_norm(1e9), TX, optax.scale(0.5)
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CHAINS)
def test_info_is_found_in_every_chain(name):
    tx = CHAINS[name]()
    updates, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH)
    expected, expected_state = plain_step()
    halved = jax.tree.map(lambda x: 0.5 * x, expected)
    assert_same(updates, halved, rtol=1e-3, atol=1e-6)
    assert_same(info_of(state), expected_state.info, rtol=1e-3, atol=1e-6)


@pytest.mark.long
def test_decay_and_clipping_around_it_act_on_its_updates():
    tx = optax.chain(
        TX,
        optax.add_decayed_weights(-0.1, mask=lambda p: jax.tree.map(jnp.ndim, p)),
        optax.clip_by_global_norm(0.05),
    )
    updates, _ = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS, batch=BATCH)
    expected = jax.tree.map(
        lambda u, p: u - 0.1 * p if p.ndim else u, plain_step()[0], PARAMS
    )
    norm = np.linalg.norm(flat(expected))
    assert norm > 0.05
    np.testing.assert_allclose(
        flat(updates), flat(expected) * 0.05 / norm, rtol=1e-3, atol=1e-6
    )


LINE_SEARCHES = {
    "backtracking": optax.scale_by_backtracking_linesearch(10),
    "zoom": optax.scale_by_zoom_linesearch(10),
}


@pytest.mark.long
@pytest.mark.parametrize("name", LINE_SEARCHES)
def test_line_searches_behind_it_see_the_batch_and_reduce_the_loss(name):
    tx = optax.chain(make_tx(1.0, max_kl=0.5, solver=ngd.CG(5)), LINE_SEARCHES[name])

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(loss_fn)(params, BATCH)
        updates, state = tx.update(
            grad,
            state,
            params,
            batch=BATCH,
            value=value,
            grad=grad,
            value_fn=loss_fn,
        )
        return optax.apply_updates(params, updates), state, value

    carry, values = (PARAMS, tx.init(PARAMS)), []
    for _ in range(4):
        *carry, value = step(*carry)
        values.append(float(value))
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_hyperparameters_can_be_read_and_changed():
    tx = optax.inject_hyperparams(ngd.natural_gradient, static_args=ngd.STATIC_ARGS)(
        learning_rate=lambda count: 0.1 / (1 + count),
        model_fn=model_fn,
        likelihood=ngd.Categorical(),
        max_kl=1.0,
        damping=1e-3,
        solver=ngd.CG(5),
    )
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for expected in (0.1, 0.05):
        _, state = update(GRADS, state, PARAMS, batch=BATCH)
        np.testing.assert_allclose(state.hyperparams["learning_rate"], expected)
        np.testing.assert_allclose(info_of(state).step_scale, expected)
        np.testing.assert_allclose(info_of(state).damping, 1e-3)
    state.hyperparams["damping"] = jnp.float32(0.5)
    state.hyperparams["max_kl"] = jnp.float32(1e-6)
    _, state = update(GRADS, state, PARAMS, batch=BATCH)
    assert info_of(state).damping == 0.5
    assert 0 < info_of(state).measured_kl <= 1e-6
    assert update._cache_size() == 1


def test_map_params_reaches_what_is_shaped_like_parameters():
    tx = make_tx(solver=ngd.CG(preconditioner=ngd.contrib.Jacobi()))
    state = tx.init(PARAMS)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    of_params = (state.direction, state.solver_state.diagonal)
    more = jax.tree.map(lambda x: x + 1, of_params)
    assert_same((mapped.direction, mapped.solver_state.diagonal), more)
    of_solver = mapped.solver_state._replace(diagonal=state.solver_state.diagonal)
    rest = mapped._replace(direction=state.direction, solver_state=of_solver)
    assert_same(rest, state)


@pytest.mark.parametrize("params", [{}, None, (), {"a": {}}])
def test_init_survives_a_tree_without_leaves(params):
    state = TX.init(params)
    assert state.count == 0
    assert not jax.tree.leaves(state.direction)


def test_updates_of_a_tree_without_leaves():
    tx = ngd.natural_gradient(
        1.0, lambda _, batch: batch["x"], ngd.Gaussian(), max_kl=0.1
    )
    updates, state = jax.jit(tx.update)({}, tx.init({}), {}, batch=BATCH)
    assert updates == {}
    assert jax.tree.structure(state) == jax.tree.structure(tx.init({}))


# --- JAX transformations.


def train_step(carry, batch):
    params, state = carry
    grads = jax.grad(loss_fn)(params, batch)
    updates, state = TX.update(grads, state, params, batch=batch)
    return (optax.apply_updates(params, updates), state), info_of(state).measured_kl


@pytest.mark.long
def test_scan_over_steps_equals_single_steps():
    start = (PARAMS, TX.init(PARAMS))
    batches = jax.tree.map(lambda x: jnp.stack([x, x[::-1], x]), BATCH)
    scanned, kls = jax.jit(lambda c, b: jax.lax.scan(train_step, c, b))(start, batches)
    single, step = start, jax.jit(train_step)
    for index in range(3):
        single, _ = step(single, jax.tree.map(lambda x, i=index: x[i], batches))
    assert_same(scanned[0], single[0], rtol=1e-2, atol=1e-4)
    assert scanned[1].count == 3
    assert kls.shape == (3,)
    assert (kls <= 1e-2).all()


@pytest.mark.long
def test_cond_takes_or_leaves_a_step():
    @jax.jit
    def maybe(take, state):
        return jax.lax.cond(
            take,
            lambda s: TX.update(GRADS, s, PARAMS, batch=BATCH),
            lambda s: (optax.tree.zeros_like(PARAMS), s),
            state,
        )

    state = TX.init(PARAMS)
    assert_same(maybe(True, state), plain_step(), rtol=1e-2, atol=1e-4)
    assert_same(maybe(False, state)[1], state)


@pytest.mark.long
def test_vmap_over_an_ensemble_equals_each_member():
    members = [PARAMS, make_problem(seed=1)[0]]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *members)

    @jax.jit
    @jax.vmap
    def step(params):
        return train_step((params, TX.init(params)), BATCH)

    (params, state), _ = step(stacked)
    assert state.count.tolist() == [1, 1]
    single = jax.jit(train_step)
    for index, member in enumerate(members):
        (expected, _), _ = single((member, TX.init(member)), BATCH)
        assert_same(
            jax.tree.map(lambda x, i=index: x[i], params),
            expected,
            rtol=1e-2,
            atol=1e-4,
        )


@pytest.mark.long
def test_donated_buffers_and_no_second_compilation():
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(params, state, batch):
        return train_step((params, state), batch)[0]

    # The state of `init` as it is: no two of its leaves share a buffer.
    params, state = jax.tree.map(jnp.copy, PARAMS), TX.init(PARAMS)
    expected = jax.jit(train_step)((params, state), BATCH)[0]
    before = params, state
    params, state = step(params, state, BATCH)
    assert_same((params, state), expected)
    assert all(x.is_deleted() for x in jax.tree.leaves(before[0]))
    for _ in range(2):
        params, state = step(params, state, BATCH)
    assert state.count == 3
    assert step._cache_size() == 1


SOLVERS = {
    "default": None,
    "cg": ngd.CG(),
    "kronecker": ngd.CG(preconditioner=ngd.Kronecker()),
    "jacobi": ngd.CG(preconditioner=ngd.contrib.Jacobi(refresh_every=3)),
    "nystrom": ngd.CG(preconditioner=ngd.contrib.Nystrom(2, key=jax.random.key(0))),
    "kfac": ngd.KFAC(),
    "lsmr": ngd.LSMR(),
    "cholesky": ngd.Cholesky(),
    "sample space": ngd.SampleSpace(),
    "svd": ngd.contrib.SVD(),
    "backtracking": ngd.contrib.BacktrackingCG(),
    "damping search": ngd.contrib.DampingSearch(),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_no_two_leaves_of_a_fresh_state_share_a_buffer(name):
    options = {} if SOLVERS[name] is None else {"solver": SOLVERS[name]}
    tx = ngd.natural_gradient(
        1.0,
        model_fn,
        ngd.Categorical(),
        max_kl=1e-2,
        momentum=0.5,
        damping=ngd.LevenbergMarquardt(),
        loss_fn=lambda outputs, _: outputs.mean(),
        **options,
    )
    params = PARAMS | {"none": jnp.zeros((0, 3))}
    leaves = jax.tree.leaves((tx.init(params), params))
    full = [leaf for leaf in leaves if leaf.size]
    assert len({leaf.unsafe_buffer_pointer() for leaf in full}) == len(full)


# --- Checkpoints.


def _orbax(tmp_path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", tree)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        return checkpointer.restore(tmp_path / "state", like)


def _flax(_, tree):
    data = flax.serialization.to_bytes(tree)
    return flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, tree), data)


@pytest.mark.parametrize("save_and_restore", [_orbax, _flax])
def test_training_goes_on_bit_for_bit_from_a_restored_state(save_and_restore, tmp_path):
    step = jax.jit(train_step)
    carry, _ = step((PARAMS, TX.init(PARAMS)), BATCH)
    restored = save_and_restore(tmp_path, carry)
    assert_same(restored, carry)
    assert_same(step(restored, BATCH)[0], step(carry, BATCH)[0])


# --- A part of the parameters; leaves that are no arrays.


@pytest.mark.long
def test_a_part_of_the_parameters_has_a_radius_of_its_own():
    """A policy head inside `optax.partition`: the rest is MaskedNode to the model."""

    def policy_fn(params, batch):
        return batch["x"] @ params["policy"]["w"]

    params = {"policy": {"w": jnp.ones((2, 3))}, "critic": {"w": jnp.ones((2, 1))}}
    grads = {"policy": {"w": jnp.eye(2, 3)}, "critic": {"w": jnp.full((2, 1), 2.0)}}
    tx = optax.partition(
        {
            "policy": ngd.natural_gradient(
                None, policy_fn, ngd.Categorical(), max_kl=1e-2, solver=ngd.CG(5)
            ),
            "critic": optax.sgd(0.1),
        },
        {"policy": "policy", "critic": "critic"},
    )
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=BATCH)
    np.testing.assert_allclose(updates["critic"]["w"], -0.2)
    info = info_of(state)
    assert info.status == ngd.StepStatus.TAKEN
    moved = optax.apply_updates(params, updates)
    kl = ngd.mean_kl(policy_fn, params, moved, BATCH, ngd.Categorical())
    assert 0.9e-2 <= kl <= 1.001e-2
    np.testing.assert_allclose(info.measured_kl, kl, rtol=1e-4)

    masked = optax.masked(
        ngd.natural_gradient(1.0, policy_fn, ngd.Categorical(), solver=ngd.CG(5)),
        {"policy": True, "critic": False},
    )
    updates, _ = jax.jit(masked.update)(grads, masked.init(params), params, batch=BATCH)
    np.testing.assert_array_equal(updates["critic"]["w"], grads["critic"]["w"])
    assert np.isfinite(updates["policy"]["w"]).all()


@pytest.mark.long
def test_functions_among_the_leaves_of_a_model_are_left_alone():
    """As Equinox keeps them, with None at their places in the gradient."""
    model = {"act": jnp.tanh, "w": [jnp.ones((2, 4)), jnp.ones((4, 3))], "name": None}

    def call(model, batch):
        return model["act"](batch["x"] @ model["w"][0]) @ model["w"][1]

    def plain_fn(weights, batch):
        return call(model | {"w": weights}, batch)

    grads = [jnp.ones((2, 4)), jnp.arange(12.0).reshape(4, 3)]
    solver, radius = ngd.CG(5, preconditioner=ngd.Kronecker()), {"max_kl": 1e-2}
    results = []
    for fn, params, gradient in (
        (call, model, {"act": None, "w": grads, "name": None}),
        (plain_fn, model["w"], grads),
    ):
        tx = ngd.natural_gradient(
            None, fn, ngd.Categorical(), solver=solver, momentum=0.9, **radius
        )
        state = tx.init(params)
        step = jax.jit(lambda g, s, tx=tx, p=params: tx.update(g, s, p, batch=BATCH))
        for _ in range(2):
            updates, state = step(gradient, state)
        results.append((updates, state.info))
    (updates, info), (expected, expected_info) = results
    assert updates["act"] is None
    assert_same(updates["w"], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(info.measured_kl, expected_info.measured_kl, rtol=1e-5)
    assert info.status == ngd.StepStatus.TAKEN


# --- Not supported.


def test_reverse_mode_is_refused_in_words():
    def after(params):
        updates, _ = TX.update(GRADS, TX.init(params), params, batch=BATCH)
        return loss_fn(optax.apply_updates(params, updates), BATCH)

    with pytest.raises(TypeError, match=r"natural_gradient's update.*stop_gradient"):
        jax.eval_shape(jax.grad(after), PARAMS)
