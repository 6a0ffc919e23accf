"""What every likelihood promises, whatever its distribution."""

import copy
import dataclasses
import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ngd_jax as ngd
from ngd_jax.likelihoods import (
    FromKL,
    Gaussian,
)
from tests.likelihoods.cases import (
    BATCH,
    CASES,
    HEADS,
    PRODUCTS,
    assert_close,
    every_case,
    every_case_with_log_prob,
    jitted,
    some_cases_quick,
    some_separable_cases_quick,
    vdot,
)
from tests.marks import long_unless


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@every_case
@pytest.mark.parametrize(
    "dtype", long_unless(["float32"], ["bfloat16", "float32", "float64"])
)
def test_kl_of_equal_outputs_is_exactly_zero(case, dtype, rng):
    with jax.enable_x64(dtype == "float64"):
        outputs = case.outputs(rng, dtype)
        kl_fn = jitted(case.likelihood, "kl")
        same = jax.tree.map(jnp.copy, outputs)
        np.testing.assert_array_equal(kl_fn(outputs, same), 0.0)


@every_case
@pytest.mark.parametrize(
    "dtype", long_unless(["float32"], ["bfloat16", "float32", "float64"])
)
def test_kl_is_positive_per_example_and_wide(case, dtype, rng):
    with jax.enable_x64(dtype == "float64"):
        kl = jitted(case.likelihood, "kl")(
            case.outputs(rng, dtype), case.outputs(rng, dtype)
        )
        assert (np.asarray(kl) >= 0).all()
        assert np.asarray(kl).sum() > 0
        assert kl.shape == BATCH
        assert kl.dtype == ("float64" if dtype == "float64" else "float32")


@every_case
def test_kl_is_half_the_quadratic_form_to_third_order(case, rng):
    with jax.enable_x64(True):
        likelihood, z = case.likelihood, case.outputs(rng, "float64")
        t = case.outputs(rng, "float64")
        if case.complex:  # |psi|^2 sees real parts only
            t = t.real.astype(t.dtype)
        curvature = likelihood.kl_curvature
        half = curvature * vdot(t, jitted(likelihood, "fisher_vp")(z, t)).real / 2

        def error(step):
            moved = jax.tree.map(lambda x, y: x + step * y, z, t)
            return abs(float(jitted(likelihood, "kl")(z, moved).sum()) - step**2 * half)

        assert error(1e-3) < 1e-2 * 1e-6 * half
        exact = isinstance(likelihood, Gaussian)
        assert exact or 6 < error(2e-2) / error(1e-2) < 10 or error(2e-2) < 1e-6 * half


@some_cases_quick
def test_fisher_is_the_autodiff_hessian_of_the_kl_at_equality(case, rng):
    if case.complex:
        pytest.skip("the KL of |psi|^2 does not see phases")
    with jax.enable_x64(True):
        likelihood = case.likelihood
        z, t = case.outputs(rng, "float64"), case.outputs(rng, "float64")
        derived = FromKL(likelihood.kl)
        scaled = jax.tree.map(
            lambda h: h / likelihood.kl_curvature, jitted(derived, "fisher_vp")(z, t)
        )
        product = jitted(likelihood, "fisher_vp")(z, t)
        assert_close(product, scaled, 1e-12, 1e-12)

        # The first distribution may move as well: the same metric.
        def gradient_fn(p):
            return jax.grad(lambda p: likelihood.kl(p, z).sum())(p)

        _, other = jax.jit(lambda z, t: jax.jvp(gradient_fn, (z,), (t,)))(z, t)
        other = jax.tree.map(lambda h: h / likelihood.kl_curvature, other)
        assert_close(product, other, 1e-12, 1e-12)


@pytest.mark.parametrize("name", ["categorical", "diagonal gaussian"])
def test_autodiff_roots_agree_with_the_fisher_of_the_closed_form(name, rng):
    case = CASES[name]
    with jax.enable_x64(True):
        z, t = case.outputs(rng, "float64"), case.outputs(rng, "float64")
        derived = FromKL(case.likelihood.kl)
        twice = jitted(derived, "sqrt_fisher_vp")(
            z, jitted(derived, "sqrt_fisher_tvp")(z, t)
        )
        assert_close(twice, jitted(case.likelihood, "fisher_vp")(z, t), 1e-9, 1e-9)


@every_case
@pytest.mark.parametrize("dtype", long_unless(["float32"], ["float32", "float64"]))
def test_root_times_its_transpose_is_the_fisher(case, dtype, rng):
    with jax.enable_x64(dtype == "float64"):
        likelihood = case.likelihood
        z, t = case.outputs(rng, dtype), case.outputs(rng, dtype)
        twice = jitted(likelihood, "sqrt_fisher_vp")(
            z, jitted(likelihood, "sqrt_fisher_tvp")(z, t)
        )
        tolerance = 1e-5 if dtype == "float32" else 1e-9
        assert_close(twice, jitted(likelihood, "fisher_vp")(z, t), tolerance, tolerance)


@every_case
def test_root_products_are_adjoint_and_fisher_is_symmetric_positive(case, rng):
    likelihood = case.likelihood
    z, t, u = (case.outputs(rng) for _ in range(3))
    assert vdot(jitted(likelihood, "sqrt_fisher_vp")(z, u), t) == pytest.approx(
        vdot(u, jitted(likelihood, "sqrt_fisher_tvp")(z, t)), rel=1e-4, abs=1e-5
    )
    assert vdot(u, jitted(likelihood, "fisher_vp")(z, t)) == pytest.approx(
        np.conj(vdot(t, jitted(likelihood, "fisher_vp")(z, u))), rel=1e-4, abs=1e-5
    )
    square = vdot(t, jitted(likelihood, "fisher_vp")(z, t))
    root = jitted(likelihood, "sqrt_fisher_tvp")(z, t)
    assert square == pytest.approx(vdot(root, root), rel=1e-4)
    assert square.real > 0


@every_case
@pytest.mark.parametrize("method", PRODUCTS)
def test_products_are_linear(case, method, rng):
    product = jitted(case.likelihood, method)
    z, s, t = (case.outputs(rng) for _ in range(3))
    combined = product(z, jax.tree.map(lambda x, y: 2 * x - 3 * y, s, t))
    separate = jax.tree.map(lambda x, y: 2 * x - 3 * y, product(z, s), product(z, t))
    assert_close(combined, separate, 1e-4, 1e-5)


@every_case
@pytest.mark.parametrize("method", PRODUCTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_products_keep_structure_shape_and_dtype_of_the_vector(
    case, method, dtype, rng
):
    with jax.enable_x64(dtype == "float64"):
        z, t = case.outputs(rng), case.outputs(rng, dtype)
        product = jax.eval_shape(getattr(case.likelihood, method), z, t)
        chex.assert_trees_all_equal_shapes_and_dtypes(product, t)


@every_case
@pytest.mark.parametrize("method", PRODUCTS)
def test_bfloat16_is_rounded_only_at_the_end(case, method, rng):
    z, t = case.outputs(rng, "bfloat16"), case.outputs(rng, "bfloat16")
    wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, "float32")), z)
    wide_t = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, "float32")), t)
    product = jitted(case.likelihood, method)
    assert_close(product(z, t), product(wide, wide_t), 2**-8, 1e-6)


@some_cases_quick
def test_jit_equals_eager(case, rng):
    likelihood = case.likelihood
    z, t = case.outputs(rng), case.outputs(rng)
    for method in ("kl", *PRODUCTS):
        function = getattr(likelihood, method)
        assert_close(jitted(likelihood, method)(z, t), function(z, t), 1e-5, 1e-6)


@some_separable_cases_quick
def test_vmap_over_examples_equals_the_batch(case, rng):
    likelihood = case.likelihood
    z, t = case.outputs(rng), case.outputs(rng)
    for method in ("kl", *PRODUCTS):
        function = getattr(likelihood, method)
        vmapped = jax.jit(jax.vmap(function))(z, t)
        assert_close(vmapped, jitted(likelihood, method)(z, t), 1e-5, 1e-6)


@some_separable_cases_quick
def test_any_number_of_leading_axes_is_the_batch(case, rng):
    likelihood = case.likelihood
    z, t = (case.outputs(rng, batch=(2, 3)) for _ in range(2))
    flat_z, flat_t = (
        jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), tree) for tree in (z, t)
    )
    assert likelihood.batch_shape(z) == (2, 3)
    kl = jitted(likelihood, "kl")(z, t)
    assert kl.shape == (2, 3)
    assert_close(kl.reshape(6), jitted(likelihood, "kl")(flat_z, flat_t))
    for method in ("fisher_vp", "sqrt_fisher_vp"):
        product = jitted(likelihood, method)(z, t)
        flat = jitted(likelihood, method)(flat_z, flat_t)
        product = jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), product)
        assert_close(product, flat, 1e-5, 1e-5)


@every_case
def test_batch_shape_needs_shapes_only(case, rng):
    outputs = case.outputs(rng)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outputs)
    assert case.likelihood.batch_shape(outputs) == BATCH
    assert case.likelihood.batch_shape(shapes) == BATCH


@every_case_with_log_prob
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_samples_are_targets_in_every_dtype(case, dtype, rng):
    with jax.enable_x64(dtype == "float64"):
        likelihood, outputs = case.likelihood, case.outputs(rng, dtype)
        samples = jax.eval_shape(likelihood.sample, jax.random.key(1), outputs)
        log_prob = jax.eval_shape(likelihood.log_prob, outputs, samples)
        assert log_prob.shape == BATCH
        assert log_prob.dtype == ("float64" if dtype == "float64" else "float32")


@every_case_with_log_prob
def test_samples_have_finite_log_probability(case, rng):
    likelihood, outputs = case.likelihood, case.outputs(rng)
    samples = jitted(likelihood, "sample")(jax.random.key(1), outputs)
    assert np.isfinite(jitted(likelihood, "log_prob")(outputs, samples)).all()


def test_raw_keys_draw_the_samples_of_typed_ones(rng):
    outputs = CASES["product"].outputs(rng)
    sample_fn = jitted(HEADS, "sample")
    raw = sample_fn(jax.random.PRNGKey(7), outputs)
    assert_close(raw, sample_fn(jax.random.key(7), outputs))


@every_case
def test_float32_survives_strict_promotion_of_ranks_and_dtypes(case, rng):
    z, t = case.outputs(rng), case.outputs(rng)
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        jax.eval_shape(case.likelihood.kl, z, t)
        for method in PRODUCTS:
            jax.eval_shape(getattr(case.likelihood, method), z, t)


@every_case
def test_likelihoods_are_values(case):
    likelihood = case.likelihood
    twin = copy.deepcopy(likelihood)
    assert twin == likelihood
    assert hash(twin) == hash(likelihood)
    assert twin != FromKL(len)
    with pytest.raises(dataclasses.FrozenInstanceError):
        likelihood.event_ndims = 3
    if not isinstance(likelihood, FromKL):
        assert pickle.loads(pickle.dumps(likelihood)) == likelihood
        assert eval(repr(likelihood), dict(vars(ngd))) == likelihood


def test_equal_likelihoods_do_not_compile_twice(rng):
    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def kl(likelihood, outputs):
        return likelihood.kl(outputs, outputs)

    outputs = CASES["product"].outputs(rng)
    for _ in range(2):
        kl(copy.deepcopy(HEADS), outputs)


finite = st.floats(-30, 30, width=32)


@pytest.mark.parametrize("name", ["categorical", "bernoulli", "poisson", "log density"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_kl_is_never_negative_and_zero_at_equality(name, data):
    shape = (*BATCH, *CASES[name].shapes)
    size = int(np.prod(shape))
    values = st.lists(finite, min_size=size, max_size=size)
    p, q = (np.float32(data.draw(values)).reshape(shape) for _ in range(2))
    kl_fn = jitted(CASES[name].likelihood, "kl")
    assert (np.asarray(kl_fn(p, q)) >= 0).all()
    np.testing.assert_array_equal(kl_fn(p, p.copy()), 0)


@pytest.mark.parametrize(
    "name",
    long_unless(
        {"categorical", "gaussian"},
        ["categorical", "bernoulli", "poisson", "gaussian", "log density"],
    ),
)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_quadratic_form_is_never_negative(name, data):
    shape = (*BATCH, *CASES[name].shapes)
    size = int(np.prod(shape))
    values = st.lists(finite, min_size=size, max_size=size)
    z, t = (np.float32(data.draw(values)).reshape(shape) for _ in range(2))
    product = np.asarray(jitted(CASES[name].likelihood, "fisher_vp")(z, t), float)
    assert np.sum(t * product) >= -1e-6 * np.sum(t * t)
