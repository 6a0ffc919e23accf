"""A small network with its batch, gradient and step, for all tests of the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from tests import reference

NUM_EXAMPLES = 12


def make_problem(num_outputs=3, dtype=jnp.float32, seed=0):
    """Parameters and a batch for `model_fn`, and labels to go with them."""
    rng = np.random.default_rng(seed)
    params = reference.network_params(rng, num_outputs, dtype=dtype)
    x = jnp.asarray(rng.normal(size=(NUM_EXAMPLES, 2)), dtype)
    labels = jnp.asarray(rng.integers(0, num_outputs, NUM_EXAMPLES))
    return params, {"x": x, "y": labels}


def model_fn(params, batch):
    return reference.network(params, batch["x"])


def loss_fn(params, batch):
    logits = model_fn(params, batch).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean()


def wide_loss_fn(params, batch):
    logits = model_fn(params, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean()


grad_fn = jax.jit(jax.grad(wide_loss_fn))


@jax.jit
def kl_fn(params, moved, batch):
    return ngd.mean_kl(model_fn, params, moved, batch, ngd.Categorical())


def step_of(tx, params, batch, *, state=None, grads=None):
    """One jitted update from `state`, or from the start."""
    state = tx.init(params) if state is None else state
    grads = grad_fn(params, batch) if grads is None else grads
    return jax.jit(tx.update)(grads, state, params, batch=batch)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def dense_fisher(params, batch):
    """F of the categorical network, by enumeration."""
    logits, rows = reference.jacobian(model_fn, params, batch)
    measure = reference.normalised(None, logits.shape[:-1])
    return reference.fisher_of(reference.categorical_metric(logits), rows, measure)


def damped_solve(fisher, gradient, damping):
    return np.linalg.solve(fisher + damping * np.eye(len(gradient)), gradient)


def loss_of_outputs(outputs, batch):
    """The loss as a function of the outputs."""
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"])
    return losses.mean()


def assert_same(actual, expected, rtol=0.0, atol=0.0):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol, atol), actual, expected
    )
