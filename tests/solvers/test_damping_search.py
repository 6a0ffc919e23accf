"""DampingSearch against trials made one by one in NumPy, and what it is for.

(F + λI) v = g,    (F + λI) q = Jᵀ ∂²outputs[v, v] / N,    d = s v + ½ s² q
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from ngd_jax.solvers import DampingSearchState
from tests.fisher.test_operator import assert_close

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus
GAUSSIAN = ngd.Gaussian(event_ndims=0)


def model_fn(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def output_loss_fn(outputs, _x):
    return jnp.mean(outputs**2) / 2


def make(rng, num_examples, dtype="float64"):
    params = {"v": rng.normal(size=3), "w": rng.normal(size=(2, 3))}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    return params, jnp.asarray(rng.normal(size=(num_examples, 2)), dtype)


@functools.partial(jax.jit, static_argnames=("solver", "in_output_space"))
def search(solver, params, x, state, *, in_output_space=True):
    """The step, the report, the state, and the same as functions of a vector."""

    def loss_fn(params):
        return output_loss_fn(model_fn(params, x), x)

    fisher = ngd.linearize_fisher(model_fn, params, x, GAUSSIAN)
    cotangents = jax.grad(output_loss_fn)(fisher.outputs, x)
    return solver.solve(
        fisher,
        jax.grad(loss_fn)(params),
        damping=0.0,
        coefficients=fisher.sqrt_solve(cotangents) if in_output_space else None,
        objective=lambda d: loss_fn(jax.tree.map(jnp.subtract, params, d)),
        state=state,
    )


def trials(params, x, dampings, lengths, max_curvature):
    """Every λ and s with its step and its loss, the plain way."""
    theta, unravel = ravel_pytree(params)
    outputs_fn = jax.jit(lambda theta: model_fn(unravel(theta), x))
    outputs = np.asarray(outputs_fn(theta))
    jacobian = np.asarray(jax.jacobian(outputs_fn)(theta))
    hessian = np.asarray(jax.hessian(outputs_fn)(theta))
    count = len(outputs)
    for damping in dampings:
        matrix = jacobian.T @ jacobian / count + damping * np.eye(len(theta))
        v = np.linalg.solve(matrix, jacobian.T @ outputs / count)
        second = np.einsum("nij,i,j->n", hessian, v, v)
        q = np.linalg.solve(matrix, jacobian.T @ second / count)
        for s in lengths:
            is_small = s * np.linalg.norm(q) <= max_curvature * np.linalg.norm(v)
            d = s * v + is_small * s**2 / 2 * q
            loss = np.mean(np.asarray(outputs_fn(theta - d)) ** 2) / 2
            yield damping, d, loss


@pytest.mark.parametrize(("num_examples", "in_output_space"), [(5, True), (20, False)])
def test_the_trial_of_least_loss_and_damping_is_taken(
    num_examples, in_output_space, x64, rng
):
    solver = ngd.DampingSearch(power=0.4, slack=1.5, max_curvature=1.0)
    params, x = make(rng, num_examples)
    before = float(output_loss_fn(model_fn(params, x), x))
    for damping, lowest in ((1e-2, np.inf), (1e-4, 0.1 * before)):
        state = DampingSearchState(jnp.float64(damping), jnp.float64(lowest))
        d, info, new = search(solver, params, x, state, in_output_space=in_output_space)
        dampings = damping * np.asarray(solver.factors)
        highest = max(before, 1.5 * min(before, lowest))
        allowed = [
            trial
            for trial in trials(params, x, dampings, solver.lengths, 1.0)
            if trial[2] < highest
        ]
        best = min(allowed, key=lambda trial: trial[2] * trial[0] ** 0.4)
        np.testing.assert_allclose(new.damping, best[0], rtol=1e-12)
        assert_close(ravel_pytree(d)[0], best[1], 1e-7)
        assert int(info.num_steps) == 1
        assert int(info.status) == Status.CONVERGED
        np.testing.assert_allclose(new.lowest, min(before, lowest), rtol=1e-12)


def test_the_bent_path_keeps_to_the_line_of_the_outputs_to_third_order(rng):
    """With fewer examples than parameters, v sends the outputs straight to zero."""
    dtype = "float32"
    params, x = make(rng, 3, dtype)
    outputs = model_fn(params, x)
    apart = []
    for length in (0.4, 0.2):
        solver = ngd.DampingSearch(
            lengths=(length,), factors=(1.0, 2.0), power=1.0, max_curvature=100.0
        )
        state = DampingSearchState(jnp.asarray(1e-6, dtype), jnp.asarray(np.inf, dtype))
        d, _, new = search(solver, params, x, state)
        assert {leaf.dtype for leaf in jax.tree.leaves(d)} == {jnp.dtype(dtype)}
        np.testing.assert_allclose(new.damping, 1e-6, rtol=1e-5)
        moved = model_fn(jax.tree.map(jnp.subtract, params, d), x)
        apart.append(float(jnp.linalg.norm(moved - (1 - length) * outputs)))
    assert apart[0] / apart[1] > 5.5  # 8 in the limit, 4 for a straight step


def test_without_a_better_trial_there_is_no_step_and_the_state_stays(rng):
    params, x = make(rng, 5, "float32")
    state = DampingSearchState(jnp.float32(0.5), jnp.float32(np.inf))
    fisher = ngd.linearize_fisher(model_fn, params, x, GAUSSIAN)
    solve = functools.partial(
        ngd.DampingSearch(slack=1.0).solve,
        damping=0.0,
        objective=lambda d: 1 + optax.tree.norm(d),
        state=state,
    )
    d, info, new = jax.jit(lambda: solve(fisher, params))()
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(d))
    assert int(info.status) == Status.STAGNATED
    assert float(info.relative_residual) == 1.0
    assert float(new.damping) == 0.5

    nothing = jax.tree.map(jnp.zeros_like, params)
    _, info, _ = jax.jit(lambda: solve(fisher, nothing))()
    assert int(info.status) == Status.CONVERGED
    assert float(info.relative_residual) == 0.0

    bad = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), params)
    d, info, new = jax.jit(lambda: solve(fisher, bad))()
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(d))
    assert int(info.status) == Status.NON_FINITE
    assert float(new.damping) == 0.5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rosenbrock_is_solved_to_round_off(dtype, x64):
    """The residuals (1 - x, 100 (y - x²)) of a narrow bent valley, from (-1.9, 2)."""

    def residuals(params, which):
        first, second = 1 - params[0], 100 * (params[1] - params[0] ** 2)
        return jnp.where(which == 0, first, second)

    which = jnp.arange(2)
    tx = ngd.natural_gradient(
        1.0,
        residuals,
        GAUSSIAN,
        damping=0.0,
        solver=ngd.DampingSearch(),
        output_loss_fn=output_loss_fn,
    )

    @jax.jit
    def run(params):
        def step(_, carry):
            params, state = carry
            grads = jax.grad(lambda p: output_loss_fn(residuals(p, which), which))(
                params
            )
            updates, state = tx.update(grads, state, params, batch=which)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 40, step, (params, tx.init(params)))

    params, state = run(jnp.asarray([-1.9, 2.0], dtype))
    np.testing.assert_allclose(params, 1.0, rtol=100 * float(jnp.finfo(dtype).eps))
    assert optax.tree.get(state, "DampingSearchState") is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": -1.0}, "`power` must be at least 0"),
        ({"slack": 0.5}, "`slack` must be at least 1"),
        ({"lengths": ()}, "`lengths` must be positive"),
        ({"factors": (1.0, 0.1)}, "`factors` must rise"),
        ({"factors": (0.1, 1.0)}, "`factors` must rise"),
        ({"max_curvature": np.inf}, "`max_curvature` must be at least 0"),
        ({"initial": 0.0}, "`initial` must be positive"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ngd.DampingSearch(**options)


def test_a_search_without_a_loss_is_refused(rng):
    params, x = make(rng, 3, "float32")
    fisher = ngd.linearize_fisher(model_fn, params, x, GAUSSIAN)
    with pytest.raises(ValueError, match="DampingSearch needs the loss"):
        ngd.DampingSearch()(fisher, params, damping=0.0)
