"""Each distribution against SciPy, float64 NumPy and enumeration of its outcomes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from ngd_jax.likelihoods import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Gaussian,
    LogAmplitude,
    LogDensity,
    Poisson,
    Product,
)
from tests.marks import long_unless


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.fixture(params=long_unless(["float32"], ["float32", "float64"]))
def precision(request):
    with jax.enable_x64(request.param == "float64"):
        yield {"float32": 2e-5, "float64": 1e-12}[request.param]


def dense(likelihood, outputs):
    """H of every example, [N, D, D], from the products with unit vectors."""
    size = outputs.shape[-1]
    product_fn = jax.jit(likelihood.fisher_vp)
    columns = [
        product_fn(outputs, jnp.broadcast_to(unit, outputs.shape))
        for unit in jnp.eye(size, dtype=outputs.dtype)
    ]
    return np.stack(columns, axis=-1)


def dense_root(likelihood, outputs):
    """B of every example, from the products with unit vectors."""
    size = outputs.shape[-1]
    product_fn = jax.jit(likelihood.sqrt_fisher_vp)
    columns = [
        product_fn(outputs, jnp.broadcast_to(unit, outputs.shape))
        for unit in jnp.eye(size, dtype=outputs.dtype)
    ]
    return np.stack(columns, axis=-1)


def enumerated(likelihood, outputs, outcomes):
    """E[score scoreᵀ] and E[score], summed over all outcomes, for every example."""
    fisher, mean, total = 0, 0, 0

    @jax.jit
    def probability_and_score(targets):
        log_prob = likelihood.log_prob(outputs, targets)
        score = jax.grad(lambda z: likelihood.log_prob(z, targets).sum())(outputs)
        return jnp.exp(log_prob), score

    for outcome in outcomes:
        targets = jnp.broadcast_to(
            jnp.asarray(outcome), (len(outputs), *np.shape(outcome))
        )
        p, score = (np.asarray(x, float) for x in probability_and_score(targets))
        fisher += p[:, None, None] * score[:, :, None] * score[:, None, :]
        mean += p[:, None] * score
        total += p
    np.testing.assert_allclose(total, 1, rtol=1e-4)
    return fisher, mean


def test_categorical_log_prob_equals_scipy(precision, rng):
    logits = rng.normal(size=(5, 4)) * 3
    labels = rng.integers(4, size=5)
    truth = scipy.stats.multinomial.logpmf(
        np.eye(4)[labels], 1, scipy.special.softmax(logits, axis=-1)
    )
    outputs = jnp.asarray(logits)
    for dtype in ("int8", "uint8", "int32", "uint32"):
        value = jax.jit(Categorical().log_prob)(outputs, jnp.asarray(labels, dtype))
        np.testing.assert_allclose(value, truth, rtol=precision, atol=precision)
    for dtype in ("int32", "float32", "bool"):
        one_hot = jnp.asarray(np.eye(4)[labels], dtype)
        value = Categorical().log_prob(outputs, one_hot)
        np.testing.assert_allclose(value, truth, rtol=precision, atol=precision)


def test_categorical_log_prob_of_soft_targets_is_the_cross_entropy(rng):
    logits, soft = rng.normal(size=(5, 4)), rng.dirichlet(np.ones(4), size=5)
    truth = np.sum(soft * scipy.special.log_softmax(logits, axis=-1), axis=-1)
    value = Categorical().log_prob(jnp.asarray(logits), jnp.asarray(soft))
    np.testing.assert_allclose(value, truth, rtol=1e-5)


def test_categorical_kl_equals_the_definition(precision, rng):
    a, b = rng.normal(size=(2, 50, 6)) * rng.choice([0.1, 1, 10], size=(50, 1))
    p, q = scipy.special.softmax(a, axis=-1), scipy.special.softmax(b, axis=-1)
    truth = scipy.special.rel_entr(p, q).sum(-1)
    value = jax.jit(Categorical().kl)(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(value, truth, rtol=5 * precision)


def test_categorical_fisher_equals_the_enumerated_one(precision, rng):
    outputs = jnp.asarray(rng.normal(size=(3, 4)))
    fisher, mean = enumerated(Categorical(), outputs, range(4))
    np.testing.assert_allclose(mean, 0, atol=precision)
    np.testing.assert_allclose(dense(Categorical(), outputs), fisher, atol=precision)
    p = scipy.special.softmax(np.asarray(outputs, float), axis=-1)
    truth = p[:, :, None] * np.eye(4) - p[:, :, None] * p[:, None, :]
    np.testing.assert_allclose(dense(Categorical(), outputs), truth, atol=precision)


def test_categorical_root_is_the_documented_matrix(precision, rng):
    outputs = jnp.asarray(rng.normal(size=(3, 4)))
    p = scipy.special.softmax(np.asarray(outputs, float), axis=-1)
    root = np.sqrt(p)
    truth = root[:, :, None] * np.eye(4) - p[:, :, None] * root[:, None, :]
    np.testing.assert_allclose(
        dense_root(Categorical(), outputs), truth, atol=precision
    )


@pytest.mark.parametrize("gap", [5, 10, 15])
def test_categorical_metric_keeps_its_digits_where_a_class_is_certain(gap, rng):
    """For p = 1 - δ the metric is made of δ, whose digits 1 - p has lost."""
    logits = (rng.normal(size=(50, 4)) + gap * np.eye(4)[1]).astype(np.float32)
    vectors = rng.normal(size=(50, 4)).astype(np.float32)
    p = scipy.special.softmax(logits.astype(np.float64), -1)
    others = p @ (1 - np.eye(4))  # 1 - p, without the difference
    metric = -np.einsum("ni,nj->nij", p, p) * (1 - np.eye(4))
    metric += np.einsum("ni,ij->nij", p * others, np.eye(4))
    root = metric / np.sqrt(p)[:, None, :]
    expected = {
        "fisher_vp": np.einsum("nij,nj->ni", metric, vectors),
        "sqrt_fisher_vp": np.einsum("nij,nj->ni", root, vectors),
        "sqrt_fisher_tvp": np.einsum("nji,nj->ni", root, vectors),
    }
    for name, products in expected.items():
        product_fn = jax.jit(
            getattr(Categorical(), name)
        )  # the compiler may not undo it
        found = product_fn(jnp.asarray(logits), jnp.asarray(vectors))
        errors = np.linalg.norm(found - products, axis=-1)
        assert (errors / np.linalg.norm(products, axis=-1)).max() < 1e-5, name


def test_bernoulli_log_prob_equals_scipy(precision, rng):
    logits, y = rng.normal(size=(5, 3)) * 3, rng.integers(2, size=(5, 3))
    truth = scipy.stats.bernoulli.logpmf(y, scipy.special.expit(logits)).sum(-1)
    for dtype in ("bool", "int32", "float32"):
        value = Bernoulli().log_prob(jnp.asarray(logits), jnp.asarray(y, dtype))
        np.testing.assert_allclose(value, truth, rtol=precision)


def test_bernoulli_kl_equals_the_definition(precision, rng):
    a, b = rng.normal(size=(2, 200, 1)) * rng.choice([0.1, 1, 8], size=(200, 1))
    p, q = scipy.special.expit([a, b])
    no_p, no_q = scipy.special.expit([-a, -b])
    terms = scipy.special.rel_entr(p, q) + scipy.special.rel_entr(no_p, no_q)
    value = jax.jit(Bernoulli().kl)(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(value, terms.sum(-1), rtol=10 * precision, atol=1e-15)


@pytest.mark.long
def test_bernoulli_is_the_categorical_of_two_classes(precision, rng):
    a, b, t = (jnp.asarray(x) for x in rng.normal(size=(3, 50, 1)) * 3)

    def two(z):
        return jnp.concatenate([z, jnp.zeros_like(z)], axis=-1)

    np.testing.assert_allclose(
        jax.jit(Bernoulli().kl)(a, b),
        jax.jit(Categorical().kl)(two(a), two(b)),
        rtol=precision,
    )
    np.testing.assert_allclose(
        Bernoulli().fisher_vp(a, t)[..., 0],
        Categorical().fisher_vp(two(a), two(t))[..., 0],
        rtol=10 * precision,
    )


def test_bernoulli_fisher_equals_the_enumerated_one(precision, rng):
    outputs = jnp.asarray(rng.normal(size=(3, 3)))
    outcomes = list(itertools.product([0, 1], repeat=3))
    fisher, mean = enumerated(Bernoulli(), outputs, outcomes)
    np.testing.assert_allclose(mean, 0, atol=precision)
    np.testing.assert_allclose(dense(Bernoulli(), outputs), fisher, atol=precision)


def test_gaussian_equals_scipy_and_the_definition(precision, rng):
    mean_p, mean_q, y = rng.normal(size=(3, 5, 3))
    likelihood = Gaussian(scale=0.3)
    truth = scipy.stats.norm.logpdf(y, mean_p, 0.3).sum(-1)
    value = likelihood.log_prob(jnp.asarray(mean_p), jnp.asarray(y))
    np.testing.assert_allclose(value, truth, rtol=precision)
    kl = likelihood.kl(jnp.asarray(mean_p), jnp.asarray(mean_q))
    truth = ((mean_p - mean_q) ** 2).sum(-1) / (2 * 0.3**2)
    np.testing.assert_allclose(kl, truth, rtol=precision)
    fisher = dense(likelihood, jnp.asarray(mean_p))
    truth = np.broadcast_to(np.eye(3) / 0.09, (5, 3, 3))
    np.testing.assert_allclose(fisher, truth, rtol=precision)


def test_diagonal_gaussian_equals_scipy_and_the_definition(precision, rng):
    mean_p, l_p, mean_q, l_q, y = rng.normal(size=(5, 5, 3))
    p = {"mean": jnp.asarray(mean_p), "log_scale": jnp.asarray(l_p)}
    q = {"mean": jnp.asarray(mean_q), "log_scale": jnp.asarray(l_q)}
    truth = scipy.stats.norm.logpdf(y, mean_p, np.exp(l_p)).sum(-1)
    value = DiagonalGaussian().log_prob(p, jnp.asarray(y))
    np.testing.assert_allclose(value, truth, rtol=precision)
    variance_p, variance_q = np.exp(2 * l_p), np.exp(2 * l_q)
    truth = np.sum(
        l_q - l_p + (variance_p + (mean_p - mean_q) ** 2) / (2 * variance_q) - 0.5, -1
    )
    np.testing.assert_allclose(
        jax.jit(DiagonalGaussian().kl)(p, q), truth, rtol=10 * precision
    )
    product = DiagonalGaussian().fisher_vp(p, q)
    np.testing.assert_allclose(
        product["mean"], mean_q / variance_p, rtol=10 * precision
    )
    np.testing.assert_allclose(product["log_scale"], 2 * l_q, rtol=precision)


def test_poisson_equals_scipy_and_the_definition(precision, rng):
    a, b = rng.normal(size=(2, 5, 3))
    y = rng.integers(6, size=(5, 3))
    truth = scipy.stats.poisson.logpmf(y, np.exp(a)).sum(-1)
    value = Poisson().log_prob(jnp.asarray(a), jnp.asarray(y))
    np.testing.assert_allclose(value, truth, rtol=10 * precision)
    truth = (np.exp(b) - np.exp(a) + np.exp(a) * (a - b)).sum(-1)
    kl = jax.jit(Poisson().kl)(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(kl, truth, rtol=10 * precision)


def test_poisson_fisher_equals_the_enumerated_one(precision, rng):
    outputs = jnp.asarray(rng.normal(size=(3, 1)))
    fisher, mean = enumerated(Poisson(), outputs, [(k,) for k in range(60)])
    np.testing.assert_allclose(mean, 0, atol=20 * precision)
    np.testing.assert_allclose(dense(Poisson(), outputs), fisher, rtol=20 * precision)


SAMPLED = {
    "categorical": (Categorical(), jnp.array([0.3, -1.0, 0.5])),
    "bernoulli": (Bernoulli(), jnp.array([0.3, -1.0, 3.0])),
    "gaussian": (Gaussian(scale=2.0), jnp.array([0.3, -1.0, 3.0])),
    "poisson": (Poisson(), jnp.array([0.3, -1.0, 1.0])),
    "diagonal gaussian": (
        DiagonalGaussian(),
        {"mean": jnp.array([0.3, -1.0]), "log_scale": jnp.array([-1.0, 0.5])},
    ),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_scores_of_samples_have_mean_zero_and_the_fisher_as_covariance(name):
    likelihood, example = SAMPLED[name]
    num_samples = 20_000
    outputs = jax.tree.map(
        lambda z: jnp.broadcast_to(z, (num_samples, *z.shape)), example
    )

    @jax.jit
    def scores_fn(key):
        targets = likelihood.sample(key, outputs)
        return jax.grad(lambda z: likelihood.log_prob(z, targets).sum())(outputs)

    scores, unravel = _rows(scores_fn(jax.random.key(0)))
    covariance = scores.T @ scores / num_samples
    basis = np.eye(scores.shape[1], dtype=np.float32)
    columns = [
        _rows(
            jax.tree.map(lambda x: x[None], likelihood.fisher_vp(example, unravel(u)))
        )
        for u in basis
    ]
    fisher = np.stack([column[0][0] for column in columns])
    spread = np.sqrt(np.diag(fisher))
    np.testing.assert_array_less(np.abs(scores.mean(0)) / spread, 5 / num_samples**0.5)
    relative = np.abs(covariance - fisher) / np.outer(spread, spread)
    np.testing.assert_array_less(relative, 0.08)


def _rows(tree):
    """Flattens every example into one float64 row, and back for a single example."""
    leaves, structure = jax.tree.flatten(tree)
    rows = np.concatenate([np.asarray(x, float) for x in leaves], axis=-1)
    splits = np.cumsum([x.shape[-1] for x in leaves])[:-1]

    def unravel(row):
        parts = [jnp.asarray(part) for part in np.split(row, splits)]
        return jax.tree.unflatten(structure, parts)

    return rows, unravel


def test_sample_moments_are_those_of_the_distribution():
    key, n = jax.random.key(3), 20_000
    y = Gaussian(scale=2.0).sample(key, jnp.full((n, 1), 3.0))
    assert float(y.mean()) == pytest.approx(3.0, abs=0.08)
    assert float(y.std()) == pytest.approx(2.0, rel=0.03)
    outputs = {"mean": jnp.full((n, 1), -1.0), "log_scale": jnp.full((n, 1), -2.0)}
    y = DiagonalGaussian().sample(key, outputs)
    assert float(y.mean()) == pytest.approx(-1.0, abs=0.01)
    assert float(y.std()) == pytest.approx(np.exp(-2.0), rel=0.03)
    y = Poisson().sample(key, jnp.full((n, 1), 1.5))
    assert y.dtype == "float32"
    assert float(y.mean()) == pytest.approx(np.exp(1.5), rel=0.02)
    y = Bernoulli().sample(key, jnp.full((n, 1), -1.0))
    assert set(np.unique(y)) == {0.0, 1.0}
    assert float(y.mean()) == pytest.approx(1 / (1 + np.e), rel=0.05)
    y = Categorical().sample(key, jnp.zeros((n, 4)))
    assert y.dtype == "int32"
    np.testing.assert_allclose(np.bincount(y) / n, 0.25, rtol=0.05)


def test_root_of_standard_normal_coefficients_has_covariance_fisher():
    logits = jnp.array([0.3, -1.0, 0.5])
    u = jax.random.normal(jax.random.key(0), (20_000, 3))
    b_u = Categorical().sqrt_fisher_vp(jnp.broadcast_to(logits, u.shape), u)
    fisher = dense(Categorical(), logits[None])[0]
    np.testing.assert_allclose(np.cov(b_u.T), fisher, atol=0.01)


def test_product_is_the_weighted_sum_of_its_blocks(rng):
    a, b, t = (
        {
            "x": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
            "y": jnp.asarray(rng.normal(size=(5, 2)), jnp.float32),
        }
        for _ in range(3)
    )
    likelihood = Product(
        {"x": Categorical(), "y": Poisson()}, weights={"x": 0.5, "y": 4.0}
    )
    targets = {"x": jnp.array([0, 1, 2, 0, 1]), "y": jnp.ones((5, 2), int)}
    np.testing.assert_allclose(
        likelihood.kl(a, b),
        0.5 * Categorical().kl(a["x"], b["x"]) + 4 * Poisson().kl(a["y"], b["y"]),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        likelihood.log_prob(a, targets),
        0.5 * Categorical().log_prob(a["x"], targets["x"])
        + 4 * Poisson().log_prob(a["y"], targets["y"]),
        rtol=1e-6,
    )
    for method, weight_x, weight_y in (
        ("fisher_vp", 0.5, 4.0),
        ("sqrt_fisher_vp", 0.5**0.5, 2.0),
        ("sqrt_fisher_tvp", 0.5**0.5, 2.0),
    ):
        product = getattr(likelihood, method)(a, t)
        x = getattr(Categorical(), method)(a["x"], t["x"])
        y = getattr(Poisson(), method)(a["y"], t["y"])
        np.testing.assert_allclose(product["x"], weight_x * x, rtol=1e-6)
        np.testing.assert_allclose(product["y"], weight_y * y, rtol=1e-6)


def test_product_solve_inverts_the_weighted_roots(precision, rng):
    # B = √w / scale for a Gaussian; a block of weight zero has no coefficients.
    likelihood = Product(
        {"x": Gaussian(scale=0.5), "y": Poisson(), "z": Gaussian()},
        weights={"x": 4.0, "y": 0.25, "z": 0.0},
    )
    z, c = (
        {name: jnp.asarray(rng.normal(size=(5, 2))) for name in ("x", "y", "z")}
        for _ in range(2)
    )
    u = jax.jit(likelihood.sqrt_fisher_solve)(z, c)
    np.testing.assert_allclose(u["x"], 0.5 * c["x"] / 2, rtol=precision)
    root = 0.5 * np.exp(np.asarray(z["y"]) / 2)
    np.testing.assert_allclose(u["y"], c["y"] / root, rtol=precision)
    np.testing.assert_array_equal(u["z"], 0)
    image = jax.jit(likelihood.sqrt_fisher_vp)(z, u)
    np.testing.assert_allclose(image["x"], c["x"], rtol=precision)
    np.testing.assert_allclose(image["y"], c["y"], rtol=precision)


def test_product_blocks_may_have_their_own_batches(rng):
    outputs = {"interior": jnp.ones((7, 1)), "boundary": jnp.ones((3, 2))}
    likelihood = Product({"interior": Gaussian(), "boundary": Gaussian()})
    assert likelihood.batch_shape(outputs) == {"interior": (7,), "boundary": (3,)}
    product = likelihood.fisher_vp(outputs, outputs)
    assert product["interior"].shape == (7, 1)
    for call in (
        lambda: likelihood.kl(outputs, outputs),
        lambda: likelihood.log_prob(outputs, outputs),
    ):
        with pytest.raises(ValueError, match="have their own batches"):
            call()


def test_product_does_not_depend_on_the_order_of_its_names():
    one = Product({"a": Gaussian(), "b": Poisson()})
    other = Product({"b": Poisson(), "a": Gaussian()}, weights={"b": 1, "a": 1})
    assert one == other
    assert hash(one) == hash(other)
    assert list(one.blocks) == ["a", "b"]
    assert dict(one.weights) == {"a": 1.0, "b": 1.0}


def test_product_reports_the_safe_curvature_of_its_blocks():
    assert Product({"a": Gaussian()}).kl_curvature == 1.0
    assert not Product({"a": Gaussian()}).centered
    mixed = Product({"a": Gaussian(), "psi": LogAmplitude()})
    assert mixed.kl_curvature == 4.0
    assert mixed.centered


def test_log_density_metric_is_the_covariance_of_the_scores(precision, rng):
    log_density = jnp.asarray(rng.normal(size=6))
    jacobian = rng.normal(size=(6, 3))
    products = [LogDensity().fisher_vp(log_density, jnp.asarray(t)) for t in jacobian.T]
    fisher = jacobian.T @ np.stack(products, axis=-1) / 6
    truth = np.cov(jacobian.T, bias=True)
    np.testing.assert_allclose(fisher, truth, rtol=10 * precision, atol=precision)


def test_log_density_kl_averages_to_the_kl_on_the_samples(precision, rng):
    # If the batch is the whole space, each state once, p is uniform on it.
    log_q = rng.normal(size=40) * 2
    q = scipy.special.softmax(log_q)
    truth = scipy.special.rel_entr(np.full(40, 1 / 40), q).sum()
    terms = jax.jit(LogDensity().kl)(jnp.zeros(40), jnp.asarray(log_q))
    assert (np.asarray(terms) >= 0).all()
    assert float(np.mean(terms)) == pytest.approx(truth, rel=10 * precision)


def test_log_density_ignores_the_normaliser(rng):
    p, q = jnp.asarray(rng.normal(size=(2, 20)), jnp.float32)
    np.testing.assert_allclose(
        LogDensity().kl(p, q), LogDensity().kl(p, q + 8), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(LogDensity().kl(p, p), 0)


def test_log_density_kl_is_built_from_ratio_and_normaliser(rng):
    p, q = jnp.asarray(rng.normal(size=(2, 20)), jnp.float32)
    ratio = LogDensity().log_ratio(p, q)
    np.testing.assert_array_equal(ratio, q - p)
    log_normaliser_ratio = scipy.special.logsumexp(np.asarray(ratio)) - np.log(20)
    terms = LogDensity().kl_from_normaliser(p, q, jnp.float32(log_normaliser_ratio))
    np.testing.assert_allclose(terms, LogDensity().kl(p, q), rtol=1e-4, atol=1e-6)


def test_log_density_score_is_centred_and_samples_index_the_batch(rng):
    log_density = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    log_prob = LogDensity().log_prob(log_density)
    np.testing.assert_allclose(log_prob, log_density - log_density.mean(), atol=1e-6)
    index = LogDensity().sample(jax.random.key(0), log_density)
    assert index.shape == (4, 5)
    assert index.dtype == "int32"
    picked = LogDensity().log_prob(log_density, index)
    np.testing.assert_array_equal(picked, log_prob.reshape(-1)[index])
    beyond = LogDensity().log_prob(log_density, jnp.array([20, -1, 19]))
    np.testing.assert_array_equal(np.isnan(beyond), [True, True, False])


def test_complex_amplitude_metric_is_the_quantum_geometric_tensor(rng):
    psi = jnp.asarray(rng.normal(size=6) + 1j * rng.normal(size=6), jnp.complex64)
    jacobian = rng.normal(size=(6, 3)) + 1j * rng.normal(size=(6, 3))
    columns = [
        LogAmplitude().fisher_vp(psi, jnp.asarray(t, jnp.complex64)) for t in jacobian.T
    ]
    metric = jacobian.conj().T @ np.stack(columns, axis=-1) / 6
    centred = jacobian - jacobian.mean(0)
    np.testing.assert_allclose(metric, centred.conj().T @ centred / 6, rtol=1e-4)


def test_amplitude_kl_is_that_of_the_squared_modulus(rng):
    p, q = rng.normal(size=(2, 9)) + 1j * rng.normal(size=(2, 9))
    p, q = jnp.asarray(p, jnp.complex64), jnp.asarray(q, jnp.complex64)
    value = LogAmplitude().kl(p, q)
    assert value.dtype == "float32"
    truth = LogDensity().kl(2 * p.real, 2 * q.real)
    np.testing.assert_allclose(value, truth, rtol=1e-6)
    np.testing.assert_allclose(
        LogAmplitude().log_prob(p), LogDensity().log_prob(2 * p.real), rtol=1e-6
    )
