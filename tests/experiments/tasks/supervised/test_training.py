import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from experiments.running.optimizers import make_optimizer, read_step_info
from experiments.tasks import make_task
from experiments.tasks.supervised.batches import (
    epoch_and_position,
    epoch_permutation,
    take_batch,
)
from experiments.tasks.supervised.task import Task
from experiments.tasks.supervised.training import (
    init_state,
    make_evaluate_fn,
    make_train_chunk,
)
from tests.experiments.helpers import OPTIMIZERS, assert_same_bits, make_config
from tests.marks import long_unless

CAPACITY = 4
BATCH_SIZE = 400  # three batches an epoch, so that chunks run across epochs
QUICK = ("adam", "natural_gradient", "sgd")


def make_parts(optimizer):
    config = make_config(f"optimizer={optimizer}")
    task = make_task(config.task)
    tx = make_optimizer(config.optimizer, task)
    chunk = make_train_chunk(
        task, tx, batch_size=BATCH_SIZE, steps_per_dispatch=CAPACITY, measure_kl=True
    )
    return task, tx, chunk


def run(parts, cuts, seed=0):
    """Takes `cuts[0]`, then `cuts[1]`, ... steps; returns the state and all records."""
    task, tx, chunk = parts
    state, rows = init_state(task, tx, seed), []
    for num_steps in cuts:
        state, records = chunk(state, task.train, jnp.int32(num_steps))
        rows += [
            jax.tree.map(lambda leaf, i=i: leaf[i], records) for i in range(num_steps)
        ]
    return state, rows


@pytest.fixture(scope="module", params=long_unless(QUICK, OPTIMIZERS))
def parts(request):
    return make_parts(request.param)


@pytest.fixture(scope="module")
def sgd():
    return make_parts("sgd")


@pytest.mark.long
def test_any_cut_into_dispatches_gives_the_same_bits(parts):
    state, rows = run(parts, [4, 4])
    other_state, other_rows = run(parts, [1, 3, 0, 2, 2])
    assert int(state.step) == 8
    assert_same_bits(state, other_state)
    assert_same_bits(rows, other_rows)


def test_all_cuts_share_one_compiled_program(sgd):
    run(sgd, [4, 1, 2, 0])
    assert sgd[2]._cache_size() == 1


def test_training_lowers_the_loss(parts):
    task = parts[0]
    evaluate = make_evaluate_fn(task, batch_size=2000)
    before, _ = run(parts, [])
    after, _ = run(parts, [4, 4])
    assert evaluate(after, task.train)["loss"] < evaluate(before, task.train)["loss"]


def test_every_step_has_a_measured_kl(parts):
    _, rows = run(parts, [4])
    kls = [float(row["measured_kl"]) for row in rows]
    assert all(np.isfinite(kls))
    assert all(kl > 0.0 for kl in kls)


@pytest.mark.long
def test_steps_equal_the_plain_loop_over_optax(sgd):
    task, tx, _ = sgd
    state, rows = run(sgd, [4])
    start = init_state(task, tx, 0)
    params, opt_state = start.params, start.opt_state
    for step, row in enumerate(rows):
        epoch, position = epoch_and_position(jnp.int32(step), 1437, BATCH_SIZE)
        order = epoch_permutation(start.key, epoch, 1437)
        batch = take_batch(task.train, order, position, BATCH_SIZE)
        value, grads = jax.value_and_grad(task.loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)
        kl = ngd.mean_kl(task.model_fn, params, new_params, batch, task.likelihood)
        np.testing.assert_allclose(row["loss"], value, rtol=1e-5)
        np.testing.assert_allclose(row["measured_kl"], kl, rtol=1e-3)
        params = new_params
    for leaf, expected in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6)


def test_steps_beyond_the_number_asked_for_leave_no_trace(sgd):
    task, tx, chunk = sgd
    state, records = chunk(init_state(task, tx, 0), task.train, jnp.int32(2))
    assert int(state.step) == 2
    np.testing.assert_array_equal(records["loss"][2:], 0.0)


def test_state_is_donated(sgd):
    task, tx, chunk = sgd
    state = init_state(task, tx, 0)
    chunk(state, task.train, jnp.int32(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_seed_sets_both_the_parameters_and_the_batches(sgd):
    state, other = run(sgd, [], seed=0)[0], run(sgd, [], seed=1)[0]
    assert (jax.random.key_data(state.key) != jax.random.key_data(other.key)).any()
    assert_same_bits(state, run(sgd, [], seed=0)[0])
    leaves = jax.tree.leaves(jax.tree.map(jnp.array_equal, state.params, other.params))
    assert not all(leaves)


def test_evaluation_in_pieces_is_the_mean_over_all_examples(sgd):
    task, tx, _ = sgd
    state = init_state(task, tx, 0)
    whole = make_evaluate_fn(task, batch_size=10**6)(state, task.test)
    pieces = make_evaluate_fn(task, batch_size=77)(state, task.test)
    assert whole.keys() == {"loss", "accuracy"}
    for name, value in whole.items():
        np.testing.assert_allclose(pieces[name], value, rtol=1e-5)
    np.testing.assert_allclose(
        whole["loss"], task.loss_fn(state.params, task.test), rtol=1e-5
    )


def test_kl_is_left_out_where_it_is_not_wanted():
    config = make_config("optimizer=sgd")
    task = make_task(config.task)
    tx = make_optimizer(config.optimizer, task)
    chunk = make_train_chunk(
        task, tx, batch_size=8, steps_per_dispatch=1, measure_kl=False
    )
    _, records = chunk(init_state(task, tx, 0), task.train, jnp.int32(1))
    assert records.keys() == {"loss", "accuracy"}


def test_model_state_is_carried_along_from_batch_to_batch():
    """A running mean of the inputs, as BatchNorm keeps one."""
    task = Task(
        name="running mean",
        train={"x": jnp.arange(8.0)},
        test={"x": jnp.arange(8.0)},
        init_fn=lambda _: ({"w": jnp.ones(())}, {"mean": jnp.zeros(())}),
        model_fn=lambda params, batch: params["w"] * batch["x"],
        likelihood=ngd.Gaussian(event_ndims=0),
        output_loss_fn=lambda outputs, batch: jnp.mean((outputs - batch["x"]) ** 2),
        update_model_state=lambda _, state, batch: {
            "mean": 0.5 * state["mean"] + 0.5 * jnp.mean(batch["x"])
        },
    )
    tx = optax.with_extra_args_support(optax.sgd(0.1))
    chunk = make_train_chunk(
        task, tx, batch_size=8, steps_per_dispatch=2, measure_kl=True
    )
    state, _ = chunk(init_state(task, tx, 0), task.train, jnp.int32(2))
    assert float(state.model_state["mean"]) == pytest.approx(0.75 * 3.5)


def test_natural_gradient_alone_reports_a_solve(parts):
    state, rows = run(parts, [2])
    info = optax.tree.get(state.opt_state, "NaturalGradientInfo")
    if info is None:
        assert "solver_steps" not in rows[-1]
        return
    assert_same_bits(read_step_info(state.opt_state)["measured_kl"], info.measured_kl)
    assert float(rows[-1]["measured_kl"]) == float(info.measured_kl)
    assert int(rows[-1]["solver_steps"]) == int(info.solver.num_steps) > 0
    assert int(rows[-1]["status"]) == ngd.StepStatus.TAKEN
