"""Mistakes are found while tracing, with messages that say what to do."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from ngd_jax.likelihoods import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    FromDistribution,
    FromKL,
    Gaussian,
    Likelihood,
    LogAmplitude,
    LogDensity,
    Poisson,
    Product,
)

F = jnp.zeros  # float32 arrays of a shape
PAIR = {"mean": F((4, 3)), "log_scale": F((4, 3))}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Gaussian(scale=-1.0), ValueError, r"`scale` must be positive, got -1"),
        (lambda: Gaussian(scale=0), ValueError, r"`scale` must be positive, got 0"),
        (lambda: Gaussian(scale=float("inf")), ValueError, "`scale` must be positive"),
        (lambda: Gaussian(scale=float("nan")), ValueError, "`scale` must be positive"),
        (lambda: Gaussian(scale=F(3)), TypeError, r"Python number.*float32\[3\]"),
        (lambda: Bernoulli(event_ndims=-1), ValueError, "`event_ndims` must not be"),
        (lambda: Poisson(event_ndims=1.0), TypeError, "`event_ndims` must be an int"),
        (lambda: DiagonalGaussian(event_ndims=True), TypeError, "must be an integer"),
        (lambda: Product({}), TypeError, "`blocks` must be a dict of at least one"),
        (lambda: Product({"a": Gaussian}), TypeError, r"`blocks\['a'\]` must be a Lik"),
        (lambda: Product({1: Gaussian()}), TypeError, "strings as keys, got 1"),
        (
            lambda: Product({"a": Gaussian()}, weights={"b": 1.0}),
            ValueError,
            r"`weights` must have exactly the names of the blocks, \['a'\]",
        ),
        (
            lambda: Product({"a": Gaussian()}, weights={"a": -1.0}),
            ValueError,
            r"`weights\['a'\]` must not be negative, got -1.0",
        ),
        (lambda: FromKL(3), TypeError, "`kl_fn` must be a function, got 3"),
        (lambda: FromKL(len, sample_fn=3), TypeError, "`sample_fn` must be a function"),
        (lambda: FromDistribution(None), TypeError, "`make` must be a function"),
    ],
)
def test_constructors_name_the_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("likelihood", "outputs", "error", "message"),
    [
        (
            Categorical(),
            F(()),
            ValueError,
            r"Categorical\(\) must be an array of logits.*float32\[\]",
        ),
        (Categorical(), F((4, 0)), ValueError, "two or more classes"),
        (Categorical(), F((4, 1)), ValueError, r"float32\[4, 1\].*use Bernoulli\(\)"),
        (Categorical(), jnp.zeros((4, 3), int), TypeError, r"got int32\[4, 3\]; conv"),
        (Categorical(), [0.0, 1.0], TypeError, "must be an array.*got a list"),
        (Categorical(), {"logits": F((4, 3))}, TypeError, r"got \{'logits': float32"),
        (Categorical(), F((4, 3)) + 0j, TypeError, "floating point dtype, got complex"),
        (Bernoulli(event_ndims=2), F(3), ValueError, "fewer `event_ndims`"),
        (Gaussian(), F(()), ValueError, r"shape \[\.\.\., D1\]"),
        (Poisson(), None, TypeError, "got None"),
        (
            DiagonalGaussian(),
            F((4, 3)),
            TypeError,
            r"\['mean', 'log_scale'\], got float",
        ),
        (
            DiagonalGaussian(),
            {"mean": F(3)},
            ValueError,
            r"exactly the keys.*got \{'mean': float32",
        ),
        (
            DiagonalGaussian(),
            {"mean": F((4, 3)), "log_scale": F(3)},
            ValueError,
            r"same shape.*jnp.broadcast_to\(log_scale, mean.shape\)",
        ),
        (
            Product({"a": Gaussian()}),
            F((4, 3)),
            TypeError,
            r"dict with exactly the keys \['a'\]",
        ),
        (Product({"a": Gaussian()}), {"b": F(3)}, ValueError, r"\['a'\], got \{'b': "),
        (LogDensity(), F(()), ValueError, "do not `vmap` over them"),
        (LogDensity(), F(3) + 0j, TypeError, "floating point dtype, got complex64"),
        (LogAmplitude(), jnp.zeros(3, int), TypeError, "floating or complex dtype"),
        (FromKL(lambda p, q: p + q), jnp.zeros(3, int), TypeError, "got int32"),
    ],
)
def test_outputs_that_do_not_fit_are_named(likelihood, outputs, error, message):
    with pytest.raises(error, match="(?s)`outputs`.*" + message) as caught:
        likelihood.batch_shape(outputs)
    assert type(likelihood).__name__ in str(caught.value)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "error", "message"),
    [
        (Categorical(), F((4, 3)), F(4), TypeError, r"`.astype\(jnp.int32\)`"),
        (Categorical(), F((4, 3)), jnp.zeros(5, int), ValueError, r"\(4,\)"),
        (
            Categorical(),
            F((4, 3)),
            jnp.zeros((4, 1), int),
            ValueError,
            r"int32\[4, 1\]",
        ),
        (Categorical(), F((4, 3)), 2, TypeError, "got 2"),
        (Gaussian(), F((4, 1)), F(4), ValueError, r"shape \(4, 1\).*float32\[4\]"),
        (Bernoulli(), F((4, 3)), F((4, 1)), ValueError, "reshape the targets"),
        (Poisson(), F((4, 3)), [1, 2], TypeError, "real array of counts, got a list"),
        (
            Poisson(),
            F((4, 3)),
            F((4, 3)) + 0j,
            TypeError,
            "must be a real array of counts",
        ),
        (DiagonalGaussian(), PAIR, F((4, 1)), ValueError, r"shape \(4, 3\)"),
        (LogDensity(), F(4), F(4), TypeError, "be None or an array of integer"),
        (Product({"a": Gaussian()}), {"a": F((4, 3))}, F(4), TypeError, "dict"),
    ],
)
def test_targets_that_do_not_fit_are_named(
    likelihood, outputs, targets, error, message
):
    with pytest.raises(error, match="(?s)`targets`.*" + message) as caught:
        likelihood.log_prob(outputs, targets)
    assert type(likelihood).__name__ in str(caught.value)


@pytest.mark.parametrize("likelihood", [Categorical(), Poisson(), LogDensity()])
@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("kl", "outputs_q"),
        ("fisher_vp", "tangents"),
        ("sqrt_fisher_vp", "coefficients"),
        ("sqrt_fisher_tvp", "tangents"),
    ],
)
def test_second_arguments_that_do_not_fit_are_named(likelihood, method, name):
    function = getattr(likelihood, method)
    outputs = F((4, 3))
    with pytest.raises(ValueError, match=rf"`{name}`.*shapes of `outputs`"):
        function(outputs, F((4, 1)))
    with pytest.raises(ValueError, match=rf"`{name}`.*tree structure of `outputs`"):
        function(outputs, {"z": outputs})
    with pytest.raises(TypeError, match=rf"`{name}`.*floating point dtype"):
        function(outputs, jnp.zeros((4, 3), int))


def test_kl_function_that_returns_no_array_is_named():
    with pytest.raises(TypeError, match=r"`kl` of FromKL.*one array.*got a tuple"):
        FromKL(lambda p, q: (p, q)).batch_shape(F(3))


def test_errors_are_raised_while_tracing():
    with pytest.raises(ValueError, match="`tangents`"):
        jax.eval_shape(Categorical().fisher_vp, F((4, 3)), F((4, 2)))


def test_missing_functions_are_named():
    likelihood = FromKL(lambda p, q: jnp.sum((p - q) ** 2, -1) / 2)
    with pytest.raises(TypeError, match=r"FromKL\(kl_fn, log_prob_fn=...\)"):
        likelihood.log_prob(F((4, 3)), F((4, 3)))
    with pytest.raises(TypeError, match=r"FromKL\(kl_fn, sample_fn=...\)"):
        likelihood.sample(jax.random.key(0), F((4, 3)))
    incomplete = FromDistribution(lambda _: object())
    with pytest.raises(TypeError, match="method `kl_divergence`, got a object"):
        incomplete.kl(F(3), F(3))


def mean_over_the_batch(p, q):
    return jnp.mean((p - q) ** 2)


@pytest.mark.parametrize(
    ("kl_fn", "outputs"),
    [
        (mean_over_the_batch, F((4, 3))),
        (mean_over_the_batch, F(4)),
        (mean_over_the_batch, F((1, 3))),
        (lambda p, q: jnp.einsum("nd,nd->", p - q, p - q), F((4, 3))),
        (lambda p, q: jnp.sum((p - q) ** 2, axis=0), F((4, 3))),
        (lambda p, q: jnp.sum((p - q) ** 2, axis=-1, keepdims=True), F((4, 3))),
        (lambda *_: 0.5, F((4, 3))),
        (
            lambda p, q: jnp.sum((p["z"] - q["z"]) ** 2, -1) * q["shared"],
            {"z": F((4, 3)), "shared": F(())},
        ),
    ],
)
def test_kl_that_is_not_one_number_per_example_is_named(kl_fn, outputs):
    class Own(Likelihood):
        def kl(self, outputs_p, outputs_q):
            return kl_fn(outputs_p, outputs_q)

    @dataclasses.dataclass
    class Distribution:
        outputs: jax.Array

        def kl_divergence(self, other):
            return kl_fn(self.outputs, other.outputs)

    for likelihood in (FromKL(kl_fn), Own(), FromDistribution(Distribution)):
        message = r"`kl` of .*one value per example.*got float32\[.*do not average"
        for method in (likelihood.fisher_vp, likelihood.sqrt_fisher_vp):
            with pytest.raises(ValueError, match=message):
                method(outputs, outputs)
        with pytest.raises(ValueError, match=message):
            Product({"a": likelihood}).batch_shape({"a": outputs})


@pytest.mark.parametrize(
    ("kl_fn", "outputs"),
    [
        (lambda p, q: (p - q) ** 2, F(())),
        (lambda p, q: jnp.sum((p - q) ** 2, -1), F(3)),
        (lambda p, q: jnp.sum((p - q) ** 2, (-2, -1)), F((2, 3))),
        (
            lambda p, q: jnp.sum((p["a"] - q["a"]) ** 2, -1) * q["b"],
            {"a": F(3), "b": F(())},
        ),
    ],
)
def test_kl_of_one_example_without_a_batch_is_a_scalar(kl_fn, outputs):
    assert FromKL(kl_fn).batch_shape(outputs) == ()
    batch = jax.tree.map(lambda x: F((4, *x.shape)), outputs)
    assert FromKL(kl_fn).batch_shape(batch) == (4,)


def test_from_kl_hands_its_functions_wide_outputs():
    seen = []

    def kl_fn(p, q):
        seen.append((p.dtype, q.dtype))
        return jnp.sum((p - q) ** 2, -1) / 2

    likelihood = FromKL(kl_fn, lambda z, y: -jnp.sum((z - y) ** 2, -1) / 2)
    narrow = jnp.ones((4, 3), jnp.bfloat16)
    assert likelihood.kl(narrow, narrow).dtype == "float32"
    assert likelihood.fisher_vp(narrow, narrow).dtype == "bfloat16"
    assert likelihood.log_prob(narrow, F((4, 3))).dtype == "float32"
    assert {str(d) for pair in seen for d in pair} == {"float32"}
