"""The diagonal as a preconditioner: its formula, its estimates, and CG with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from ngd_jax import dense
from ngd_jax.contrib.jacobi import Jacobi
from tests import reference
from tests.solvers import systems
from tests.solvers.problems import (
    KEY,
    linearize,
    matrix_of,
    network_problem,
)

pytestmark = pytest.mark.usefixtures("strict_ranks")


@pytest.mark.parametrize("power", [1.0, 0.75])
def test_jacobi_is_the_formula(dtype, power, rng):
    params, x, truth = network_problem(rng, dtype)
    diagonal = np.diag(truth) + 0.1
    inverse = (diagonal / diagonal.max()) ** -power

    @jax.jit
    def apply(params):
        return Jacobi(power=power)(linearize(params, x), 0.1)(params)

    rtol = 1e-4 if dtype == "float32" else 1e-10
    expected = inverse * reference.flat(params)
    np.testing.assert_allclose(reference.flat(apply(params)), expected, rtol=rtol)


def _diagonal(jacobi, fisher):
    return jacobi.prepare(fisher, jacobi.init(fisher.params), 0.1)[1].diagonal


@functools.partial(jax.jit, static_argnames=("num_probes", "options"))
def estimates(params, x, keys, num_probes, options=()):
    def one(key):
        fisher = linearize(params, x, **dict(options))
        jacobi = Jacobi(num_probes=num_probes, key=key)
        return ravel_pytree(_diagonal(jacobi, fisher))[0]

    return jax.vmap(one)(keys)


@pytest.mark.parametrize("options", [(), (("microbatch_size", 4),)])
def test_probes_estimate_the_diagonal_within_their_variance(options, rng, x64):
    params, x, truth = network_problem(rng)
    drawn = estimates(params, x, jax.random.split(KEY, 400), 5, options)
    drawn, diagonal = np.asarray(drawn), np.diag(truth)
    assert (drawn >= 0).all()
    # Var = 2 (Fᵢᵢ² - Σₖ aₖᵢ⁴) for one probe.
    deviation = np.sqrt(2 / 5) * diagonal
    assert (drawn.std(0) <= 1.3 * deviation + 1e-15).all()
    error = np.abs(drawn.mean(0) - diagonal)
    assert (error <= 5 * deviation / np.sqrt(400) + 1e-15).all()


@pytest.mark.long
def test_probes_of_a_sampled_fisher_estimate_its_own_diagonal(rng, x64):
    params, x, _ = network_problem(rng)
    options = (("kind", "sampled"), ("key", jax.random.key(3)))
    fisher = linearize(params, x, **dict(options))
    jacobi = Jacobi(num_probes=2000, key=KEY)
    diagonal = jax.jit(lambda: _diagonal(jacobi, fisher))()
    np.testing.assert_allclose(
        reference.flat(diagonal), dense.diagonal(fisher), rtol=0.2, atol=1e-12
    )


def test_a_parameter_that_nothing_depends_on_is_harmless_without_damping():
    fisher = matrix_of(np.diag([2.0, 1.0, 0.0, 0.0]), "float32")
    precondition = Jacobi(power=1.0)(fisher, 0.0)
    inverse = systems.flat(precondition(systems.tree_like(np.ones(4), "float32")))
    assert np.isfinite(inverse).all()
    np.testing.assert_allclose(inverse[:2], [1.0, 4.0])
    zero = Jacobi()(matrix_of(np.zeros((2, 2)), "float32"), 0.0)
    assert np.isfinite(systems.flat(zero(systems.tree_like([1.0, 2.0], "f4")))).all()


def test_cg_with_jacobi_takes_the_textbook_iterates(rng, x64):
    matrix = systems.spectrum(rng, np.logspace(-2, 1, 14))
    scale = np.logspace(0, 2, 14)
    matrix = scale[:, None] * matrix * scale
    rhs, damping, root = rng.normal(size=14), 0.3, systems.root_of(matrix)
    system, inverse = matrix + damping * np.eye(14), 1 / (np.diag(matrix) + damping)

    x, r = np.zeros(14), rhs.copy()
    p = z = inverse * r
    for steps in range(1, 9):
        alpha = (r @ z) / (p @ system @ p)
        x, r_next = x + alpha * p, r - alpha * system @ p
        z_next = inverse * r_next
        p = z_next + (r_next @ z_next) / (r @ z) * p
        r, z = r_next, z_next
        if steps not in (1, 8):
            continue
        solver = ngd.CG(steps, rtol=0.0, preconditioner=Jacobi(power=1.0))
        ours, _ = jax.jit(
            lambda root, rhs, solver=solver: solver(
                matrix_of(root), rhs, damping=damping
            )
        )(jnp.asarray(root), systems.tree_like(rhs, "float64"))
        np.testing.assert_allclose(systems.flat(ours), x, rtol=1e-7, atol=1e-12)
