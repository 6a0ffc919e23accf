"""Likelihoods made from a KL, from a distribution, or by subclassing."""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngd_jax.likelihoods import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    FromDistribution,
    FromKL,
    Likelihood,
)
from tests.likelihoods.cases import (
    BATCH,
    CASES,
    PRODUCTS,
    assert_close,
    jitted,
)
from tests.marks import long_unless


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_users_likelihood_of_one_method_has_everything_but_log_prob_and_sample(rng):
    class Laplace(Likelihood):  # smooth near equality: log scale of a Laplace density
        def kl(self, outputs_p, outputs_q):
            d = outputs_p["log_scale"] - outputs_q["log_scale"]
            return jnp.sum(jnp.expm1(d) - d, axis=-1)

    z = {"log_scale": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)}
    t = {"log_scale": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)}
    likelihood = Laplace()
    assert likelihood.batch_shape(z) == (4,)
    assert not likelihood.centered
    assert likelihood.kl_curvature == 1.0
    for method in PRODUCTS:
        assert_close(jitted(likelihood, method)(z, t), t)
    with pytest.raises(TypeError, match=r"Define `log_prob\(self, outputs, targets\)`"):
        jitted(likelihood, "log_prob")(z, z)
    with pytest.raises(TypeError, match=r"Define `sample\(self, key, outputs\)`"):
        likelihood.sample(jax.random.key(0), z)


def test_likelihood_without_kl_cannot_be_made():
    class Empty(Likelihood):
        pass

    with pytest.raises(TypeError, match="kl"):
        Empty()


def test_derived_root_of_a_singular_metric_is_finite():
    logits = jnp.array([[200.0, 0.0, -200.0], [0.0, 0.0, 0.0]])
    root = jitted(FromKL(Categorical().kl), "sqrt_fisher_vp")(logits, jnp.ones((2, 3)))
    np.testing.assert_allclose(root, np.zeros((2, 3)), atol=1e-3)


@pytest.mark.parametrize(
    "sizes",
    [
        (4, 2, 0),
        pytest.param((4, 0, 0), marks=pytest.mark.long),
        pytest.param((0, 2, 3), marks=pytest.mark.long),
        (0, 0, 0),
    ],
)
def test_derived_products_accept_outputs_without_entries(sizes):
    count, size, rows = sizes

    def kl_fn(p, q):
        squares = jax.tree.map(lambda x, y: (x - y) ** 2 / 2, p, q)
        return jnp.sum(squares["a"], -1) + jnp.sum(squares["b"], (-2, -1))

    outputs = {"a": jnp.ones((count, size)), "b": jnp.ones((count, rows, 3))}
    for method in (*PRODUCTS, "sqrt_fisher_solve"):
        assert_close(jax.jit(getattr(FromKL(kl_fn), method))(outputs, outputs), outputs)


def test_derived_solve_inverts_the_root_on_its_range(rng):
    logits = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    derived = FromKL(Categorical().kl)
    c = jitted(Categorical(), "fisher_vp")(logits, logits)  # sums to zero
    u = jitted(derived, "sqrt_fisher_solve")(logits, c)
    assert_close(jitted(derived, "sqrt_fisher_vp")(logits, u), c, 1e-4, 1e-5)
    constant = jitted(derived, "sqrt_fisher_solve")(logits, jnp.ones((4, 3)))
    assert_close(constant, jnp.zeros((4, 3)), atol=1e-3)  # B 1 = 0: least norm


DISTRAX_CASES = {
    "categorical": (
        Categorical(),
        lambda z: distrax.Categorical(logits=z),
    ),
    "diagonal gaussian": (
        DiagonalGaussian(),
        lambda z: distrax.MultivariateNormalDiag(z["mean"], jnp.exp(z["log_scale"])),
    ),
    "bernoulli": (
        Bernoulli(),
        lambda z: distrax.Independent(
            distrax.Bernoulli(logits=z), reinterpreted_batch_ndims=1
        ),
    ),
}


@pytest.mark.parametrize("name", long_unless({"categorical"}, DISTRAX_CASES.keys()))
def test_distrax_distributions_agree_with_the_closed_forms(name, rng):
    likelihood, make = DISTRAX_CASES[name]
    derived = FromDistribution(make)
    assert not derived.centered
    z, t = CASES[name].outputs(rng), CASES[name].outputs(rng)
    assert derived.batch_shape(z) == BATCH
    assert_close(
        jitted(derived, "kl")(z, t), jitted(likelihood, "kl")(z, t), 1e-4, 1e-5
    )
    assert_close(
        jitted(derived, "fisher_vp")(z, t),
        jitted(likelihood, "fisher_vp")(z, t),
        1e-4,
        1e-5,
    )
    root = jitted(derived, "sqrt_fisher_vp")(
        z, jitted(derived, "sqrt_fisher_tvp")(z, t)
    )
    assert_close(root, jitted(likelihood, "fisher_vp")(z, t), 1e-3, 1e-4)
    samples = derived.sample(jax.random.key(0), z)
    assert_close(
        jitted(derived, "log_prob")(z, samples),
        jitted(likelihood, "log_prob")(z, samples),
        1e-4,
    )
