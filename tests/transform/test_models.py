"""Every likelihood through the whole step, and what must not depend on the model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from tests.transform.problems import make_problem, model_fn

LIKELIHOODS = {
    "bernoulli": (ngd.Bernoulli(), lambda z: z),
    "gaussian": (ngd.Gaussian(scale=0.5), lambda z: z),
    "diagonal gaussian": (
        ngd.DiagonalGaussian(),
        lambda z: {"mean": z[:, :1], "log_scale": z[:, 1:2]},
    ),
    "poisson": (ngd.Poisson(), lambda z: z),
    "product": (
        ngd.Product({"a": ngd.Categorical(), "b": ngd.Gaussian()}),
        lambda z: {"a": z[:, :2], "b": z[:, 2:]},
    ),
    "log density": (ngd.LogDensity(), lambda z: z[:, 0]),
    "log amplitude": (ngd.LogAmplitude(), lambda z: z[:, 0]),
    "from kl": (ngd.FromKL(ngd.Categorical().kl), lambda z: z),
}


@pytest.mark.long
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_goes_to_its_radius(name):
    likelihood, outputs_fn = LIKELIHOODS[name]
    params, batch = make_problem()

    def any_fn(params, batch):
        return outputs_fn(model_fn(params, batch))

    # A gradient in the range of F: along others, KL does not know how far it is.
    rng = np.random.default_rng(3)
    vector = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
    tx = ngd.natural_gradient(None, any_fn, likelihood, max_kl=1e-3, solver=ngd.CG(20))

    @jax.jit
    def step(params):
        grads = ngd.fisher_vector_product(any_fn, params, batch, likelihood, vector)
        return tx.update(grads, tx.init(params), params, batch=batch)

    updates, state = step(params)
    moved = optax.apply_updates(params, updates)
    kl = jax.jit(lambda moved: ngd.mean_kl(any_fn, params, moved, batch, likelihood))(
        moved
    )
    assert state.info.status == ngd.StepStatus.TAKEN
    assert 0.9e-3 <= kl <= 1.01e-3
    np.testing.assert_allclose(state.info.predicted_kl, kl, rtol=0.5)


# --- Invariance (Amari 1998): sigmoid units are tanh units in other coordinates.


def sigmoid_fn(params, batch):
    hidden = jax.nn.sigmoid(batch["x"] @ params["w"] + params["b"])
    return hidden @ params["v"] + params["c"]


def tanh_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"])
    return hidden @ params["v"] + params["c"]


@pytest.mark.long
def test_natural_gradient_does_not_care_for_sigmoid_or_tanh(x64):
    rng = np.random.default_rng(4)
    shapes = {"w": (2, 3), "b": (3,), "v": (3, 1), "c": (1,)}
    teacher = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    teacher["w"] *= 2.0  # units that differ, so that F is far from singular
    batch = {"x": jnp.asarray(rng.normal(size=(400, 2)))}
    targets = sigmoid_fn(teacher, batch)
    start = {
        k: v + 0.3 * jnp.asarray(rng.normal(size=v.shape)) for k, v in teacher.items()
    }
    # σ(x) = ½ (1 + tanh(x/2))
    mapped = {
        "w": start["w"] / 2,
        "b": start["b"] / 2,
        "v": start["v"] / 2,
        "c": start["c"] + start["v"].sum(0) / 2,
    }

    def outputs_after(make, fn, params):
        tx = make(fn)

        def squares(params):
            return jnp.mean((fn(params, batch) - targets) ** 2) / 2

        @jax.jit
        def train(params):
            def step(carry, _):
                params, state = carry
                updates, state = tx.update(
                    jax.grad(squares)(params), state, params, batch=batch
                )
                return (optax.apply_updates(params, updates), state), None

            carry = (params, tx.init(params))
            (params, _), _ = jax.lax.scan(step, carry, length=50)
            return fn(params, batch)

        return np.asarray(train(params))

    def natural(fn):
        return ngd.natural_gradient(
            1.0, fn, ngd.Gaussian(), damping=0.0, solver=ngd.Cholesky()
        )

    def plain(_fn):
        return optax.with_extra_args_support(optax.sgd(1.0))

    def difference(make):
        one = outputs_after(make, sigmoid_fn, start)
        return np.max(np.abs(one - outputs_after(make, tanh_fn, mapped)))

    assert difference(natural) < 1e-13
    assert difference(plain) > 0.1
