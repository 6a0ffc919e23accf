"""Auto: what it takes for which shapes, and that the solution is that solver's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax.solvers import StatefulSolver
from tests import reference

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def linear(w, x):
    return x @ w


def choose(num_examples, num_inputs, num_outputs=1, model_fn=linear, **options):
    """From shapes alone: nothing of this size is ever made."""
    return ngd.Auto(**options).choose_for(
        model_fn,
        shape(num_inputs, num_outputs),
        shape(num_examples, num_inputs),
        ngd.Gaussian(),
    )


@pytest.mark.parametrize(
    ("num_examples", "num_inputs", "num_outputs", "expected"),
    [
        (100_000, 20, 1, ngd.Cholesky),
        (64, 1_000_000, 1, ngd.SampleSpace),
        (8, 100_000, 4, ngd.SampleSpace),
        (16, 100_000, 4, ngd.SampleSpace),
        (4096, 100_000, 10, ngd.CG),
        (100_000, 1_000_000, 1, ngd.CG),
    ],
)
def test_choice_is_by_the_shapes(num_examples, num_inputs, num_outputs, expected):
    choice = choose(num_examples, num_inputs, num_outputs)
    assert isinstance(choice.solver, expected)
    assert choice.reason.startswith(expected.__name__)
    assert str(num_inputs * num_outputs) in choice.reason
    assert str(num_examples * num_outputs) in choice.reason
    assert choice.reason.endswith(".")


def test_rows_that_are_no_outer_products_cost_more():
    # Measured: 180 gradients for the Gram matrix alone, where CG takes 20.
    choice = choose(16, 100_000, 4, lambda w, x: x @ jnp.sin(w))
    assert isinstance(choice.solver, ngd.CG)


@pytest.mark.parametrize(
    ("num_examples", "width", "expected"),
    # Measured, in gradients: 27 for Cholesky and 350 for SampleSpace; 350 and 31.
    [(1024, 16, ngd.Cholesky), (512, 64, ngd.SampleSpace)],
)
def test_small_networks_are_solved_exactly(num_examples, width, expected):
    def model_fn(params, x):
        return jnp.tanh(x @ params[0] + params[1][None]) @ params[2]

    choice = ngd.Auto().choose_for(
        model_fn,
        (shape(16, width), shape(width), shape(width)),
        shape(num_examples, 16),
        ngd.LogAmplitude(),
    )
    assert isinstance(choice.solver, expected), choice.reason


def test_crossovers_are_set_by_the_attributes():
    assert isinstance(choose(512, 100_000).solver, ngd.CG)
    assert isinstance(choose(512, 100_000, exactness=100.0).solver, ngd.SampleSpace)
    assert isinstance(choose(512, 100_000, gram_cost=0.01).solver, ngd.SampleSpace)
    assert isinstance(choose(64, 100_000, memory=1000).solver, ngd.CG)
    patient = ngd.CG(max_steps=1000)
    assert choose(2048, 100_000, cg=patient).solver == ngd.SampleSpace()
    assert choose(64, 100_000, memory=0, cg=patient).solver == patient
    blocks = ngd.SampleSpace(block_size=4)
    assert choose(64, 100_000, sample_space=blocks).solver == blocks


def test_choice_counts_the_samples_of_the_metric():
    case = (linear, shape(1000, 50), shape(64, 1000), ngd.Gaussian())
    auto = ngd.Auto()
    assert isinstance(auto.choose_for(*case).solver, ngd.CG)
    one_each = auto.choose_for(*case, kind="sampled")
    assert isinstance(one_each.solver, ngd.SampleSpace)
    assert " 64 samples" in one_each.reason


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
def test_choices_by_shapes_are_those_for_the_metric_itself(kind):
    def model_fn(params, x):
        return jnp.tanh(x @ params[0]) @ params[1]

    # So many examples that only rows of single coefficients fit into memory.
    data = ((shape(100, 100), shape(100, 10)), shape(5000, 100))
    targets = jax.ShapeDtypeStruct((5000,), jnp.int32)
    auto, choices = ngd.Auto(), []

    def choose_by_metric(params, x, targets):
        fisher = ngd.linearize_fisher(
            model_fn,
            params,
            x,
            ngd.Categorical(),
            kind=kind,
            key=jax.random.key(1),
            targets=targets,
        )
        choices.append(auto.choose(fisher))

    jax.eval_shape(choose_by_metric, *data, targets)
    choices.append(
        auto.choose_for(model_fn, *data, ngd.Categorical(), kind=kind, targets=targets)
    )
    assert choices[0] == choices[1]


def test_blocks_count_their_own_batches():
    def model_fn(w, batch):
        return {name: x @ w for name, x in batch.items()}

    likelihood = ngd.Product({"a": ngd.Gaussian(), "b": ngd.Gaussian()})
    batch = {"a": shape(30, 5000), "b": shape(7, 5000)}
    choice = ngd.Auto().choose_for(model_fn, shape(5000, 1), batch, likelihood)
    assert isinstance(choice.solver, ngd.SampleSpace)
    assert " 37 samples" in choice.reason


def test_batches_that_cannot_be_cut_are_left_to_cg():
    def model_fn(w, scale):
        return scale * jnp.linspace(-1.0, 1.0, 5)[:, None] * jnp.sin(w)[None].sum()

    choice = ngd.Auto().choose_for(model_fn, shape(5000), shape(), ngd.Gaussian())
    assert isinstance(choice.solver, ngd.CG)
    assert "have no rows" in choice.reason


@functools.partial(jax.jit, static_argnums=(0, 1))
def solve(model_fn, solver, params, x, rhs):
    fisher = ngd.linearize_fisher(model_fn, params, x, ngd.Gaussian())
    return solver.solve(
        fisher, rhs, damping=0.1, state=solver.init(params)
    ), fisher.matvec(rhs)


def network_case(rng, num_hidden, num_examples=6):
    params = reference.network_params(rng, 1, num_hidden=num_hidden)
    x = jnp.asarray(rng.normal(size=(num_examples, 2)), jnp.float32)
    rhs = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
    return params, x, rhs


@pytest.mark.parametrize(
    ("num_hidden", "num_examples", "expected"),
    [(3, 99, ngd.Cholesky()), (64, 6, ngd.SampleSpace())],
)
def test_solution_is_that_of_the_solver_chosen(num_hidden, num_examples, expected, rng):
    params, x, rhs = network_case(rng, num_hidden, num_examples)
    auto = ngd.Auto()
    fisher = ngd.linearize_fisher(reference.network, params, x, ngd.Gaussian())
    assert auto.choose(fisher).solver == expected
    assert auto.choose(fisher) == auto.choose_for(
        reference.network, params, x, ngd.Gaussian()
    )
    (solution, info, _), _ = solve(reference.network, auto, params, x, rhs)
    assert int(info.status) == Status.CONVERGED
    assert int(info.num_steps) == 0
    truth = ngd.CG(max_steps=60, rtol=1e-7)
    (truth, _, _), _ = solve(reference.network, truth, params, x, rhs)
    truth = reference.flat(truth)
    np.testing.assert_allclose(
        reference.flat(solution), truth, atol=1e-4 * np.abs(truth).max()
    )


def test_models_that_mix_examples_are_solved_by_cg_after_all(x64, rng):
    params, x, rhs = jax.tree.map(np.float64, network_case(rng, 64))
    model_fn = reference.batch_norm_network
    cg = ngd.CG(max_steps=40)
    auto = ngd.Auto(cg=cg)
    choice = auto.choose_for(model_fn, params, x, ngd.Gaussian())
    assert isinstance(choice.solver, ngd.SampleSpace)
    (solution, info, _), _ = solve(model_fn, auto, params, x, rhs)
    (expected, cg_info, _), _ = solve(model_fn, cg, params, x, rhs)
    assert int(info.status) == int(cg_info.status) == Status.CONVERGED
    assert int(info.num_steps) == int(cg_info.num_steps) > 0
    np.testing.assert_allclose(
        reference.flat(solution), reference.flat(expected), rtol=1e-9, atol=1e-9
    )


def test_state_is_that_of_cg_whatever_is_chosen(rng):
    params, x, rhs = network_case(rng, 64)
    auto = ngd.Auto(cg=ngd.CG(preconditioner=ngd.Jacobi()))
    assert isinstance(auto, StatefulSolver)
    before = auto.init(params)
    assert jax.tree.structure(before) == jax.tree.structure(auto.cg.init(params))
    (_, _, after), _ = solve(reference.network, auto, params, x, rhs)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    assert ngd.Auto().init(params) == ()
