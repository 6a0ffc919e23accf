"""What `Auto` chooses, and that it solves what it chose to solve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def problem(num_hidden, num_examples, num_outputs=1):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w": jax.random.normal(keys[0], (3, num_hidden)) / 2,
        "b": jnp.zeros(num_hidden),
        "v": jax.random.normal(keys[1], (num_hidden, num_outputs)) / 2,
    }
    return params, jax.random.normal(keys[2], (num_examples, 3))


@pytest.mark.parametrize(
    ("num_hidden", "num_examples", "chosen"),
    [
        (4, 64, ngd.Cholesky),
        (4, 4096, ngd.Cholesky),
        (400, 512, ngd.CG),
        (400, 64, ngd.KFAC),
    ],
)
def test_what_is_chosen_follows_parameters_and_outputs(
    num_hidden, num_examples, chosen
):
    params, x = problem(num_hidden, num_examples)
    choice = ngd.Auto().choose_for(network, params, x, ngd.Gaussian())
    assert isinstance(choice.solver, chosen)
    assert choice.reason.startswith(chosen.__name__)


def test_the_choice_follows_cost_and_memory():
    params, x = problem(4, 64)
    cheap = ngd.Auto(exactness=0.0, free=0.0)
    assert isinstance(
        cheap.choose_for(network, params, x, ngd.Gaussian()).solver, ngd.CG
    )
    small = ngd.Auto(memory=100)
    assert isinstance(
        small.choose_for(network, params, x, ngd.Gaussian()).solver, ngd.CG
    )
    exact = ngd.Auto(exactness=1e9)
    params, x = problem(400, 64)
    assert isinstance(
        exact.choose_for(network, params, x, ngd.Gaussian()).solver, ngd.Cholesky
    )


@pytest.mark.long
def test_models_that_mix_their_examples_are_solved_like_any_other(x64):
    def mixing(params, x):
        h = x @ params["w"]
        h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-3)
        return jnp.tanh(h) @ params["v"]

    params, x = problem(4, 8)
    params = jax.tree.map(lambda p: p.astype(float), params)
    params = {"w": params["w"], "v": jnp.zeros_like(params["v"])}
    fisher = ngd.linearize_fisher(mixing, params, x.astype(float), ngd.Gaussian())
    gradient = jax.tree.map(jnp.ones_like, params)
    direction, info = ngd.Auto()(fisher, gradient, damping=0.1)
    product = fisher.matvec(direction)
    for g, f, d in zip(
        *map(jax.tree.leaves, (gradient, product, direction)), strict=True
    ):
        np.testing.assert_allclose(f + 0.1 * d, g, rtol=1e-9)
    assert ngd.SolverStatus(int(info.status)) == ngd.SolverStatus.CONVERGED


@pytest.mark.long
@pytest.mark.parametrize("is_given", [True, False])
def test_state_and_needs_are_those_of_the_other_solver(is_given):
    params, x = problem(400, 64)
    if is_given:
        factors = ngd.Kronecker(0.5, refresh_every=3, observe_every=2, max_size=100)
        other = ngd.CG(2, preconditioner=factors, warm_start=0.5)
        auto = ngd.Auto(otherwise=other)
    else:  # less than 0.1 outputs for each of 2,000 parameters
        other, auto = ngd.KFAC(), ngd.Auto()
    assert auto.warm_start == other.warm_start
    state = auto.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(other.init(params))
    fisher = ngd.linearize_fisher(network, params, x, ngd.Gaussian())
    rhs = ngd.RightHandSide(jax.tree.map(jnp.ones_like, params))
    ours = ngd.solve_scaled(auto, fisher, rhs, damping=0.1, state=state)
    theirs = ngd.solve_scaled(other, fisher, rhs, damping=0.1, state=state)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_array_equal(a, b)
