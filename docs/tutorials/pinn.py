"""Your PINN in 30 lines: from Adam to a solution that is right to eight digits.

You have a network, a residual and a loss. Three things change:

1. the residuals, not the loss, are the outputs of the model: a dict of blocks;
2. a `Product` of `Gaussian`s says that they are residuals, and how much each weighs;
3. `ngd.natural_gradient` takes the place of `optax.adam`.

    python docs/tutorials/pinn.py              # 120 steps, some seconds
    python docs/tutorials/pinn.py --quick      # what the tests run

The equation: -Δu = 2π² sin(πx) sin(πy) on the unit square, u = 0 on its boundary.
"""

import os
import sys

# The matrices are small: one thread of LAPACK is faster than several.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import optax

import ngd_jax as ngd

jax.config.update("jax_enable_x64", True)  # eight digits need more than float32


# --- What you have: a network, an equation, points.


def network(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def residual(params, x):
    laplacian = jnp.trace(jax.hessian(network, argnums=1)(params, x))
    return laplacian + 2 * jnp.pi**2 * jnp.sin(jnp.pi * x[0]) * jnp.sin(jnp.pi * x[1])


def make_points(side):
    t = jnp.linspace(0.0, 1.0, side)
    grid = jnp.stack(jnp.meshgrid(t, t), -1).reshape(-1, 2)
    is_inside = jnp.all((grid > 0) & (grid < 1), axis=1)
    return {"inside": grid[is_inside], "edge": grid[~is_inside]}


def init(key, width):
    keys = jax.random.split(key, 3)
    return {
        "w1": 0.1 * jax.random.normal(keys[0], (2, width)),
        "b1": 0.1 * jax.random.normal(keys[1], (width,)),
        "w2": 0.1 * jax.random.normal(keys[2], (width,)),
        "b2": jnp.zeros(()),
    }


# --- What is new: residuals as outputs, and a likelihood for them.


def model_fn(params, points):
    return {
        "inside": jax.vmap(residual, in_axes=(None, 0))(params, points["inside"]),
        "edge": network(params, points["edge"]),
    }


weights = {"inside": 1.0, "edge": 4.0}
likelihood = ngd.Product(
    {name: ngd.Gaussian(event_ndims=0) for name in weights}, weights=weights
)


def output_loss_fn(outputs, _points):
    squares = [w * jnp.mean(outputs[name] ** 2) for name, w in weights.items()]
    return jnp.sum(jnp.stack(squares)) / 2


tx = ngd.natural_gradient(
    1.0,
    model_fn,
    likelihood,
    damping=0.0,  # the least; how much, each step finds by the loss itself
    solver=ngd.contrib.DampingSearch(),  # without squaring the condition number
    loss_fn=output_loss_fn,  # the gradient where it still has its digits
)


# --- The training step is that of any optimizer of Optax, with `batch`.


@jax.jit
def train_step(params, opt_state, points):
    def loss_fn(params):
        return output_loss_fn(model_fn(params, points), points)

    value, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params, batch=points, value=value)
    return optax.apply_updates(params, updates), opt_state, value


def main(quick=False):
    """Returns the L2 error of the solution that was found."""
    points = make_points(16 if quick else 30)
    params = init(jax.random.key(0), width=32)
    opt_state = tx.init(params)
    for step in range(1, 121):
        params, opt_state, value = train_step(params, opt_state, points)
        if step % 20 == 0:
            print(f"step {step:4d}   loss {float(value):.1e}")

    test = make_points(100)["inside"]
    exact = jnp.prod(jnp.sin(jnp.pi * test), axis=1)
    error = float(jnp.sqrt(jnp.mean((network(params, test) - exact) ** 2)))
    print(f"L2 error {error:.1e} (the solution has an L2 norm of 0.5)")
    return error


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
