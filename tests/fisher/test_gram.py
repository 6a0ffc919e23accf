"""The Gram matrix of the samples against rows that are made one by one with NumPy."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax.fisher.coefficients import ravel_real
from tests import reference
from tests.fisher.cases import CASES
from tests.fisher.test_operator import assert_close, random_like

pytestmark = pytest.mark.usefixtures("strict_ranks")
# All that have rows: the blocks of "product" share one leaf of the batch, of which one
# takes a part.
SEPARABLE = {name: case for name, case in CASES.items() if name != "product"}


def dense_root(model_fn, params, batch, likelihood, **options):
    """A, `[M, P]`, column by column; with complex parameters as two real ones each."""
    flat, unravel = ravel_real(params)

    def coefficients(vector):
        fisher = ngd.linearize_fisher(model_fn, params, batch, likelihood, **options)
        return ravel_real(fisher.sqrt_matvec(unravel(vector)))[0]

    return jax.vmap(coefficients)(jnp.eye(flat.size, dtype=flat.dtype)).T


def check_gram(model_fn, params, batch, likelihood, blocks=(None, 3), **options):
    @jax.jit
    def both(params):
        fisher = ngd.linearize_fisher(model_fn, params, batch, likelihood, **options)
        root = dense_root(model_fn, params, batch, likelihood, **options)
        return [fisher.gram(block) for block in blocks], root

    grams, root = both(params)
    root = np.asarray(root)
    for gram in grams:
        assert_close(gram.matrix, root @ root.T, 1e-12)
        assert bool(gram.is_separable)
    return root


@pytest.mark.parametrize("case", SEPARABLE.values(), ids=SEPARABLE)
def test_gram_is_that_of_the_square_root_for_every_likelihood(case, x64, rng):
    params, x = case.make(rng, "float64")
    root = check_gram(case.model_fn, params, x, case.likelihood)
    # And the square root is one of the Fisher known from NumPy.
    truth = case.true_fisher(*reference.jacobian(case.model_fn, params, x))
    if not case.complex_params:
        assert_close(root.T @ root, truth, 1e-12)


@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_gram_of_the_other_kinds_has_one_row_for_each_example(kind, x64, rng):
    case = CASES["categorical"]
    params, x = case.make(rng, "float64")
    options = (
        {"key": jax.random.key(1)}
        if kind == "sampled"
        else {"targets": jnp.asarray(rng.integers(3, size=7))}
    )
    root = check_gram(case.model_fn, params, x, case.likelihood, kind=kind, **options)
    assert root.shape[0] == 7


@pytest.mark.parametrize("name", ["categorical", "log density", "complex amplitude"])
def test_gram_has_weights_and_microbatches(name, x64, rng):
    case = CASES[name]
    params, x = case.make(rng, "float64")
    weights = jnp.asarray([1.0, 0.0, 3.0, 0.2, 0.0, 1e-6, 1.0])
    check_gram(
        case.model_fn,
        params,
        x,
        case.likelihood,
        blocks=(None, 3),
        weights=weights,
        microbatch_size=2,
    )


# --- Blocks with batches of their own, as residuals inside and on the boundary.

RESIDUALS = ngd.Product(
    {"boundary": ngd.Gaussian(), "interior": ngd.Gaussian(scale=0.5)},
    weights={"boundary": 10.0, "interior": 1.0},
)


def residuals(params, batch):
    """The network at the boundary, and its derivative along a flow in the interior."""
    interior = batch["interior"]
    flow = jnp.ones_like(interior) * batch["speed"]
    return {
        "boundary": reference.network(params, batch["boundary"]),
        "interior": jax.jvp(
            lambda x: reference.network(params, x), (interior,), (flow,)
        )[1],
    }


def residual_case(rng, num_interior=7, num_boundary=4, num_hidden=6):
    params = reference.network_params(rng, 1, num_hidden=num_hidden, dtype="float64")
    batch = {
        "interior": jnp.asarray(rng.normal(size=(num_interior, 2))),
        "boundary": jnp.asarray(rng.normal(size=(num_boundary, 2))),
        "speed": jnp.asarray(0.3),
    }
    return params, batch


@pytest.mark.parametrize(("interior", "boundary"), [(7, 4), (5, 1)])
def test_blocks_of_residuals_have_batches_of_their_own(interior, boundary, x64, rng):
    params, batch = residual_case(rng, interior, boundary)
    root = check_gram(residuals, params, batch, RESIDUALS)
    _, jacobian = reference.jacobian(residuals, params, batch)
    rows = jacobian["interior"][:, 0], jacobian["boundary"][:, 0]
    truth = 4 * rows[0].T @ rows[0] / interior + 10 * rows[1].T @ rows[1] / boundary
    assert_close(root.T @ root, truth, 1e-12)
    diagonal = jax.jit(lambda p: ngd.fisher_diagonal(residuals, p, batch, RESIDUALS))(
        params
    )
    assert_close(diagonal, np.diag(truth), 1e-12)


def test_gram_is_in_the_coordinates_of_the_fisher(x64, rng):
    case = CASES["gaussian"]
    params, x = case.make(rng, "float64")
    factors = random_like(params, rng)

    @jax.jit
    def both(params):
        fisher = ngd.linearize_fisher(case.model_fn, params, x, case.likelihood)
        scaled = fisher.in_coordinates(
            lambda v: jax.tree.map(lambda a, b: a * b, factors, v)
        )
        root = dense_root(case.model_fn, params, x, case.likelihood)
        return scaled.gram(3).matrix, root

    gram, root = both(params)
    root = np.asarray(root) * reference.flat(factors)
    assert_close(gram, root @ root.T, 1e-12)


@pytest.mark.parametrize(
    ("num_examples", "block_size"), [(1, 4), (2, 1), (7, 3), (8, 4), (9, 8), (9, 9)]
)
def test_blocks_of_every_size_give_the_same(num_examples, block_size, rng):
    x = jnp.asarray(rng.normal(size=(num_examples, 3)), jnp.float32)

    @jax.jit
    def gram(x):
        fisher = ngd.linearize_fisher(
            lambda w, x: x @ w, jnp.ones((3, 2)), x, ngd.Gaussian()
        )
        return fisher.gram(block_size).matrix

    expected = np.kron(np.asarray(x) @ np.asarray(x).T, np.eye(2)) / num_examples
    np.testing.assert_allclose(gram(x), expected, atol=2e-6 * np.abs(expected).max())


# --- Models that mix examples, or cannot be run on one.


def test_models_that_mix_examples_are_found_out(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def is_separable(model_fn, params, block_size):
        fisher = ngd.linearize_fisher(model_fn, params, x, case.likelihood)
        return fisher.gram(block_size).is_separable

    for block_size in (None, 3):
        assert is_separable(reference.network, params, block_size)
        assert not is_separable(reference.batch_norm_network, params, block_size)


def test_batches_without_examples_raise(rng):
    def model_fn(params, scale):
        points = scale * jnp.linspace(-1.0, 1.0, 5)[:, None]
        return jnp.sin(points * params[None])

    fisher = ngd.linearize_fisher(model_fn, jnp.ones(2), 2.0, ngd.Gaussian())
    with pytest.raises(ValueError, match="leading axis of length 5"):
        fisher.gram()


def test_models_that_fail_on_one_example_raise(rng):
    def pairs(w, x):
        return x.reshape(-1, 2, 3).sum(1).repeat(2, axis=0) @ w

    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    fisher = ngd.linearize_fisher(pairs, jnp.ones((3, 1)), x, ngd.Gaussian())
    with pytest.raises(ValueError, match="fails on a batch of one example of 4"):
        fisher.gram()

    def differences(w, x):
        return jnp.concatenate([x[:1], x]) @ w

    x = jnp.ones((4, 3))
    likelihood = ngd.Product({"a": ngd.Gaussian(), "b": ngd.Gaussian()})
    fisher = ngd.linearize_fisher(
        lambda w, x: {"a": x @ w, "b": differences(w, x[1:])},
        jnp.ones((3, 1)),
        x,
        likelihood,
    )
    with pytest.raises(ValueError, match="outputs of shapes"):
        fisher.gram()


@pytest.mark.parametrize(
    ("block_size", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_block_sizes_that_cannot_be_raise(block_size, error):
    fisher = ngd.linearize_fisher(
        lambda w, x: x @ w, jnp.ones((3, 1)), jnp.ones((2, 3)), ngd.Gaussian()
    )
    with pytest.raises(error, match="`block_size` must be"):
        unwrapped_gram(fisher, block_size)


def unwrapped_gram(fisher, block_size):
    """Without the run-time types, so that our own error is seen."""
    from ngd_jax.fisher import gram

    return inspect.unwrap(gram.gram_matrix)(fisher, block_size)
