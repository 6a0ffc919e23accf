"""The Fisher operator against its dense definition, and its other promises."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ngd_jax as ngd
from ngd_jax import dense, tree
from ngd_jax.tree import random_like as draw_like
from tests import reference
from tests.conftest import unchecked
from tests.fisher_cases import CASES, assert_close, matvec, random_like
from tests.marks import long_unless

pytestmark = pytest.mark.usefixtures("strict_ranks")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# All in float64, and in float32 those whose numerics differ in kind.
IN_FLOAT32 = ("categorical", "diagonal gaussian", "poisson", "log density")
# Those of which another case, or the one in float32, is quick.
LONG_IN_FLOAT64 = {*IN_FLOAT32, "bernoulli image", "gaussian scalar"}
LONG_IN_FLOAT64 |= {"holomorphic amplitude"}


def marks_of(name, dtype):
    if dtype == "float32":
        return [] if name in IN_FLOAT32 else [pytest.mark.slow]
    return [pytest.mark.long] if name in LONG_IN_FLOAT64 else []


PRECISIONS = [
    pytest.param(case, dtype, id=f"{name}-{dtype}", marks=marks_of(name, dtype))
    for dtype in ("float64", "float32")
    for name, case in CASES.items()
]
TOLERANCE = {"float32": 3e-5, "float64": 1e-12}


def named(outputs):
    """The arrays of a tree by their places."""
    return [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(outputs)
    ]


def products(case, params, x, vector, new_params):
    """What solvers and the radius search need of the operator."""
    fisher = ngd.linearize_fisher(case.model_fn, params, x, case.likelihood)
    product, pushed = fisher.matvec_and_push(vector)
    return {
        "outputs": fisher.outputs,
        "matvec": fisher.matvec(vector),
        "matvec and push": product,
        "pushforward": pushed,
        "quadratic": fisher.quadratic(vector),
        "inner": fisher.inner(pushed, fisher.pushforward(new_params)),
        "kl": fisher.kl(new_params),
        "no_kl": fisher.kl(params),
    }


@pytest.mark.parametrize(("case", "dtype"), PRECISIONS, indirect=["dtype"])
def test_products_and_kl_equal_dense_definition(case, dtype, rng):
    params, x = case.make(rng, dtype)
    vector = random_like(params, rng)
    new_params = jax.tree.map(lambda p, v: p + 0.1 * v, params, vector)
    outputs, jacobian = reference.jacobian(case.model_fn, params, x)
    new_outputs, _ = reference.jacobian(case.model_fn, new_params, x)
    truth = case.true_fisher(outputs, jacobian)
    v = reference.flat(vector)

    result = jax.jit(functools.partial(products, case))(params, x, vector, new_params)

    tolerance = TOLERANCE[dtype.name]
    chex.assert_trees_all_equal_shapes_and_dtypes(result["matvec"], vector)
    chex.assert_trees_all_close(
        result["outputs"], outputs, rtol=10 * tolerance, atol=tolerance
    )
    assert_close(reference.flat(result["matvec"]), truth @ v, tolerance)
    product = reference.flat(result["matvec and push"])
    assert_close(product, truth @ v, tolerance)
    pushed = {name: np.einsum("...p,p->...", rows, v) for name, rows in named(jacobian)}
    for name, tangents in named(result["pushforward"]):
        assert_close(tangents, pushed[name], tolerance)
    assert_close(result["quadratic"], (v.conj() @ truth @ v).real, tolerance)
    other = reference.flat(new_params)
    size = np.sqrt((v.conj() @ truth @ v).real * (other.conj() @ truth @ other).real)
    inner = (v.conj() @ truth @ other).real
    assert abs(result["inner"] - inner) <= 10 * tolerance * size
    assert_close(result["kl"], case.true_kl(outputs, new_outputs), 10 * tolerance)
    assert float(result["no_kl"]) == 0.0
    assert result["quadratic"].dtype == result["kl"].dtype == dtype


def test_functions_equal_dense_definition_in_float32(rng):
    case = CASES["product"]
    params, x = case.make(rng)
    vector = random_like(params, rng)
    new_params = jax.tree.map(lambda p, v: p + 0.1 * v, params, vector)
    outputs, jacobian = reference.jacobian(case.model_fn, params, x)
    new_outputs, _ = reference.jacobian(case.model_fn, new_params, x)
    truth = case.true_fisher(outputs, jacobian)
    arguments = (case.model_fn, params, x, case.likelihood)

    @jax.jit
    def functions(vector, new_params):
        return {
            "matvec": ngd.fisher_vector_product(*arguments, vector),
            "dense": ngd.dense_fisher(*arguments),
            "diagonal": ngd.fisher_diagonal(*arguments),
            "kl": ngd.mean_kl(case.model_fn, params, new_params, x, case.likelihood),
        }

    result = functions(vector, new_params)
    matvec = reference.flat(result["matvec"])
    assert_close(matvec, truth @ reference.flat(vector), 3e-5)
    assert_close(result["dense"], truth, 3e-5)
    assert_close(result["diagonal"], np.diag(truth), 3e-5)
    assert_close(result["kl"], case.true_kl(outputs, new_outputs), 3e-4)


# --- Identities.


@functools.cache
def compiled_matvec(name):
    case = CASES[name]
    return jax.jit(
        lambda params, x, v: ngd.fisher_vector_product(
            case.model_fn, params, x, case.likelihood, v
        )
    )


seeds = st.integers(0, 2**32 - 1)
identity_cases = pytest.mark.parametrize(
    "name", ["categorical", "product", "log density", "holomorphic amplitude"]
)


@identity_cases
@given(seed=seeds, scale=st.floats(-1e3, 1e3))
def test_products_are_hermitian_positive_and_linear(name, seed, scale):
    with jax.enable_x64(True):
        case, rng = CASES[name], np.random.default_rng(seed)
        params, x = case.make(rng, "float64")
        u, v = random_like(params, rng), random_like(params, rng)
        matvec = compiled_matvec(name)
        fu, fv = (reference.flat(matvec(params, x, w)) for w in (u, v))
        combined = jax.tree.map(lambda a, b: scale * a + b, u, v)
        f_combined = reference.flat(matvec(params, x, combined))
        u, v = reference.flat(u), reference.flat(v)
        size = np.linalg.norm(u) * np.linalg.norm(fv) + 1e-12
        assert abs(np.vdot(u, fv) - np.vdot(fu, v)) <= 1e-12 * size
        assert np.vdot(v, fv).real >= -1e-12 * size
        bound = 1e-12 * (abs(scale) * np.linalg.norm(fu) + np.linalg.norm(fv) + 1e-12)
        assert np.linalg.norm(f_combined - (scale * fu + fv)) <= bound


@every_case
def test_kl_is_half_the_quadratic_form_to_third_order(case, x64, rng):
    params, x = case.make(rng, "float64")
    direction = random_like(params, rng)

    @jax.jit
    def measure(step):
        fisher = ngd.linearize_fisher(case.model_fn, params, x, case.likelihood)
        moved = jax.tree.map(lambda p, d: p + step * d, params, direction)
        return fisher.kl(moved), fisher.quadratic(direction)

    # The KL of |ψ|² grows with 4 times the metric of log ψ, and for complex ψ with
    # less, since phases do not show in it.
    if np.iscomplexobj(jax.eval_shape(case.model_fn, params, x)):
        kl, quadratic = measure(1e-3)
        assert 0 < kl <= 4 * 0.5 * 1e-6 * quadratic * 1.01
        return
    errors = []
    for step in (2e-2, 1e-2, 5e-3):
        kl, quadratic = measure(step)
        predicted = case.likelihood.kl_curvature * 0.5 * step**2 * quadratic
        errors.append(abs(float(kl - predicted)) / float(predicted))
    # Relative errors of first order in the step: halving it halves them, or better.
    assert errors[2] < 0.2
    assert errors[2] <= 0.7 * errors[1] <= 0.7**2 * errors[0] or errors[0] < 1e-4


@pytest.mark.long
def test_permuted_hidden_units_are_at_no_distance(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)
    order = jnp.array([2, 0, 1])
    weights, bias = params["out"]
    permuted = params | {
        "hidden": {
            "w": params["hidden"]["w"][:, order],
            "b": params["hidden"]["b"][order],
        },
        "out": [weights[order], bias],
    }
    kl = ngd.mean_kl(case.model_fn, params, permuted, x, case.likelihood)
    assert 0 <= float(kl) < 1e-10


@every_case
def test_kl_is_never_negative(case, rng):
    params, x = case.make(rng)
    direction = random_like(params, rng)

    @jax.jit
    def measure(steps):
        fisher = ngd.linearize_fisher(case.model_fn, params, x, case.likelihood)

        def kl(step):
            return fisher.kl(jax.tree.map(lambda p, d: p + step * d, params, direction))

        return jax.vmap(kl)(steps)

    # The smallest moves are round-off: a KL from differences of logarithms fails there.
    # At 0 too, since a model under vmap may round its sums in another order.
    kls = np.asarray(measure(jnp.array([0.0, 1e-7, 1e-4, 1e-2, 0.3, 3.0])))
    assert kls[0] <= 1e-12
    assert np.all(kls >= 0)
    assert np.all(np.isfinite(kls[:5]))


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_pullback_of_output_gradients_is_the_gradient(microbatch_size, rng):
    case = CASES["categorical over tokens"]
    params, x = case.make(rng)
    y = jnp.asarray(rng.integers(0, 3, size=case.batch_shape))

    def loss_of_outputs(outputs):
        return -case.likelihood.log_prob(outputs, y).mean()

    @jax.jit
    def both(params):
        fisher = ngd.linearize_fisher(
            case.model_fn, params, x, case.likelihood, microbatch_size=microbatch_size
        )
        pulled = fisher.pullback(jax.grad(loss_of_outputs)(fisher.outputs))
        gradient = jax.grad(lambda p: loss_of_outputs(case.model_fn(p, x)))(params)
        return pulled, gradient

    pulled, gradient = both(params)
    chex.assert_trees_all_close(pulled, gradient, rtol=1e-5, atol=1e-6)


# --- Kinds.


def test_empirical_fisher_is_the_mean_outer_product_of_gradients(x64, rng):
    case = CASES["product"]
    params, x = case.make(rng, "float64")
    label = jnp.asarray(rng.integers(0, 3, size=7))
    box = jnp.asarray(rng.normal(size=(3, 1)))
    targets = {"label": label, "box": box}

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

    @jax.jit
    def empirical(params):
        fisher = ngd.linearize_fisher(
            case.model_fn,
            params,
            x,
            case.likelihood,
            kind="empirical",
            targets=targets,
        )
        return dense.dense(fisher), dense.diagonal(fisher)

    matrix, diagonal = empirical(params)
    assert_close(matrix, truth, 1e-12)
    assert_close(diagonal, np.diag(truth), 1e-12)


@pytest.mark.parametrize(
    "name",
    long_unless({"categorical"}, ["categorical", "poisson", "diagonal gaussian"]),
)
def test_sampled_fisher_is_unbiased(name, rng):
    case = CASES[name]
    params, x = case.make(rng)
    params = jax.tree.map(lambda p: 0.5 * p, params)
    outputs, jacobian = reference.jacobian(case.model_fn, params, x)
    truth = case.true_fisher(outputs, jacobian)

    @jax.jit
    def draws(keys):
        def draw(key):
            return ngd.dense_fisher(
                case.model_fn, params, x, case.likelihood, kind="sampled", key=key
            )

        return jax.lax.map(draw, keys)

    samples = np.asarray(draws(jax.random.split(jax.random.key(0), 2000)), float)
    error = np.abs(samples.mean(0) - truth)
    deviation = samples.std(0) / np.sqrt(len(samples))
    # In units of its own standard error, over all entries: 6 is one in 1e9.
    assert np.all(error <= 6 * deviation + 1e-6)
    assert np.max(deviation) < 0.2 * np.abs(truth).max()


def test_sampled_products_are_those_of_one_draw(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)
    fisher = ngd.linearize_fisher(
        case.model_fn, params, x, case.likelihood, kind="sampled", key=jax.random.key(3)
    )
    vector = random_like(params, rng)
    first, second = jax.jit(lambda v: (fisher.matvec(v), fisher.matvec(v)))(vector)
    chex.assert_trees_all_equal(first, second)
    same = ngd.linearize_fisher(
        case.model_fn,
        params,
        x,
        case.likelihood,
        kind="empirical",
        targets=case.likelihood.sample(jax.random.key(3), fisher.outputs),
    )
    chex.assert_trees_all_close(same.matvec(vector), first, rtol=1e-5, atol=1e-6)


# --- Trees and dtypes.


def test_structure_and_dtypes_of_mixed_trees_are_kept(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)
    params["hidden"]["w"] = params["hidden"]["w"].astype(jnp.bfloat16)
    params["out"][1] = params["out"][1].astype(jnp.float16)
    vector = random_like(params, rng)
    product = compiled_matvec("categorical")(params, x, vector)
    chex.assert_trees_all_equal_shapes_and_dtypes(product, vector)
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), vector)
    product = compiled_matvec("categorical")(params, x, wide)
    chex.assert_trees_all_equal_shapes_and_dtypes(product, wide)


@pytest.mark.long
def test_bfloat16_parameters_keep_float32_vectors(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    vector = jax.tree.map(lambda p: p.astype(jnp.float32), random_like(params, rng))
    x = x.astype(jnp.bfloat16)
    outputs, jacobian = reference.jacobian(case.model_fn, params, x)
    truth = case.true_fisher(outputs, jacobian) @ reference.flat(vector)
    product = compiled_matvec("categorical")(params, x, vector)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(product))
    assert_close(reference.flat(product), truth, 4 * float(jnp.finfo(x.dtype).eps))


def test_a_single_array_and_a_scalar_are_parameter_trees():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    scalar = ngd.Gaussian(event_ndims=0)
    fisher = ngd.linearize_fisher(lambda w, x: x @ w, jnp.ones(2), x, scalar)
    np.testing.assert_allclose(fisher.matvec(jnp.array([1.0, 0.0])), [5, 7], rtol=1e-6)
    fisher = ngd.linearize_fisher(lambda s, x: s * x, jnp.ones(()), x, ngd.Gaussian())
    np.testing.assert_allclose(fisher.matvec(jnp.ones(())), 15, rtol=1e-6)


def test_leaves_without_entries_and_empty_trees_are_parameters():
    x = jnp.ones((4, 2))
    params = {"w": jnp.ones((2, 3)), "none": jnp.zeros((0, 3)), "nothing": {}}
    fisher = ngd.linearize_fisher(
        lambda p, x: x @ p["w"], params, x, ngd.Categorical(), microbatch_size=2
    )
    product = fisher.matvec(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(product, params)
    chex.assert_tree_all_finite(product)
    assert float(fisher.kl(params)) == 0.0
    fisher = ngd.linearize_fisher(lambda _, x: x, {}, x, ngd.Gaussian())
    assert fisher.matvec({}) == {}
    assert float(fisher.quadratic({})) == 0.0


@pytest.mark.long
def test_a_quadratic_form_is_never_below_zero_by_round_off():
    # The norm of ψ does not matter: F v = 0 for a constant v, up to round-off, which
    # is of either sign.
    keys = jax.random.split(jax.random.key(0), 3)
    log_psi = jax.random.normal(keys[0], (16,))
    constants = 1e3 * jax.random.normal(keys[1], (40_000, 1))
    vectors = constants + 1e-4 * jax.random.normal(keys[2], (40_000, 16))
    fisher = ngd.linearize_fisher(
        lambda log_psi, _: log_psi * 1.0, log_psi, jnp.zeros(16), ngd.LogAmplitude()
    )
    assert jnp.min(jax.vmap(fisher.quadratic)(vectors)) >= 0


# --- Transformations.


@pytest.mark.long
def test_eager_equals_jit(rng):
    case = CASES["poisson"]
    params, x = case.make(rng)
    vector = random_like(params, rng)
    eager = products(case, params, x, vector, vector)
    jitted = jax.jit(functools.partial(products, case))(params, x, vector, vector)
    chex.assert_trees_all_close(eager, jitted, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_vmap_over_parameters_and_scan_equal_a_loop(rng):
    case = CASES["categorical"]
    members = [case.make(rng)[0] for _ in range(3)]
    _, x = case.make(rng)
    vector = random_like(members[0], rng)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    matvec = compiled_matvec("categorical")
    loop = [matvec(params, x, vector) for params in members]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)
    mapped = jax.jit(jax.vmap(matvec, in_axes=(0, None, None)))(stacked, x, vector)
    chex.assert_trees_all_close(mapped, expected, rtol=1e-5, atol=1e-6)

    @jax.jit
    def scanned(stacked):
        return jax.lax.scan(lambda c, p: (c, matvec(p, x, vector)), 0, stacked)[1]

    chex.assert_trees_all_close(scanned(stacked), expected, rtol=1e-5, atol=1e-6)


def test_second_call_does_not_compile_again(rng):
    case = CASES["categorical"]
    product = chex.assert_max_traces(
        lambda params, x, v: ngd.fisher_vector_product(
            case.model_fn, params, x, case.likelihood, v
        ),
        n=1,
    )
    product = jax.jit(product)
    for _ in range(3):
        params, x = case.make(rng)
        product(params, x, random_like(params, rng))


def test_a_custom_derivative_in_the_model_is_that_of_the_metric(rng):
    """Straight-through estimators and the like: J is what JAX differentiates."""

    @jax.custom_jvp
    def rounded(z):
        return jnp.round(z)

    rounded.defjvp(lambda primals, tangents: (rounded(*primals), 2.0 * tangents[0]))
    x = jnp.asarray(rng.normal(size=(5, 2)), jnp.float32)
    vector = jnp.array([1.0, -1.0])
    fisher = ngd.linearize_fisher(
        lambda w, x: rounded(x @ w), jnp.ones(2), x, ngd.Gaussian(event_ndims=0)
    )
    np.testing.assert_allclose(
        fisher.matvec(vector), 4 * x.T @ (x @ vector) / 5, rtol=1e-5
    )


def test_model_is_run_once_for_all_products(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)
    calls = []

    def counted(params, x):
        jax.debug.callback(lambda: calls.append(1))
        return case.model_fn(params, x)

    @jax.jit
    def three_products(params, v):
        fisher = ngd.linearize_fisher(counted, params, x, case.likelihood)
        return fisher.matvec(fisher.matvec(fisher.matvec(v)))

    jax.block_until_ready(three_products(params, params))
    jax.effects_barrier()
    assert len(calls) == 1


# --- Microbatches: the same numbers as the whole batch, in less memory.

# A name, the options, and whether the batch divides into microbatches.
VARIANTS = {
    "exact": ("categorical", {}, 7, 2),
    "evenly": ("categorical over tokens", {}, 4, 2),
    "one at a time": ("poisson", {}, 7, 1),
    "covariance": ("log density", {}, 7, 3),
    "complex covariance": ("complex amplitude", {}, 7, 3),
    "weighted covariance": ("log density", {"weights": jnp.arange(7.0)}, 7, 2),
    "weighted": ("categorical", {"weights": jnp.arange(7.0)}, 7, 3),
    "weighted tokens": (
        "categorical over tokens",
        {"weights": jnp.arange(12.0).reshape(4, 3)},
        4,
        3,
    ),
    "sampled": ("categorical", {"kind": "sampled", "key": jax.random.key(1)}, 7, 3),
    "empirical": (
        "categorical",
        {"kind": "empirical", "targets": jnp.array([0, 1, 2, 0, 1, 2, 0])},
        7,
        3,
    ),
}
QUICK_VARIANTS = ("one at a time", "covariance", "weighted tokens")


@pytest.mark.parametrize(
    ("name", "options", "num_examples", "size"),
    long_unless(QUICK_VARIANTS, VARIANTS),
)
def test_microbatches_equal_the_whole_batch(name, options, num_examples, size, rng):
    case = CASES[name]
    params, x = case.make(rng)
    assert x.shape[0] == num_examples
    vector = random_like(params, rng)
    new_params = jax.tree.map(lambda p, v: p + 0.1 * v, params, vector)

    @jax.jit
    def both(params):
        results = []
        for microbatch_size in (None, size):
            fisher = ngd.linearize_fisher(
                case.model_fn,
                params,
                x,
                case.likelihood,
                microbatch_size=microbatch_size,
                **options,
            )
            assert (fisher.chunks is None) == (microbatch_size is None)
            results.append(
                {
                    "outputs": fisher.outputs,
                    "matvec": fisher.matvec(vector),
                    "matvec and push": fisher.matvec_and_push(vector),
                    "quadratic": fisher.quadratic(vector),
                    "kl": fisher.kl(new_params),
                }
            )
        return results

    whole, by_parts = both(params)
    chex.assert_trees_all_close(by_parts, whole, rtol=1e-4, atol=1e-6)


def test_what_is_not_of_the_examples_reaches_every_microbatch_whole(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)
    vector = random_like(params, rng)
    batch = {
        "x": x,
        "key": jax.random.key(0),
        "keys": jax.random.split(jax.random.key(1), 3),
        "temperature": 2.0,
        "name": None,
        "offset": jnp.arange(3.0),
    }

    def model_fn(params, batch):
        noise = jax.random.normal(batch["key"], (3,))
        noise += jax.random.normal(batch["keys"][2], (3,))
        outputs = case.model_fn(params, batch["x"]) / batch["temperature"]
        return outputs + (0.1 * noise + batch["offset"])[None]

    whole, by_parts = (
        matvec(model_fn, params, batch, case.likelihood, vector, microbatch_size=size)
        for size in (None, 2)
    )
    chex.assert_trees_all_close(by_parts, whole, rtol=1e-4, atol=1e-6)


def test_keys_of_the_examples_are_split_with_them(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)
    batch = (x, jax.random.split(jax.random.key(0), 7))
    vector = random_like(params, rng)

    def model_fn(params, batch):
        x, keys = batch
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        return case.model_fn(params, x) + noise

    whole, by_parts = (
        matvec(model_fn, params, batch, case.likelihood, vector, microbatch_size=size)
        for size in (None, 3)
    )
    chex.assert_trees_all_close(by_parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "likelihood",
    long_unless([ngd.Categorical()], [ngd.Categorical(), ngd.LogDensity()]),
    ids=repr,
)
def test_peak_memory_is_that_of_the_microbatch(likelihood):
    # Wide layers and a small input: activations take most of the memory.
    params = [jnp.zeros((4, 256)), jnp.zeros((256, 256)), jnp.zeros((256, 3))]

    def model_fn(params, x):
        for weights in params[:-1]:
            x = jnp.tanh(x @ weights)
        outputs = x @ params[-1]
        return outputs[:, 0] if isinstance(likelihood, ngd.LogDensity) else outputs

    def peak(microbatch_size):
        @jax.jit
        def product(params, x, vector):
            fisher = ngd.linearize_fisher(
                model_fn, params, x, likelihood, microbatch_size=microbatch_size
            )
            return fisher.matvec(vector)

        x = jax.ShapeDtypeStruct((4096, 4), jnp.float32)
        compiled = product.lower(params, x, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    activations = 4096 * 2 * 256 * 4
    assert peak(None) > activations
    assert peak(64) < activations / 4
    assert peak(64) < peak(512) < peak(None)


def test_microbatch_as_large_as_the_batch_is_the_whole_batch(rng):
    case = CASES["categorical"]
    params, x = case.make(rng)
    fisher = ngd.linearize_fisher(
        case.model_fn, params, x, case.likelihood, microbatch_size=100
    )
    plain = ngd.linearize_fisher(case.model_fn, params, x, case.likelihood)
    vector = random_like(params, rng)
    np.testing.assert_array_equal(
        reference.flat(fisher.matvec(vector)), reference.flat(plain.matvec(vector))
    )


# --- The square root A with F = Aᵀ A.


KINDS = {
    "exact": {},
    "sampled": {"kind": "sampled", "key": jax.random.key(1)},
    "weighted": {"weights": jnp.array([1.0, 0.0, 2.0, 0.5, 3.0, 1.0, 0.0])},
    "by microbatches": {"microbatch_size": 3},
}
ROOTS = [(name, "exact") for name in CASES] + [
    ("categorical", "sampled"),
    ("poisson", "weighted"),
    ("log density", "weighted"),
    ("complex amplitude", "by microbatches"),
]
QUICK_ROOTS = [*ROOTS[-4:-1], ("product", "exact")]


@pytest.mark.parametrize(("name", "kind"), long_unless(QUICK_ROOTS, ROOTS))
def test_square_root_is_one_and_its_parts_agree(name, kind, x64, rng):
    case = CASES[name]
    params, x = case.make(rng, "float64")
    v = random_like(params, rng)

    @jax.jit
    def parts(params, v, key):
        fisher = ngd.linearize_fisher(
            case.model_fn, params, x, case.likelihood, **KINDS[kind]
        )
        pushed = fisher.sqrt_matvec(v)
        u = draw_like(jax.random.normal, key, pushed)
        cotangents = fisher.sqrt_cotangents(u)
        solved = fisher.sqrt_solve(cotangents)
        return {
            "F v": (fisher.sqrt_rmatvec(pushed), fisher.matvec(v)),
            "|A v|²": (tree.vdot(pushed, pushed), fisher.quadratic(v)),
            "⟨A v, u⟩": (tree.vdot(pushed, u), tree.vdot(v, fisher.sqrt_rmatvec(u))),
            "Aᵀ u": (fisher.pullback(cotangents), fisher.sqrt_rmatvec(u)),
            # The coefficients of least norm; of those in the range, all is recovered.
            "solved": (fisher.sqrt_cotangents(solved), cotangents),
            "least": (tree.norm(solved) <= tree.norm(u) * (1 + 1e-12), True),
        }

    for name, (actual, expected) in parts(params, v, jax.random.key(2)).items():
        size = max(np.abs(reference.flat(expected)).max(), 1.0)
        np.testing.assert_allclose(
            reference.flat(actual),
            reference.flat(expected),
            rtol=1e-10,
            atol=1e-11 * size,
            err_msg=name,
        )


def test_what_is_outside_of_the_range_is_left_out(x64):
    """The gradient of something that does not depend on the distribution alone."""
    logits = jnp.asarray([[0.3, -1.0, 0.5], [1.0, 0.0, 2.0]])
    fisher = ngd.linearize_fisher(
        lambda w, _: w, logits, jnp.ones(2), ngd.Categorical()
    )
    shift = jnp.ones((2, 3))  # moves no probability
    cotangents = jnp.asarray([[1.0, -1.0, 0.0], [0.0, 2.0, -2.0]])
    known, more = (fisher.sqrt_solve(cotangents + c * shift) for c in (0.0, 5.0))
    np.testing.assert_allclose(fisher.sqrt_rmatvec(known), cotangents, atol=1e-12)
    np.testing.assert_allclose(fisher.sqrt_rmatvec(more).sum(1), 0, atol=1e-12)


# --- Coordinates.


@pytest.mark.parametrize("microbatch_size", long_unless([None], [None, 3]))
def test_fisher_in_coordinates_is_the_transformed_one(microbatch_size, x64, rng):
    case = CASES["categorical"]
    params, x = case.make(rng, "float64")
    v = random_like(params, rng)
    scales = jax.tree.map(lambda p: 1 + p**2, params)
    scaled = jax.tree.map(jnp.multiply, scales, v)

    @jax.jit
    def both(params):
        fisher = ngd.linearize_fisher(
            case.model_fn, params, x, case.likelihood, microbatch_size=microbatch_size
        )
        there = fisher.in_coordinates(
            lambda t: jax.tree.map(jnp.multiply, scales, t), scales
        )
        assert there.base is fisher
        assert fisher.base is fisher
        product = jax.tree.map(jnp.multiply, scales, fisher.matvec(scaled))
        moved = jax.tree.map(jnp.add, params, scaled)
        origin = tree.zeros_like_wide(params)
        return [
            (there.matvec(v), product),
            (there.kl(v), fisher.kl(moved)),
            (there.kl(origin), 0.0),
            (there.sqrt_matvec(v), fisher.sqrt_matvec(scaled)),
        ]

    for actual, expected in both(params):
        assert_close(reference.flat(actual), reference.flat(expected), 1e-12)


@pytest.mark.long
@pytest.mark.parametrize("inner", ["scales", "any"])
def test_scales_of_scales_multiply_and_of_anything_else_are_none(inner, x64, rng):
    case = CASES["categorical"]
    params, x = case.make(rng, "float64")
    scales = jax.tree.map(lambda p: 1 + p**2, params)

    def scale(t):
        return jax.tree.map(jnp.multiply, scales, t)

    fisher = ngd.linearize_fisher(case.model_fn, params, x, case.likelihood)
    there = fisher.in_coordinates(scale, scales if inner == "scales" else None)
    there = there.in_coordinates(scale, scales)
    if inner == "any":
        assert there.scales is None
    else:
        squares = jax.tree.map(jnp.square, scales)
        chex.assert_trees_all_close(there.scales, squares, rtol=1e-12)
    # The factors are those of the parameters either way.
    v = random_like(params, rng)
    expected = ngd.Kronecker()(
        fisher.in_coordinates(lambda t: scale(scale(t)), there.scales), 0.1
    )(v)
    actual = ngd.Kronecker()(there, 0.1)(v)
    chex.assert_trees_all_close(actual, expected, rtol=1e-9)


# --- Misuse.

linearize_fisher = unchecked(ngd.linearize_fisher)


def linear(params, x):
    return x @ params["w"]


GOOD = {
    "model_fn": linear,
    "params": {"w": jnp.ones((2, 3))},
    "batch": jnp.ones((4, 2)),
    "likelihood": ngd.Categorical(),
}


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"kind": "exakt"}, ValueError, "`kind` must be one of .*'exakt'"),
        ({"kind": "sampled"}, ValueError, "`key` is needed"),
        ({"kind": "empirical"}, ValueError, "`targets` are needed"),
        (
            {
                "kind": "sampled",
                "key": jax.random.key(0),
                "likelihood": ngd.LogDensity(),
                "model_fn": lambda p, x: (x @ p["w"])[:, 0],
            },
            ValueError,
            '`kind` must be "exact"',
        ),
        ({"params": {"w": jnp.ones((2, 3), int)}}, TypeError, "`params` must hold"),
        ({"batch": jnp.ones((0, 2))}, ValueError, "`batch` must hold at least one"),
        (
            {"model_fn": lambda p, x: {"logits": x @ p["w"]}},
            TypeError,
            "`outputs` of Categorical",
        ),
        ({"microbatch_size": 0}, ValueError, "`microbatch_size` must be at least 1"),
        ({"microbatch_size": 2.0}, TypeError, "`microbatch_size` must be a Python int"),
        ({"microbatch_size": True}, TypeError, "`microbatch_size` must be a Python"),
        (
            {"model_fn": lambda p, _: jnp.ones((5, 2)) @ p["w"], "microbatch_size": 2},
            ValueError,
            "`microbatch_size` needs a leaf of `batch`",
        ),
        (
            {
                "model_fn": lambda p, x: {"a": x @ p["w"], "b": x[:3] @ p["w"]},
                "likelihood": ngd.Product(
                    {"a": ngd.Categorical(), "b": ngd.Categorical()}
                ),
                "microbatch_size": 2,
            },
            ValueError,
            "share one leading axis",
        ),
        ({"weights": jnp.ones(3)}, ValueError, "`weights` must broadcast"),
        ({"weights": jnp.ones((4, 1))}, ValueError, "`weights` must broadcast"),
        (
            {
                "model_fn": lambda p, x: {"a": x @ p["w"]},
                "likelihood": ngd.Product({"a": ngd.Categorical()}),
                "weights": {"b": jnp.ones(4)},
            },
            ValueError,
            "`weights` must have an entry for each block",
        ),
    ],
)
def test_misuse_raises_an_error_that_names_the_argument(changes, error, match):
    arguments = GOOD | changes
    positional = [arguments.pop(name) for name in GOOD]
    with pytest.raises(error, match=match):
        linearize_fisher(*positional, **arguments)


def test_vectors_and_parameters_that_do_not_fit_raise():
    fisher = ngd.linearize_fisher(*GOOD.values())
    wrong_shape, wrong_structure = {"w": jnp.ones((3, 2))}, {"v": jnp.ones((2, 3))}
    for method in (fisher.matvec, fisher.quadratic):
        with pytest.raises(ValueError, match=r"`vector`.*`params`.*\['w'\]"):
            method(wrong_shape)
        with pytest.raises(ValueError, match="`vector` must have the tree structure"):
            method(wrong_structure)
    with pytest.raises(ValueError, match="`new_params` must have the shapes"):
        ngd.mean_kl(
            linear, GOOD["params"], wrong_shape, GOOD["batch"], ngd.Categorical()
        )


def test_the_model_gets_its_parameters_in_their_own_dtype():
    seen = []

    def model_fn(params, x):
        seen.append(params["w"].dtype)
        return (x @ params["w"]).astype(jnp.float32)

    params = {"w": jnp.ones((2, 1), jnp.bfloat16)}
    x = jnp.ones((3, 2), jnp.bfloat16)
    fisher = ngd.linearize_fisher(model_fn, params, x, ngd.Gaussian())
    fisher.matvec({"w": jnp.ones((2, 1), jnp.float32)})
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
