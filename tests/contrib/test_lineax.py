"""Lineax's solvers behind our protocol: what they report and what they never return."""

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax.contrib.lineax import Lineax
from tests.solvers import systems

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus


def test_lineax_breakdown_on_systems_of_network_size_is_reported_not_returned(rng):
    # Their test for breakdown is absolute, so it stops this well-conditioned system.
    size = 1_000_000
    diagonal = jnp.asarray(rng.uniform(0.5, 1.5, size=size), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=size), jnp.float32)

    @jax.jit
    def solve(rhs):
        fisher = systems.diagonal_fisher(diagonal)
        return Lineax(lineax.CG(1e-5, 1e-5))(fisher, rhs, damping=0.0)

    theirs, their_info = solve(rhs)
    # If a later Lineax solves it, the solution must be right.
    assert bool(jnp.isfinite(theirs).all())
    if int(their_info.status) == Status.CONVERGED:
        np.testing.assert_allclose(theirs, rhs / diagonal, atol=1e-3)
    else:
        assert int(their_info.status) == Status.BREAKDOWN


@jax.jit
def _two_steps(root, rhs):
    solver = Lineax(lineax.CG(1e-9, 1e-9, max_steps=2))
    return solver(systems.fisher_of(root, rhs), rhs, damping=0.0)


def test_lineax_step_budget_is_reported(rng):
    matrix = systems.spectrum(rng, np.logspace(-4, 0, 12))
    rhs = systems.tree_like(rng.normal(size=12), "float32")
    root = jnp.asarray(systems.root_of(matrix), "float32")
    solution, info = _two_steps(root, rhs)
    assert int(info.status) == Status.MAX_STEPS
    assert int(info.num_steps) == 2
    truth = systems.true_residual(matrix, 0.0, solution, rhs)
    np.testing.assert_allclose(info.relative_residual, truth, rtol=1e-3)


def test_a_guess_is_where_lineax_starts(rng):
    matrix = systems.spectrum(rng, np.linspace(1, 2, 12))
    g = rng.normal(size=12)
    truth = systems.tree_like(np.linalg.solve(matrix, g), "float32")
    rhs = systems.tree_like(g, "float32")
    root = jnp.asarray(systems.root_of(matrix), "float32")

    @jax.jit
    def solve(guess):
        solver = Lineax(lineax.CG(1e-5, 1e-5))
        fisher = systems.fisher_of(root, rhs)
        return solver(fisher, rhs, damping=0.0, guess=guess)[0]

    guessed = solve(jax.tree.map(lambda x: x + 0.1, truth))
    error = systems.flat(guessed) - systems.flat(truth)
    assert np.abs(error).max() <= 1e-3
