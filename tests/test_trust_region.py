"""The radius search: never outside, nearly full, and cheap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ngd_jax.trust_region import (
    SearchLine,
    SufficientDecrease,
    TrustRegionResult,
    first_trial,
    quadratic_step_scale,
    search_kl_radius,
)

FULL = 0.9  # of the radius, at least, wherever it can be reached


def power(s, coefficient, exponent):
    return coefficient * s**exponent


@functools.cache
def compiled(kl_fn, max_evaluations=10):
    """The search on `kl_fn(s, *parameters)`, compiled once."""

    @jax.jit
    def search(start, max_kl, upper, *parameters):
        result = search_kl_radius(
            lambda s: kl_fn(s, *parameters),
            start=start,
            max_kl=max_kl,
            upper=upper,
            max_evaluations=max_evaluations,
        )
        return result, kl_fn(result.scale, *parameters)

    return search


def search(kl_fn, *parameters, start=1.0, max_kl=1e-2, upper=np.inf, **options):
    """The result, whose KL is that of its own length, and whose report is true."""
    arguments = [jnp.float32(x) for x in (start, max_kl, upper, *parameters)]
    result, kl = compiled(kl_fn, **options)(*arguments)
    if result.scale > 0:
        np.testing.assert_allclose(result.kl, np.maximum(kl, 0), rtol=1e-5, atol=1e-30)
    longest = min(arguments[2], jnp.finfo(jnp.float32).max)
    is_filled = result.kl >= FULL * arguments[1] or result.scale >= longest
    assert bool(result.filled) == bool(is_filled or start == 0)
    return result


def assert_full(result, max_kl, evaluations=6):
    assert bool(result.found)
    assert bool(result.filled)
    max_kl = np.float32(max_kl)
    assert FULL * max_kl <= float(result.kl) <= max_kl
    assert 1 <= int(result.num_kl_evaluations) <= evaluations


# --- Analytic KLs.


def linear_when_large(s, scale):
    return jnp.sqrt(1 + (s * scale) ** 2) - 1


def steep(s, scale):
    return (scale * s) ** 2 + (scale * s) ** 4 * 1e4


def exponential(s, scale):
    return jnp.expm1(scale * s) - scale * s


def logarithmic(s, scale):
    return jnp.log1p((scale * s) ** 2)


def saturating(s, scale):
    return 1e-3 * -jnp.expm1(-((scale * s) ** 2))


SMOOTH = [linear_when_large, steep, exponential, logarithmic]


@pytest.mark.parametrize("kl_fn", SMOOTH)
@pytest.mark.parametrize("scale", [1e-3, 1e-1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("max_kl", [1e-4, 1e-2, 1.0])
def test_radius_is_filled_from_the_quadratic_guess(kl_fn, scale, max_kl):
    curvature = {linear_when_large: 1, steep: 2, exponential: 1, logarithmic: 2}
    start = first_trial(curvature[kl_fn] * scale**2, max_kl)
    assert_full(search(kl_fn, scale, start=start, max_kl=max_kl), max_kl)


@pytest.mark.parametrize("coefficient", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("max_kl", [1e-12, 1e-2, 1e3])
def test_quadratic_kl_takes_one_evaluation_at_every_scale(coefficient, max_kl):
    start = first_trial(2 * coefficient, max_kl)
    result = search(power, coefficient, 2.0, start=start, max_kl=max_kl)
    assert_full(result, max_kl, evaluations=1)


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("overshoot", [1.5, 10.0, 1e3])
def test_overshoot_of_the_quadratic_model_is_undone(exponent, overshoot):
    # KL at the first trial is `overshoot` times the radius.
    assert_full(search(power, overshoot * 1e-2, exponent), 1e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("edge", [0.11, 0.3, 0.999])
def test_non_finite_kl_beyond_a_point_counts_as_outside(bad, edge):
    def kl_fn(s, edge):
        return jnp.where(s > edge, bad, s**2)

    result = search(kl_fn, edge, start=1.0, max_kl=1e-2, max_evaluations=20)
    assert FULL * 1e-2 <= float(result.kl) <= np.float32(1e-2)
    assert 0 < float(result.scale) <= edge


@pytest.mark.parametrize("max_evaluations", [1, 3, 10])
def test_unreachable_radius_ends_within_the_budget_and_inside(max_evaluations):
    result = search(saturating, 1.0, max_kl=1.0, max_evaluations=max_evaluations)
    assert bool(result.found)
    assert int(result.num_kl_evaluations) == max_evaluations
    assert 0 < float(result.kl) <= 1.0
    assert np.isfinite(result.scale)


@pytest.mark.parametrize("max_evaluations", [1, 4])
def test_radius_outside_of_every_trial_is_no_step(max_evaluations):
    result = search(lambda s: s + 1.0, max_evaluations=max_evaluations)
    assert not bool(result.found)
    assert float(result.scale) == float(result.kl) == 0.0
    assert int(result.num_kl_evaluations) == max_evaluations


def test_kl_that_is_nan_everywhere_is_no_step():
    result = search(lambda s: s * jnp.nan)
    assert not bool(result.found)
    assert float(result.scale) == 0.0


def test_start_of_zero_asks_for_nothing():
    result = search(power, 1.0, 2.0, start=0.0)
    assert bool(result.found)
    assert float(result.scale) == float(result.kl) == 0.0
    assert int(result.num_kl_evaluations) == 0


def test_kl_of_zero_grows_until_it_is_seen():
    def flat_then_quadratic(s):
        return jnp.maximum(s - 1.0, 0.0) ** 2

    result = search(flat_then_quadratic, start=0.1, max_kl=1e-2)
    assert_full(result, 1e-2, evaluations=10)


def test_kl_below_zero_by_round_off_counts_as_zero():
    def noisy(s):
        return jnp.where(s < 0.05, -1e-9, s**2)

    assert_full(search(noisy, start=0.01, max_kl=1e-2), 1e-2, evaluations=10)


# --- The longest step that is allowed.


@pytest.mark.parametrize("ratio", [1e-3, 0.5, 0.95])
def test_upper_within_the_radius_is_the_step_in_one_evaluation(ratio):
    upper = ratio * np.sqrt(1e-2)
    start = first_trial(2.0, 1e-2, upper)
    result = search(power, 1.0, 2.0, start=start, upper=upper)
    assert float(result.scale) == np.float32(upper)
    assert int(result.num_kl_evaluations) == 1


@pytest.mark.parametrize("start", [1e-3, 0.05, 0.2, 1.0])
def test_upper_within_the_radius_is_the_step_from_any_start(start):
    result = search(power, 1.0, 2.0, start=start, upper=0.09)
    assert float(result.scale) == np.float32(0.09)


@pytest.mark.parametrize("ratio", [1.1, 1.9, 3.0, 1e3])
def test_upper_beyond_the_radius_does_not_matter(ratio):
    upper = ratio * np.sqrt(1e-2)
    result = search(power, 1.0, 2.0, start=first_trial(2.0, 1e-2, upper), upper=upper)
    assert_full(result, 1e-2, evaluations=3)
    assert float(result.scale) < upper


# --- The promise, over many KLs.


def mixture(s, a, b, p, q):
    return a * s**p + b * s**q


positive = st.floats(-6, 6).map(lambda x: 10.0**x)
exponents = st.floats(0.8, 4.0)


@given(coefficient=positive, exponent=exponents, max_kl=st.floats(-6, 1))
def test_power_laws_fill_the_radius(coefficient, exponent, max_kl):
    max_kl = 10.0**max_kl
    overshoot = coefficient / max_kl
    assume(1e-4 <= overshoot <= 1e4)
    result = search(power, coefficient, exponent, max_kl=max_kl, max_evaluations=12)
    assert_full(result, max_kl, evaluations=12)


@given(
    a=positive,
    b=positive,
    p=exponents,
    q=exponents,
    overshoot=st.floats(-1, 3),
)
def test_mixtures_of_power_laws_fill_the_radius(a, b, p, q, overshoot):
    max_kl = (a + b) * 10.0**-overshoot
    result = search(mixture, a, b, p, q, max_kl=max_kl)
    assert_full(result, max_kl, evaluations=8)


def step_function(s, *values):
    # By comparisons, which no way of compiling rounds differently at a jump.
    edges = 10.0 ** np.arange(-3, 4, dtype=np.float32)
    return jnp.stack(values)[jnp.sum(s >= edges)]


def test_kl_that_stays_zero_never_gives_an_infinite_step():
    result = search(lambda s: 0.0 * jnp.nan_to_num(s), start=1e37, max_evaluations=20)
    assert bool(result.found)
    assert np.isfinite(result.scale)


@example(values=[0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0], max_kl=1.0, start=0.01)
@given(
    values=st.lists(st.floats(width=32), min_size=8, max_size=8),
    max_kl=st.floats(1e-6, 1e3),
    start=st.floats(1e-6, 1e6),
)
def test_result_is_within_the_radius_whatever_the_kl(values, max_kl, start):
    result = search(step_function, *values, max_kl=max_kl, start=start)
    assert float(result.kl) <= np.float32(max_kl)
    assert np.isfinite(result.scale)
    assert float(result.scale) >= 0
    assert bool(result.found) == (float(result.scale) > 0)


# --- KLs that are not smooth: filled in ten evaluations, or reported as not filled.


def kinked(s, *knots):
    """Log KL is piecewise linear in log s: KL(1) = 1, slopes change at the knots."""
    places, slopes = jnp.stack(knots[:3]), jnp.stack(knots[3:])
    x = jnp.log(s)
    # The integral of the slope from 0 to x.
    edges = jnp.concatenate([jnp.array([-jnp.inf]), places, jnp.array([jnp.inf])])
    pieces = jnp.clip(x, edges[:-1], edges[1:]) - jnp.clip(0.0, edges[:-1], edges[1:])
    return jnp.exp(jnp.sum(slopes * pieces))


log_places = st.floats(-6, 6)


@given(
    places=st.tuples(log_places, log_places, log_places).map(sorted),
    slopes=st.tuples(*[st.floats(0.3, 12.0)] * 4),
    log_max_kl=st.floats(-9, 3),
    log_start=st.floats(-4, 6),
)
def test_kinked_kls_are_filled_or_said_not_to_be(places, slopes, log_max_kl, log_start):
    # Whatever the slopes, ten evaluations from up to e⁶ too far.
    max_kl, start = np.exp(log_max_kl), np.exp(log_start)
    result = search(kinked, *places, *slopes, max_kl=max_kl, start=start)
    assert result.kl <= np.float32(max_kl)
    assert int(result.num_kl_evaluations) <= 10
    # `search` has compared `filled` with the KL itself.
    if result.filled:
        assert_full(result, max_kl, evaluations=10)
    else:
        assert int(result.num_kl_evaluations) == 10


def cliff(s, edge, height):
    """Quadratic, and `height` times as much beyond an edge: near a loss of zero."""
    return s**2 * jnp.where(s > edge, height, 1.0)


def plateau(s, edge, level):
    """Quadratic up to an edge, constant from there to 30 times as far, then steep."""
    flat = jnp.minimum(s / edge, 1.0) ** 2 * level
    return flat + jnp.maximum(s / edge - 30.0, 0.0) ** 4


def noisy(s, frequency, size):
    """Quadratic with ripples."""
    return s**2 * (1 + size * jnp.sin(frequency * s))


HARD = {
    "ripples": (noisy, [(f, 0.05) for f in (10.0, 1e3, 1e5)]),
    "plateau within": (plateau, [(e, 0.9e-2) for e in (1e-3, 0.1, 1.0)]),
    "cliff": (cliff, [(0.0999, 30.0), (0.11, 1e3), (0.0975, 1e6)]),
}


@pytest.mark.parametrize("start", [1e-2, 0.09, 1.0, 30.0])
@pytest.mark.parametrize("name", HARD)
def test_hard_kls_are_filled_in_ten_evaluations(name, start):
    kl_fn, cases = HARD[name]
    for parameters in cases:
        assert_full(search(kl_fn, *parameters, start=start), 1e-2, evaluations=10)


@pytest.mark.parametrize("level", [1.01e-2, 1.1e-2])
@pytest.mark.parametrize("start", [1e-2, 0.09, 1.0, 30.0])
def test_plateaus_just_beyond_the_radius_are_left_behind(level, start):
    for edge in (1e-3, 0.1, 1.0):
        result = search(plateau, edge, level, start=start)
        assert bool(result.found)
        assert bool(result.filled) or int(result.num_kl_evaluations) == 10


def test_a_radius_that_cannot_be_filled_is_reported():
    # A jump from far below the radius to far above it.
    result = search(cliff, 0.01, 1e6, start=1.0)
    assert bool(result.found)
    assert not bool(result.filled)
    assert 0 < float(result.scale) <= 0.01
    assert int(result.num_kl_evaluations) == 10


# --- Sufficient decrease.


def halved(kl_at_half, *, loss_fn=lambda s: s - 0.6, max_halvings=3, found=True):
    """From s = 1 with KL = 0.01, the radius, along a line of slope 1."""
    start = TrustRegionResult(
        *map(jnp.float32, (1.0, 0.01)),
        jnp.int32(1),
        jnp.asarray(found),
        jnp.asarray(True),
    )
    line = SearchLine(
        kl_fn=lambda s: jnp.where(s == 0.5, kl_at_half, 0.001),
        loss_fn=loss_fn,
        loss_here=lambda: jnp.float32(0.0),
        slope=jnp.float32(1.0),
        quadratic=jnp.float32(1.0),
        kl_curvature=1.0,
        upper=jnp.float32(np.inf),
    )
    rule = SufficientDecrease(0.0, max_halvings=max_halvings)
    return rule.shorten(start, line, 0.01)


@pytest.mark.parametrize("excess", [1.01, 1.2, 100.0])
def test_halved_step_beyond_the_radius_is_not_taken(excess):
    """KL need not grow along a direction: the shorter step is measured too."""
    step, accepted = halved(excess * 0.01)
    assert bool(accepted)
    assert float(step.scale) == 0.25
    assert float(step.kl) == np.float32(0.001)
    assert int(step.num_kl_evaluations) == 3


def test_halved_step_within_the_radius_is_taken_with_its_own_kl():
    step, accepted = halved(0.99 * 0.01)
    assert bool(accepted)
    assert float(step.scale) == 0.5
    assert float(step.kl) == np.float32(0.99 * 0.01)


def test_halving_ends_with_its_budget():
    step, accepted = halved(0.001, loss_fn=lambda _: jnp.nan, max_halvings=2)
    assert not bool(accepted)
    assert float(step.scale) == 0.25
    step, accepted = halved(0.001, loss_fn=lambda _: jnp.nan, found=False)
    assert float(step.scale) == 1.0  # nothing was found that could be halved


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fraction": 1.0}, ValueError, r"`fraction` must be in \[0, 1\), got 1.0"),
        ({"fraction": -0.1}, ValueError, "`fraction`"),
        ({"max_halvings": -1}, ValueError, "`max_halvings` must not be negative"),
        ({"max_halvings": True}, TypeError, "`max_halvings` must be an integer"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        SufficientDecrease(**options)


# --- Transformations and dtypes.


@pytest.mark.long
def test_vmap_equals_a_loop():
    scales = jnp.array([1e-3, 1.0, 30.0, 1e3])
    arguments = (jnp.float32(1.0), jnp.float32(1e-2), jnp.float32(np.inf))
    one = compiled(linear_when_large)
    many = jax.vmap(one, in_axes=(None, None, None, 0))(*arguments, scales)
    for i, scale in enumerate(scales):
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_allclose(x, y[i], rtol=1e-6),
            one(*arguments, scale),
            many,
        )


@pytest.mark.long
def test_float64_is_kept(x64):
    result = search_kl_radius(
        lambda s: s**2, start=jnp.float64(1.0), max_kl=1e-2, max_evaluations=10
    )
    assert result.scale.dtype == result.kl.dtype == jnp.float64
    assert result.num_kl_evaluations.dtype == jnp.int32


@pytest.mark.parametrize("quadratic", [0.0, -1.0, np.nan])
def test_quadratic_model_without_curvature_gives_one(quadratic):
    assert float(quadratic_step_scale(quadratic, 1e-2)) == 1.0


def test_a_quadratic_model_that_overflows_still_asks_for_a_step():
    assert 0 < float(quadratic_step_scale(jnp.float32(np.inf), 1e-2)) < 1e-20


@pytest.mark.parametrize("quadratic", [2e-38, 1e-20, 1.0, 1e20, 1e38])
@pytest.mark.parametrize("max_kl", [1e-30, 1e-2, 1e30])
def test_quadratic_model_gives_the_radius_at_every_scale(quadratic, max_kl):
    scale = float(quadratic_step_scale(quadratic, max_kl))
    np.testing.assert_allclose(0.5 * scale * scale * quadratic, max_kl, rtol=1e-5)
