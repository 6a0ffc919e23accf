"""Where rounding and overflow bite: tiny KLs, huge logits, masked classes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ngd_jax.likelihoods import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    FromKL,
    Gaussian,
    Likelihood,
    LogDensity,
    Poisson,
)
from ngd_jax.likelihoods.numerics import exp_excess, log_mean_exp, relative_entropy
from tests.marks import long_unless


def jit_method(likelihood, method):
    """A method of a likelihood, compiled once for all tests."""
    return jitted(getattr(likelihood, method))


@functools.cache
def jitted(function):
    """Compiles a function once for all tests; eager ones compile each operation."""
    return jax.jit(function)


@pytest.fixture
def rng():
    return np.random.default_rng(2)


def gaussian_outputs(values):
    half = values.shape[-1] // 2
    return {"mean": values[..., :half], "log_scale": values[..., half:]}


ELEMENTARY = {
    "categorical": (Categorical(), lambda z: z),
    "bernoulli": (Bernoulli(), lambda z: z),
    "poisson": (Poisson(), lambda z: z),
    "gaussian": (Gaussian(), lambda z: z),
    "diagonal gaussian": (DiagonalGaussian(), gaussian_outputs),
}
every_distribution = pytest.mark.parametrize("name", ELEMENTARY)


@every_distribution
@pytest.mark.parametrize("step", [1e-5, 1e-4, 1e-3, 1e-2])
def test_tiny_kl_keeps_its_digits_in_float32(name, step, rng):
    # KLs of 1e-10 to 1e-4; the truth is the same function of the same outputs in
    # float64, where the definition still has six digits.
    likelihood, outputs_fn = ELEMENTARY[name]
    p = (rng.normal(size=(50, 10)) * 2).astype(np.float32)
    q = p + np.float32(step) * rng.normal(size=p.shape).astype(np.float32)
    kl = jit_method(likelihood, "kl")(outputs_fn(p), outputs_fn(q))
    truth = _kl_by_definition(name, p.astype(float), q.astype(float))
    np.testing.assert_allclose(kl, truth, rtol=1e-3, atol=1e-14)


def _kl_by_definition(name, a, b):
    match name:
        case "categorical":
            log_p, log_q = scipy.special.log_softmax(np.stack([a, b]), axis=-1)
            terms = np.exp(log_p) * (log_p - log_q)
        case "bernoulli":
            p, no_p = scipy.special.expit([a, -a])
            ratio = scipy.special.log_expit(a) - scipy.special.log_expit(b)
            no_ratio = scipy.special.log_expit(-a) - scipy.special.log_expit(-b)
            terms = p * ratio + no_p * no_ratio
        case "poisson":
            terms = np.exp(b) - np.exp(a) + np.exp(a) * (a - b)
        case "gaussian":
            terms = (a - b) ** 2 / 2
        case _:
            (mean_p, l_p), (mean_q, l_q) = np.split(a, 2, -1), np.split(b, 2, -1)
            r = l_q - l_p
            squares = (mean_p - mean_q) ** 2 * np.exp(-2 * l_q)
            terms = r + np.expm1(-2 * r) / 2 + squares / 2
    return terms.sum(-1)


def test_categorical_kl_ignores_a_constant_added_to_all_logits(rng):
    p = rng.normal(size=(50, 10)).astype(np.float32)
    q = p + np.float32(1e-3) * rng.normal(size=p.shape).astype(np.float32)
    shifted = (q + np.float32(64)).astype(np.float32)
    truth = _kl_by_definition("categorical", p.astype(float), shifted.astype(float))
    # 64 + x is spaced by 8e-6: the differences themselves have three digits.
    np.testing.assert_allclose(
        jit_method(Categorical(), "kl")(p, shifted), truth, rtol=2e-2
    )


@every_distribution
@pytest.mark.parametrize("dtype", long_unless(["float32"], ["float32", "float64"]))
def test_outputs_of_ten_thousand_give_no_nan(name, dtype):
    likelihood, outputs_fn = ELEMENTARY[name]
    with jax.enable_x64(dtype == "float64"):
        corners = np.array([-1e4, -90.0, 0.0, 90.0, 1e4])
        rows = np.stack(np.meshgrid(*[corners] * 4), axis=-1).reshape(-1, 4)
        p, q = jnp.asarray(rows).astype(dtype), jnp.asarray(rows[::-1]).astype(dtype)
        kl_fn = jit_method(likelihood, "kl")
        kl = np.asarray(kl_fn(outputs_fn(p), outputs_fn(q)))
        assert not np.isnan(kl).any()
        assert (kl >= 0).all()
        np.testing.assert_array_equal(kl_fn(outputs_fn(p), outputs_fn(p)), 0)
        # Unit tangents; a rate or a precision may be as large as the dtype holds.
        t = outputs_fn(jnp.ones((len(rows), 4), kl.dtype))

        @jax.jit
        def everything_else(z, t):
            products = [
                likelihood.fisher_vp(z, t),
                likelihood.sqrt_fisher_vp(z, t),
                likelihood.sqrt_fisher_tvp(z, t),
            ]
            samples = likelihood.sample(jax.random.key(0), z)
            return products, samples, likelihood.log_prob(z, samples)

        products, samples, log_prob = everything_else(outputs_fn(p), t)
        for leaf in jax.tree.leaves(products):
            assert np.isfinite(leaf).all()
        assert not np.isnan(np.asarray(samples, float)).any()
        assert not np.isnan(np.asarray(log_prob)).any()


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "gaussian"])
def test_kl_has_finite_gradients_at_extreme_outputs(name):
    likelihood, _ = ELEMENTARY[name]
    p = jnp.array([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, -1e4, 1e4]])
    q = jnp.array([[-1e4, 1e4, 0.0], [1e4, 0.0, 90.0], [-1e4, -1e4, 1e4]])
    gradients_fn = jax.grad(lambda p, q: likelihood.kl(p, q).sum(), argnums=(0, 1))
    for gradient in jax.jit(gradients_fn)(p, q):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "poisson"])
def test_kl_gradient_is_the_closed_form_far_from_equality_too(name, rng):
    # ∂KL(p‖q)/∂q = mean of q − mean of p in natural parameters.
    likelihood, _ = ELEMENTARY[name]
    a = rng.normal(size=(200, 3)) * rng.choice([0.01, 1, 5], size=(200, 1))
    b = a + rng.normal(size=a.shape) * rng.choice([1e-3, 0.3, 5], size=(200, 1))
    mean_fn = {
        "categorical": lambda z: scipy.special.softmax(z, axis=-1),
        "bernoulli": scipy.special.expit,
        "poisson": np.exp,
    }[name]
    with jax.enable_x64(True):
        gradient_fn = jax.grad(lambda p, q: likelihood.kl(p, q).sum(), argnums=1)
        gradient = jax.jit(gradient_fn)(jnp.asarray(a), jnp.asarray(b))
    truth = mean_fn(b) - mean_fn(a)
    np.testing.assert_allclose(gradient, truth, rtol=1e-9, atol=1e-10)


def test_categorical_kl_of_opposite_certainties_is_their_distance():
    p, q = jnp.array([0.0, 1e4]), jnp.array([0.0, -1e4])
    assert float(jit_method(Categorical(), "kl")(p, q)) == 1e4
    assert float(jit_method(Bernoulli(), "kl")(p[1:], q[1:])) == 1e4


@pytest.mark.parametrize("dtype", long_unless(["float32"], ["bfloat16", "float32"]))
def test_masked_classes_are_as_if_they_were_not_there(dtype, rng):
    p, q, t = (jnp.asarray(x, dtype) for x in rng.normal(size=(3, 6, 3)))
    keep = np.array([0, 2, 3])

    def masked(x, fill):
        return jnp.full((6, 5), fill, x.dtype).at[:, keep].set(x)

    wide_p, wide_q = masked(p, -jnp.inf), masked(q, -jnp.inf)
    likelihood = Categorical()
    np.testing.assert_allclose(
        jit_method(likelihood, "kl")(wide_p, wide_q),
        jit_method(likelihood, "kl")(p, q),
        rtol=1e-5,
    )
    np.testing.assert_array_equal(jit_method(likelihood, "kl")(wide_p, wide_p), 0)
    np.testing.assert_allclose(
        jit_method(likelihood, "log_prob")(wide_p, jnp.full(6, 2)),
        jit_method(likelihood, "log_prob")(p, jnp.full(6, 1)),
        rtol=1e-6,
    )
    one_hot = jax.nn.one_hot(jnp.full(6, 2), 5)
    np.testing.assert_allclose(
        jit_method(likelihood, "log_prob")(wide_p, one_hot),
        jit_method(likelihood, "log_prob")(p, jnp.full(6, 1)),
        rtol=1e-6,
    )
    for method in ("fisher_vp", "sqrt_fisher_vp", "sqrt_fisher_tvp"):
        product = jit_method(likelihood, method)(wide_p, masked(t, 7.0))
        expected = masked(jit_method(likelihood, method)(p, t), 0.0)
        np.testing.assert_allclose(
            np.asarray(product, float), np.asarray(expected, float), atol=1e-6
        )
    samples = likelihood.sample(jax.random.key(0), jnp.tile(wide_p, (100, 1)))
    assert set(np.unique(samples)) <= set(keep.tolist())


@pytest.mark.long
def test_masked_classes_leave_gradients_and_curvature_finite():
    p = jnp.array([[0.5, -jnp.inf, -1.0]])
    likelihood = Categorical()
    for argnums in (0, 1):
        gradient_fn = jax.jit(
            jax.grad(lambda *z: likelihood.kl(*z).sum(), argnums=argnums)
        )
        np.testing.assert_allclose(gradient_fn(p, p), 0.0, atol=1e-7)
        np.testing.assert_array_less(np.abs(gradient_fn(p, p + 0.5)), 1e-6)
    t = jnp.array([[1.0, 0.0, -1.0]])
    product = jax.jit(FromKL(likelihood.kl).fisher_vp)(p, t)
    np.testing.assert_allclose(
        product, jit_method(likelihood, "fisher_vp")(p, t), atol=1e-6
    )
    gradient = jax.grad(lambda z: likelihood.log_prob(z, jnp.array([0])).sum())(p)
    assert np.isfinite(gradient).all()
    root_gradient = jax.grad(lambda z: likelihood.sqrt_fisher_vp(z, t).sum())(p)
    assert np.isfinite(root_gradient).all()


MASKED = [
    [0.5, -np.inf, -1.0],
    [-np.inf, -np.inf, 2.0],  # a single legal class
    [0.0, 0.0, -np.inf],
    [1e4, -np.inf, -1e4],
    [200.0, 0.0, -np.inf],
]


@pytest.mark.parametrize(
    "method",
    long_unless(
        {"fisher_vp", "kl"},
        ["fisher_vp", "sqrt_fisher_vp", "sqrt_fisher_tvp", "sqrt_fisher_solve", "kl"],
    ),
)
def test_masked_classes_leave_values_and_all_derivatives_finite(method, rng):
    logits = jnp.array(MASKED)
    t = jnp.asarray(rng.normal(size=logits.shape), jnp.float32)
    function = getattr(Categorical(), method)

    @jax.jit
    def derivatives(z, other):
        def forward(z, other):
            return jax.jvp(function, (z, other), (t, t[::-1]))[1]

        def reverse(z, other):
            scalar = lambda *args: jnp.sum(jnp.sin(function(*args)))  # noqa: E731
            return jax.grad(scalar, argnums=(0, 1))(z, other)

        value, vjp_fn = jax.vjp(forward, z, other)
        _, of_forward = jax.jvp(forward, (z, other), (t, t))
        _, of_reverse = jax.jvp(reverse, (z, other), (t, t))
        reverse_of_forward = vjp_fn(jnp.ones_like(value))
        first = function(z, other), value, reverse(z, other)
        return first, of_forward, of_reverse, reverse_of_forward

    others = [logits + t, logits] if method == "kl" else [t]
    for other in others:
        chex.assert_tree_all_finite(derivatives(logits, other))


def test_metric_of_a_single_legal_class_is_zero():
    logits, t = jnp.array([[-jnp.inf, -jnp.inf, 2.0]]), jnp.array([[1.0, 2.0, 3.0]])
    for method in ("fisher_vp", "sqrt_fisher_vp", "sqrt_fisher_tvp"):
        np.testing.assert_array_equal(jit_method(Categorical(), method)(logits, t), 0)


def test_class_that_only_one_side_excludes():
    both, one = jnp.array([0.0, 0.0]), jnp.array([0.0, -jnp.inf])
    assert float(jit_method(Categorical(), "kl")(both, one)) == np.inf
    assert float(jit_method(Categorical(), "kl")(one, both)) == pytest.approx(np.log(2))


@pytest.mark.parametrize("label", [-1, -3, 3, 1000])
def test_label_out_of_range_is_nan_in_value_and_gradient(label):
    logits, labels = jnp.zeros((2, 3)), jnp.array([label, 1])
    likelihood = Categorical()
    value = jit_method(likelihood, "log_prob")(logits, labels)
    np.testing.assert_array_equal(np.isnan(value), [True, False])
    gradient = jax.grad(lambda z: likelihood.log_prob(z, labels).sum())(logits)
    assert np.isnan(gradient[0]).all()
    assert np.isfinite(gradient[1]).all()


def test_small_label_dtypes_reach_no_further_than_their_range():
    logits = jnp.zeros((2, 300))
    value = jit_method(Categorical(), "log_prob")(
        logits, jnp.array([-1, 127], jnp.int8)
    )
    np.testing.assert_array_equal(np.isnan(value), [True, False])


@pytest.mark.parametrize("name", ["categorical", "gaussian", "poisson"])
def test_nan_outputs_are_not_hidden(name):
    likelihood: Likelihood = ELEMENTARY[name][0]
    good, bad = jnp.zeros((2, 3)), jnp.zeros((2, 3)).at[0, 1].set(jnp.nan)
    for p, q in ((bad, good), (good, bad), (bad, bad)):
        np.testing.assert_array_equal(
            np.isnan(jit_method(likelihood, "kl")(p, q)), [True, False]
        )
    np.testing.assert_array_equal(
        np.isnan(jit_method(likelihood, "fisher_vp")(bad, good + 1)).any(-1),
        [name != "gaussian", False],
    )


def test_log_density_survives_unlikely_samples():
    p = jnp.array([0.0, 1.0, 2.0, 3.0])
    q = jnp.array([-1e4, 1.0, 2.0, 1e4])
    kl = np.asarray(jit_method(LogDensity(), "kl")(p, q))
    assert np.isfinite(kl).all()
    assert (kl >= 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exp_excess_is_accurate_at_every_size(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = np.concatenate([-np.geomspace(1e-9, 60, 300), np.geomspace(1e-9, 60, 300)])
        x = x.astype(dtype)
        wide = x.astype(np.longdouble)
        series = wide**2 / 2 * (1 + wide / 3 + wide**2 / 12 + wide**3 / 60)
        truth = np.where(np.abs(wide) < 1e-4, series, np.expm1(wide) - wide)
        rtol = 1e-5 if dtype == "float32" else 1e-13
        np.testing.assert_allclose(
            np.asarray(jitted(exp_excess)(jnp.asarray(x)), np.longdouble),
            truth,
            rtol=rtol,
        )
        slope = jax.jit(jax.vmap(jax.grad(exp_excess)))(jnp.asarray(x))
        np.testing.assert_allclose(slope, np.expm1(x), rtol=rtol)


def test_relative_entropy_is_continuous_where_its_formulas_meet():
    p, d = 0.3, np.float32([-1.0001, -1.0, -0.9999, 0.9999, 1.0, 1.0001])
    q = p * np.exp(-d.astype(float))
    truth = q - p + p * d.astype(float)
    value = relative_entropy(
        jnp.full(6, p), jnp.asarray(q, jnp.float32), jnp.asarray(d)
    )
    np.testing.assert_allclose(value, truth, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0])
def test_log_mean_exp_equals_scipy(scale, rng):
    values, weights = rng.normal(size=(4, 5)) * scale, rng.uniform(size=(4, 5))
    weights[0, 0] = 0
    values = values.astype(np.float32)
    truth = scipy.special.logsumexp(values.astype(float), b=weights / weights.sum())
    value = jitted(log_mean_exp)(jnp.asarray(values), jnp.asarray(weights))
    assert float(value) == pytest.approx(truth, rel=1e-5, abs=1e-7 * scale)
    plain = scipy.special.logsumexp(values.astype(float)) - np.log(20)
    assert float(jitted(log_mean_exp)(jnp.asarray(values))) == pytest.approx(
        plain, rel=1e-5, abs=1e-7 * scale
    )
    assert float(jitted(log_mean_exp)(jnp.zeros(7))) == 0.0
