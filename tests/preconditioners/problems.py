"""Matrices and a small classifier, whose preconditioners are tested."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from tests import reference
from tests.solvers import systems

__all__ = ["KEY", "Matrix", "dense", "linearize", "matrix_of", "network_problem"]

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Matrix(systems.Matrix):
    """With what the preconditioners ask for besides."""

    @property
    def params(self):
        return self.like


def matrix_of(values, dtype="float64"):
    values = jnp.asarray(values, dtype)
    return Matrix(values, systems.tree_like(np.zeros(len(values)), dtype))


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


def dense(matvec, like):
    """The matrix of a map on trees, float64."""
    flat, unravel = ravel_pytree(like)
    rows = jax.vmap(lambda row: ravel_pytree(matvec(unravel(row)))[0])(
        jnp.eye(flat.size, dtype=flat.dtype)
    )
    return np.asarray(rows, float)
