"""Dense forms against NumPy and against columns of the operator, whatever the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax import dense
from ngd_jax.coordinates import ravel_real
from ngd_jax.gram import gram as gram_matrix
from tests import dense_models, reference
from tests.conftest import unchecked
from tests.fisher_cases import CASES, assert_close, random_like
from tests.marks import float64_is_long, long_unless

pytestmark = pytest.mark.usefixtures("strict_ranks")
# The blocks of "product" share one leaf of the batch, of which one takes a part: it is
# right, but not made of rows.
SEPARABLE = {name: case for name, case in CASES.items() if name != "product"}
# The others differ in likelihoods and rows, which have tests of their own.
QUICK = {"categorical", "categorical over tokens", "holomorphic amplitude", "product"}
every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if name in QUICK else pytest.mark.slow, id=name)
        for name, case in CASES.items()
    ],
)


def columns(model_fn, params, batch, likelihood, **options):
    """A, `[M, P]`, in real coordinates: a product with each unit vector."""
    flat, unravel = ravel_real(params)

    @jax.jit
    def all_columns(params):
        fisher = ngd.linearize_fisher(model_fn, params, batch, likelihood, **options)
        return jax.lax.map(
            lambda v: ravel_real(fisher.sqrt_matvec(unravel(v)))[0],
            jnp.eye(flat.size, dtype=flat.dtype),
        )

    return np.asarray(all_columns(params)).T


def forms(model_fn, params, batch, likelihood, *, grams=(), **options):
    """Root, matrix, diagonal, and the Gram matrix for every block size."""

    @jax.jit
    def all_forms(params):
        fisher = ngd.linearize_fisher(model_fn, params, batch, likelihood, **options)
        return (
            dense.dense_root(fisher),
            dense.dense(fisher),
            dense.diagonal(fisher),
            [gram_matrix(fisher, block) for block in grams],
        )

    return jax.tree.map(np.asarray, all_forms(params))


def check(
    model_fn, params, batch, likelihood, grams=(None, 3), tolerance=1e-12, **options
):
    truth = columns(model_fn, params, batch, likelihood, **options)
    root, matrix, diagonal, found = forms(
        model_fn, params, batch, likelihood, grams=grams, **options
    )
    assert_close(root, truth, tolerance)
    assert_close(matrix, truth.T @ truth, tolerance)
    assert_close(diagonal, np.sum(truth**2, axis=0), tolerance)
    for gram in found:
        assert_close(gram, truth @ truth.T, tolerance)
    return truth


def from_rows(monkeypatch):
    """Breaks the general routes, so that only rows can give the right result."""
    general = dense._map_basis
    monkeypatch.setattr(
        dense, "_map_basis", lambda *args: jnp.nan * jnp.ones_like(general(*args))
    )


# --- Against the truth.


@pytest.mark.long
@every_case
def test_forms_equal_columns_of_the_operator(case, x64, rng):
    params, x = case.make(rng, "float64")
    grams = (None, 3) if case.batch_shape and case is not CASES["product"] else ()
    root = check(case.model_fn, params, x, case.likelihood, grams)
    # And the square root is one of the Fisher known from NumPy.
    truth = case.true_fisher(*reference.jacobian(case.model_fn, params, x))
    if not case.complex_params:
        assert_close(root.T @ root, truth, 1e-12)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("log density", marks=pytest.mark.long),
        pytest.param("categorical", marks=pytest.mark.slow),
        pytest.param("gaussian scalar", marks=pytest.mark.slow),
    ],
)
def test_forms_are_made_of_rows_where_the_model_does_not_mix(
    name, x64, rng, monkeypatch
):
    case = CASES[name]
    params, x = case.make(rng, "float64")
    truth = columns(case.model_fn, params, x, case.likelihood)
    from_rows(monkeypatch)
    root, matrix, diagonal, _ = forms(case.model_fn, params, x, case.likelihood)
    assert_close(root, truth, 1e-12)
    assert_close(matrix, truth.T @ truth, 1e-12)
    assert_close(diagonal, np.sum(truth**2, axis=0), 1e-12)


def test_functions_equal_the_definition_in_float32(rng):
    case = CASES["product"]
    params, x = case.make(rng)
    truth = case.true_fisher(*reference.jacobian(case.model_fn, params, x))
    arguments = (case.model_fn, params, x, case.likelihood)

    @jax.jit
    def functions():
        return ngd.dense_fisher(*arguments), ngd.fisher_diagonal(*arguments)

    matrix, diagonal = functions()
    assert_close(matrix, truth, 3e-5)
    assert_close(diagonal, np.diag(truth), 3e-5)
    assert matrix.dtype == diagonal.dtype == jnp.float32


@pytest.mark.long
def test_a_single_array_and_a_scalar_are_parameter_trees():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    matrix = ngd.dense_fisher(lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian())
    np.testing.assert_allclose(matrix, [[5, 7], [7, 10]], rtol=1e-6)
    scalar = ngd.dense_fisher(lambda s, x: s * x, jnp.ones(()), x, ngd.Gaussian())
    np.testing.assert_allclose(scalar, [[15]], rtol=1e-6)


# --- Kinds, weights, microbatches, coordinates.


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_the_other_kinds_have_one_row_for_each_example(kind, x64, rng):
    case = CASES["categorical"]
    params, x = case.make(rng, "float64")
    options = (
        {"key": jax.random.key(1)}
        if kind == "sampled"
        else {"targets": jnp.asarray(rng.integers(3, size=7))}
    )
    root = check(case.model_fn, params, x, case.likelihood, kind=kind, **options)
    assert root.shape[0] == 7


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("log density", marks=pytest.mark.long),
        pytest.param("categorical", marks=pytest.mark.slow),
        pytest.param("complex amplitude", marks=pytest.mark.slow),
    ],
)
def test_forms_have_weights_and_microbatches(name, x64, rng):
    case = CASES[name]
    params, x = case.make(rng, "float64")
    weights = jnp.asarray([1.0, 0.0, 3.0, 0.2, 0.0, 1e-6, 1.0])
    options = {"weights": weights, "microbatch_size": 2}
    check(case.model_fn, params, x, case.likelihood, **options)


@pytest.mark.usefixtures("x64")
def test_empirical_fisher_is_the_mean_outer_product_of_gradients(rng):
    case = CASES["product"]
    params, x = case.make(rng, "float64")
    targets = {
        "label": jnp.asarray(rng.integers(0, 3, size=7)),
        "box": jnp.asarray(rng.normal(size=(3, 1))),
    }

    def log_prob(params, block):
        outputs = case.model_fn(params, x)[block]
        return case.likelihood.blocks[block].log_prob(outputs, targets[block])

    truth = 0.0
    for block, weight in case.likelihood.weights.items():
        gradients = jax.jit(jax.jacrev(log_prob), static_argnums=1)(params, block)
        rows = np.concatenate(
            [np.asarray(g).reshape(g.shape[0], -1) for g in jax.tree.leaves(gradients)],
            axis=1,
        )
        measure = reference.normalised(None, rows.shape[:1])
        truth = truth + weight * reference.outer_products_of(rows, measure)
    options = {"kind": "empirical", "targets": targets}
    _, matrix, diagonal, _ = forms(case.model_fn, params, x, case.likelihood, **options)
    assert_close(matrix, truth, 1e-12)
    assert_close(diagonal, np.diag(truth), 1e-12)


@pytest.mark.long
def test_forms_are_in_the_coordinates_of_the_fisher(x64, rng):
    case = CASES["gaussian"]
    params, x = case.make(rng, "float64")
    factors = random_like(params, rng)

    @jax.jit
    def scaled(params):
        fisher = ngd.linearize_fisher(case.model_fn, params, x, case.likelihood)
        fisher = fisher.in_coordinates(
            lambda v: jax.tree.map(lambda a, b: a * b, factors, v)
        )
        return dense.dense_root(fisher), gram_matrix(fisher, 3), gram_matrix(fisher)

    root, *grams = scaled(params)
    truth = columns(case.model_fn, params, x, case.likelihood) * reference.flat(factors)
    assert_close(root, truth, 1e-12)
    for gram in grams:
        assert_close(gram, truth @ truth.T, 1e-12)


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


@pytest.mark.long
@pytest.mark.parametrize(("interior", "boundary"), [(7, 4), (5, 1)])
def test_blocks_of_residuals_have_batches_of_their_own(
    interior, boundary, x64, rng, monkeypatch
):
    params, batch = residual_case(rng, interior, boundary)
    _, jacobian = reference.jacobian(residuals, params, batch)
    rows = jacobian["interior"][:, 0], jacobian["boundary"][:, 0]
    truth = 4 * rows[0].T @ rows[0] / interior + 10 * rows[1].T @ rows[1] / boundary
    root = columns(residuals, params, batch, RESIDUALS)
    assert_close(root.T @ root, truth, 1e-12)
    from_rows(monkeypatch)
    grams = (None, 3)
    ours, matrix, diagonal, found = forms(
        residuals, params, batch, RESIDUALS, grams=grams
    )
    assert_close(ours, root, 1e-12)
    assert_close(matrix, truth, 1e-12)
    assert_close(diagonal, np.diag(truth), 1e-12)
    for gram in found:
        assert_close(gram, root @ root.T, 1e-12)


# --- Blocks of examples.


@pytest.mark.parametrize("num_examples", long_unless([37], [1, 16, 37]))
@pytest.mark.parametrize("microbatch_size", [None, 5])
def test_diagonal_is_right_for_every_number_of_examples(
    num_examples, microbatch_size, rng
):
    x = jnp.asarray(rng.normal(size=(num_examples, 3)), jnp.float32)
    diagonal = jax.jit(
        lambda w: ngd.fisher_diagonal(
            lambda w, x: x @ w,
            w,
            x,
            ngd.Gaussian(),
            microbatch_size=microbatch_size,
        )
    )(jnp.ones((3, 2)))
    squares = np.mean(np.asarray(x, float) ** 2, axis=0)
    np.testing.assert_allclose(diagonal, np.repeat(squares, 2), rtol=1e-5)


def test_many_examples_are_taken_in_blocks(x64, rng, monkeypatch):
    params = reference.network_params(rng, 2, num_inputs=3, dtype="float64")
    # Five blocks of 121 examples; the last one overlaps its neighbour.
    x = jnp.asarray(rng.normal(size=(601, 3)))
    truth = columns(reference.network, params, x, ngd.Gaussian())
    from_rows(monkeypatch)
    root, matrix, diagonal, _ = forms(reference.network, params, x, ngd.Gaussian())
    assert_close(root, truth, 1e-12)
    assert_close(matrix, truth.T @ truth, 1e-12)
    assert_close(diagonal, np.sum(truth**2, axis=0), 1e-12)


@pytest.mark.parametrize(
    ("num_examples", "block_size"), [(1, 4), (2, 1), (7, 3), (8, 4), (9, 8), (9, 9)]
)
def test_gram_is_the_same_for_blocks_of_every_size(num_examples, block_size, rng):
    x = jnp.asarray(rng.normal(size=(num_examples, 3)), jnp.float32)

    @jax.jit
    def gram(x):
        fisher = ngd.linearize_fisher(
            lambda w, x: x @ w, jnp.ones((3, 2)), x, ngd.Gaussian()
        )
        return gram_matrix(fisher, block_size)

    expected = np.kron(np.asarray(x) @ np.asarray(x).T, np.eye(2)) / num_examples
    np.testing.assert_allclose(gram(x), expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("block_size", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_block_sizes_that_cannot_be_raise(block_size, error):
    fisher = ngd.linearize_fisher(
        lambda w, x: x @ w, jnp.ones((3, 1)), jnp.ones((2, 3)), ngd.Gaussian()
    )
    with pytest.raises(error, match="`block_size` must be"):
        unchecked(gram_matrix)(fisher, block_size)


# --- Models that mix examples, or cannot be run on one.


MARKS = {
    "attention_over_examples": pytest.mark.long,
    "batch_norm_before_a_zero_head": [],
    "mixing_behind_a_large_scale": pytest.mark.long,
    "nothing_alone": [],
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=MARKS.get(name, pytest.mark.slow))
        for name in dense_models.MIXING
    ],
)
def test_models_that_mix_examples_have_the_right_forms(name, x64, rng):
    model_fn = dense_models.MIXING[name]
    params, batch = dense_models.make(rng)
    tolerance = 1e-7 if "large" in name else 1e-12
    check(model_fn, params, batch, ngd.Gaussian(), (), tolerance)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("batch_norm_before_a_zero_head", marks=pytest.mark.long),
        "batch_norm_with_a_large_offset",
        pytest.param("attention_over_examples", marks=pytest.mark.slow),
        pytest.param("nothing_alone", marks=pytest.mark.slow),
        pytest.param("pairwise_differences", marks=pytest.mark.slow),
    ],
)
def test_models_that_mix_examples_are_found_out_in_float32(name, rng):
    model_fn = dense_models.MIXING[name]
    params, batch = dense_models.make(rng, "float32")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), float), params)
        x = {**batch, "x": jnp.asarray(np.asarray(batch["x"]), float)}
        truth = columns(model_fn, wide, x, ngd.Gaussian())
    root, matrix, diagonal, _ = forms(model_fn, params, batch, ngd.Gaussian())
    assert_close(root, truth, 1e-5)
    assert_close(matrix, truth.T @ truth, 1e-5)
    assert_close(diagonal, np.sum(truth**2, axis=0), 1e-5)


@pytest.mark.parametrize(
    "name",
    long_unless({"layer_norm", "large_offset"}, dense_models.SEPARABLE.keys()),
)
@float64_is_long
def test_models_that_do_not_mix_are_made_of_rows(name, dtype, rng, monkeypatch):
    model_fn = dense_models.SEPARABLE[name]
    params, batch = dense_models.make(rng, dtype)
    truth = columns(model_fn, params, batch, ngd.Gaussian())
    from_rows(monkeypatch)
    root, matrix, diagonal, _ = forms(model_fn, params, batch, ngd.Gaussian())
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    assert_close(root, truth, tolerance)
    assert_close(matrix, truth.T @ truth, tolerance)
    assert_close(diagonal, np.sum(truth**2, axis=0), tolerance)


def test_models_without_a_batch_of_examples_have_the_right_forms(x64):
    # The batch is only a number of points, so there are no single examples to run on.
    def model_fn(params, scale):
        points = scale * jnp.linspace(-1.0, 1.0, 5)[:, None]
        return jnp.sin(points * params[None])

    params = jnp.array([0.3, -1.2])
    check(model_fn, params, 2.0, ngd.Gaussian(), ())
    fisher = ngd.linearize_fisher(model_fn, params, 2.0, ngd.Gaussian())
    with pytest.raises(ValueError, match="leading axis of length 5"):
        gram_matrix(fisher)


def test_models_that_fail_on_one_example_raise(rng):
    def pairs(w, x):
        return x.reshape(-1, 2, 3).sum(1).repeat(2, axis=0) @ w

    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    fisher = ngd.linearize_fisher(pairs, jnp.ones((3, 1)), x, ngd.Gaussian())
    with pytest.raises(ValueError, match="fails on a batch of one example of 4"):
        gram_matrix(fisher)

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
        gram_matrix(fisher)


# --- Parameters and outputs of every kind.


@pytest.mark.long
def test_models_that_are_not_holomorphic_are_linear_over_the_reals(x64, rng):
    x = jnp.asarray(rng.choice([-1.0, 1.0], (7, 3)))
    params = jnp.asarray(rng.normal(size=3) + 1j * rng.normal(size=3)) * 0.4
    models = {
        "complex": lambda w, x: jnp.log(jnp.cosh(x @ w)) + 0.3j * jnp.abs(x @ w) ** 2,
        "real": lambda w, x: jnp.log(jnp.cosh(x @ w)).real,
    }
    for model_fn in models.values():
        parts = jnp.stack([params.real, params.imag])
        rows = [
            jax.jacfwd(lambda t, p=p, f=model_fn: p(f(t[0] + 1j * t[1], x)))(parts)
            for p in (jnp.real, jnp.imag)
        ]
        rows = [np.asarray(row).reshape(7, 6) for row in rows]
        rows = np.concatenate([row - row.mean(0) for row in rows])
        root = check(model_fn, params, x, ngd.LogAmplitude())
        assert_close(root.T @ root, rows.T @ rows / 7, 1e-12)


@pytest.mark.long
def test_leaves_without_entries_and_masked_logits_are_legal(x64, rng):
    params = {"w": jnp.asarray(rng.normal(size=(3, 4))), "none": jnp.zeros((0, 3))}
    legal = jnp.asarray([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 1, 0]], bool)
    batch = {"x": jnp.asarray(rng.normal(size=(4, 3))), "legal": legal}

    def model_fn(params, batch):
        return jnp.where(batch["legal"], batch["x"] @ params["w"], -jnp.inf)

    root = check(model_fn, params, batch, ngd.Categorical())
    assert np.isfinite(root).all()


@pytest.mark.long
def test_narrow_parameters_have_wide_forms(rng):
    params, batch = dense_models.make(rng, "bfloat16")
    root, matrix, diagonal, _ = forms(
        dense_models.layer_norm, params, batch, ngd.Gaussian()
    )
    assert {x.dtype for x in (root, matrix, diagonal)} == {np.dtype("float32")}
    assert_close(matrix, root.T @ root, 0.05)
    assert_close(diagonal, np.sum(root**2, axis=0), 1e-5)


@pytest.mark.long
def test_vmap_over_parameters_equals_a_loop(x64, rng):
    case = CASES["categorical"]
    members = [case.make(rng, "float64")[0] for _ in range(2)]
    _, x = case.make(rng, "float64")
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)

    def matrix(params):
        return ngd.dense_fisher(case.model_fn, params, x, case.likelihood)

    many = jax.jit(jax.vmap(matrix))(stacked)
    for one, params in zip(many, members, strict=True):
        assert_close(one, jax.jit(matrix)(params), 1e-12)
