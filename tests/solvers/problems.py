"""A small classifier, and matrices, whose preconditioners are tested."""

import jax
import jax.numpy as jnp
import numpy as np

import ngd_jax as ngd
from tests import reference
from tests.solvers import systems

__all__ = ["KEY", "linearize", "matrix_of", "network_problem"]

KEY = jax.random.key(0)


def matrix_of(root, dtype="float64"):
    """The Fisher RᵀR, on parameters in two leaves."""
    root = jnp.asarray(root, dtype)
    return systems.fisher_of(root, systems.tree_like(np.zeros(root.shape[1]), dtype))


def network_problem(rng, dtype="float64"):
    """A small classifier, and its Fisher by NumPy."""
    params = reference.network_params(rng, 3, dtype=dtype)
    x = jnp.asarray(rng.normal(size=(9, 2)), dtype)
    outputs, jacobian = reference.jacobian(reference.network, params, x)
    fisher = reference.fisher_of(
        reference.categorical_metric(outputs), jacobian, np.full(9, 1 / 9)
    )
    return params, x, fisher


def linearize(params, x, **options):
    return ngd.linearize_fisher(
        reference.network, params, x, ngd.Categorical(), **options
    )
