"""Where LSMR is needed: a physics-informed network, and powers of x, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd

pytestmark = pytest.mark.usefixtures("strict_ranks")
EPS = float(np.finfo(np.float32).eps)


def relative_error(x, expected):
    return np.linalg.norm(x - expected) / np.linalg.norm(expected)


def _solution(params, x):
    for weights, bias in params["hidden"]:
        x = jnp.tanh(x @ weights + bias)
    return x @ params["out"]


def _residuals(params, batch):
    """Δu + f inside of the unit square, and u on its edge."""

    def laplacian(x):
        return jnp.trace(jax.hessian(functools.partial(_solution, params))(x))

    inside = jax.vmap(laplacian)(batch["inside"]) + batch["force"]
    edge = jax.vmap(functools.partial(_solution, params))(batch["edge"])
    return {"inside": inside, "edge": edge}


def _poisson_problem(rng, hidden=12, num_inside=60, num_edge=24):
    def draw(*shape):
        return rng.normal(size=shape) / np.sqrt(shape[0])

    params = {
        "hidden": [
            (2 * draw(2, hidden), draw(hidden)),
            (draw(hidden, hidden), draw(hidden)),
        ],
        "out": draw(hidden),
    }
    inside = rng.uniform(size=(num_inside, 2))
    along, side = rng.uniform(size=num_edge), np.arange(num_edge) % 4
    across = (side % 2).astype(float)
    edge = np.where(
        side[:, None] < 2,
        np.stack([along, across], 1),
        np.stack([across, along], 1),
    )
    force = 2 * np.pi**2 * np.prod(np.sin(np.pi * inside), axis=1)
    batch = {"inside": inside, "edge": edge, "force": force}
    return jax.tree.map(np.float32, (params, batch))


def _energy(outputs):
    return sum(jnp.mean(block**2) / 2 for block in outputs.values())


_LIKELIHOOD = ngd.Product(
    {name: ngd.Gaussian(event_ndims=0) for name in ("inside", "edge")}
)


def _linearized(params, batch):
    fisher = ngd.linearize_fisher(_residuals, params, batch, _LIKELIHOOD)
    cotangents = jax.grad(_energy)(fisher.outputs)
    return fisher, fisher.pullback(cotangents), fisher.sqrt_solve(cotangents)


def _true_root(params, batch):
    """A and w in float64."""
    with jax.enable_x64(True):
        params, batch = jax.tree.map(lambda x: jnp.asarray(x, float), (params, batch))
        flat, unravel = ravel_pytree(params)

        @jax.jit
        def dense(flat):
            fisher, _, w = _linearized(unravel(flat), batch)
            columns = jax.vmap(
                lambda v: ravel_pytree(fisher.sqrt_matvec(unravel(v)))[0]
            )(jnp.eye(flat.size))
            return columns.T, ravel_pytree(w)[0]

        return jax.tree.map(np.asarray, dense(flat))


@pytest.mark.long
def test_a_physics_informed_network_is_solved_where_cg_is_not(rng):
    params, batch = _poisson_problem(rng)
    root, w = _true_root(params, batch)
    u, values, vt = np.linalg.svd(root, full_matrices=False)
    assert values[0] / values[-1] >= 1e6  # so the condition number of F is 1e12

    @functools.partial(jax.jit, static_argnames="solver")
    def run(damping, solver):
        fisher, g, w = _linearized(params, batch)
        rhs = ngd.RightHandSide(g, coefficients=w)
        solution = ngd.solve_scaled(solver, fisher, rhs, damping=damping)
        return ravel_pytree(solution.direction)[0], solution.info

    for relative_damping in (1e-8, 1e-10):
        damping = np.float32(relative_damping * values[0] ** 2)
        expected = vt.T @ (values / (values**2 + float(damping)) * (u.T @ w))
        # The condition numbers of [A; √λ I], and of F + λI, times ε.
        condition = relative_damping**-0.5
        d, info = run(damping, ngd.LSMR(max_steps=100, rtol=0.0))
        assert relative_error(np.asarray(d, float), expected) <= 10 * condition * EPS
        assert int(info.num_steps) <= 84  # the rows of A
        assert condition**2 * EPS >= 1
        d, _ = run(damping, ngd.CG(max_steps=400, rtol=0.0))
        assert relative_error(np.asarray(d, float), expected) >= 30 * condition * EPS


def test_the_transformation_hands_over_the_coefficients(rng):
    # Powers of x on [0, 1]: the condition number of A is 3e5, that of F 1e11.
    x = np.linspace(0, 1, 40)
    root = np.float32(x[:, None] ** np.arange(9)) / np.sqrt(40)
    targets = np.float32(rng.normal(size=9) @ root.T * np.sqrt(40))
    batch = jnp.asarray(root * np.sqrt(40), jnp.float32)
    condition = np.linalg.cond(root)
    assert condition**2 * EPS >= 1e3
    tx = ngd.natural_gradient(
        1.0,
        lambda params, batch: batch @ params,
        ngd.Gaussian(event_ndims=0),
        damping=0.0,
        solver=ngd.LSMR(max_steps=20, rtol=0.0),
        loss_fn=lambda outputs, _: jnp.mean((outputs - targets) ** 2) / 2,
    )

    @jax.jit
    def step(params):
        grads = jax.grad(lambda p: jnp.mean((batch @ p - targets) ** 2) / 2)(params)
        return tx.update(grads, tx.init(params), params, batch=batch)

    updates, _ = step(jnp.zeros(9, jnp.float32))
    expected = np.linalg.lstsq(np.asarray(batch, float), targets.astype(float))[0]
    assert relative_error(np.asarray(updates, float), expected) <= condition * EPS
