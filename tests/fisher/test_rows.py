"""The diagonal, from rows where examples are separable and right where they are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from tests import reference
from tests.fisher.cases import CASES
from tests.fisher.test_operator import assert_close


def test_models_that_mix_examples_have_the_right_diagonal_and_matrix(x64, rng):
    case = CASES["categorical"]
    params, x = case.make(rng, "float64")
    outputs, jacobian = reference.jacobian(reference.batch_norm_network, params, x)
    truth = case.true_fisher(outputs, jacobian)

    @jax.jit
    def both(params):
        fisher = ngd.linearize_fisher(
            reference.batch_norm_network, params, x, case.likelihood
        )
        return fisher.dense(), fisher.diagonal()

    dense, diagonal = both(params)
    assert_close(dense, truth, 1e-12)
    assert_close(diagonal, np.diag(truth), 1e-12)


def test_models_without_a_batch_of_examples_have_the_right_diagonal(x64):
    # The batch is a number of points to lay out: nothing to run single examples on.
    def model_fn(params, scale):
        points = scale * jnp.linspace(-1.0, 1.0, 5)[:, None]
        return jnp.sin(points * params[None])

    params = jnp.array([0.3, -1.2])
    truth = np.asarray(ngd.dense_fisher(model_fn, params, 2.0, ngd.Gaussian()))
    rows = np.asarray(jax.jacfwd(model_fn)(params, 2.0))
    np.testing.assert_allclose(
        truth, np.einsum("nkp,nkq->pq", rows, rows) / 5, rtol=1e-12
    )
    diagonal = ngd.fisher_diagonal(model_fn, params, 2.0, ngd.Gaussian())
    np.testing.assert_allclose(diagonal, np.diag(truth), rtol=1e-12)


@pytest.mark.parametrize("num_examples", [1, 16, 37])
@pytest.mark.parametrize("microbatch_size", [None, 5])
def test_diagonal_is_right_for_every_number_of_examples(
    num_examples, microbatch_size, rng
):
    x = jnp.asarray(rng.normal(size=(num_examples, 3)), jnp.float32)
    diagonal = ngd.fisher_diagonal(
        lambda w, x: x @ w,
        jnp.ones((3, 2)),
        x,
        ngd.Gaussian(),
        microbatch_size=microbatch_size,
    )
    squares = np.mean(np.asarray(x, float) ** 2, axis=0)
    np.testing.assert_allclose(diagonal, np.repeat(squares, 2), rtol=1e-5)
