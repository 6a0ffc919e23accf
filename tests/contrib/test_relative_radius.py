"""RelativeRadius: lengths known in closed form, and a loss along a bent valley."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from ngd_jax.contrib import RelativeRadius
from ngd_jax.trust_region import SearchLine

pytestmark = pytest.mark.usefixtures("strict_ranks")


def search(rule, loss_fn, *, slope, quadratic=1.0, upper=1.0):
    """Along a line where KL(s) = ½ q s²."""
    q = jnp.asarray(quadratic, jnp.float32)
    return jax.jit(
        lambda: rule.search(
            SearchLine(
                kl_fn=lambda s: q * s**2 / 2,
                loss_fn=loss_fn,
                loss_here=lambda: loss_fn(jnp.float32(0)),
                slope=jnp.float32(slope),
                quadratic=q,
                kl_curvature=1.0,
                upper=jnp.float32(upper),
            )
        )
    )()


def test_a_whole_step_that_falls_as_predicted_is_taken_beyond_the_radius():
    step = search(RelativeRadius(1e-6), lambda s: 3 - s + s**2 / 2, slope=1.0)
    assert float(step.scale) == 1.0
    np.testing.assert_allclose(step.kl, 0.5)
    assert bool(step.found)


@pytest.mark.parametrize(("sufficient", "is_taken"), [(0.2, True), (0.25, False)])
def test_a_whole_step_must_fall_by_a_sufficient_part_of_the_prediction(
    sufficient, is_taken
):
    # It falls by 0.12 where ½ is predicted: 0.24 of it, and less of shorter steps.
    rule = RelativeRadius(1e-3, sufficient=sufficient)
    step = search(rule, lambda s: 3 - 0.12 * s, slope=1.0)
    if is_taken:
        assert float(step.scale) == 1.0
    else:
        assert 0.92 * 3e-3 <= float(step.kl) <= 3e-3


@pytest.mark.parametrize("halvings", [0, 1, 2, 3])
def test_shorter_steps_are_looked_at_in_turn(halvings):
    # The quadratic model predicts a fall of s - s²/2; up to s = ¼ it does fall.
    def loss_fn(s):
        return jnp.where(s <= 0.25, 3 - s, 5.0)

    step = search(RelativeRadius(1e-3, max_halvings=halvings), loss_fn, slope=1.0)
    if halvings >= 2:
        assert float(step.scale) == 0.25
    else:
        # s with ½ s² = fraction · f(0), and no less than 0.92 of that KL.
        assert 0.92 * 3e-3 <= float(step.kl) <= 3e-3
        assert float(step.scale) < 0.25
        np.testing.assert_allclose(step.kl, step.scale**2 / 2, rtol=1e-6)


def test_the_radius_follows_the_loss_where_it_rises():
    for loss in (1.0, 1e-6):
        step = search(
            RelativeRadius(0.01), lambda s, f=loss: f * (1 + s), slope=1.0, upper=10.0
        )
        assert 0.92 * 0.01 * loss <= float(step.kl) <= 0.01 * loss * (1 + 1e-6)
        assert bool(step.found)


def test_infinity_leaves_the_radius_alone():
    rule = RelativeRadius(1e-3, sufficient=math.inf)
    step = search(rule, lambda s: 3 - s + s**2 / 2, slope=1.0)
    assert 0.92 * 3e-3 <= float(step.kl) <= 3e-3


def test_a_loss_that_is_not_a_number_is_no_decrease():
    step = search(
        RelativeRadius(0.01), lambda s: jnp.where(s > 0, jnp.nan, 2.0), slope=1.0
    )
    assert 0.92 * 0.02 <= float(step.kl) <= 0.02


def curve(params, batch):
    """A point in the plane that has to reach the origin along a bent valley."""
    x, y = params
    return jnp.stack([10 * (y - x**2), 1 - x])[None] * batch


def half_square(outputs, _batch):
    return jnp.sum(outputs**2) / 2


def run(tx, steps):
    batch = jnp.ones((1, 2))

    @jax.jit
    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(
            lambda p: half_square(curve(p, batch), batch)
        )(params)
        updates, state = tx.update(grads, state, params, batch=batch, value=value)
        info = optax.tree.get(state, "NaturalGradientInfo")
        return (optax.apply_updates(params, updates), state), (value, info)

    params = (jnp.asarray(-1.2), jnp.asarray(1.0))
    (params, _), records = jax.lax.scan(step, (params, tx.init(params)), length=steps)
    return params, records


def test_rosenbrock_is_solved_exactly_and_steps_keep_the_promise(x64):
    rule = RelativeRadius(0.05)
    tx = ngd.natural_gradient(
        1.0,
        curve,
        ngd.Gaussian(),
        max_kl=rule,
        damping=0.0,
        solver=ngd.contrib.SVD(1e-12),
        loss_fn=half_square,
    )
    params, (values, info) = run(tx, 60)
    np.testing.assert_allclose(params, (1.0, 1.0), rtol=1e-12)
    is_long = info.measured_kl > rule.fraction * values * (1 + 1e-9)
    scales = np.asarray(info.step_scale)
    assert set(scales[np.asarray(is_long)]) <= {1.0, 0.5}
    decrease = -np.diff(values)
    predicted = (scales * (2 - scales) * values)[:-1]
    is_long = np.asarray(is_long)[:-1]
    assert is_long.any()
    assert not is_long.all()
    assert (decrease[is_long] >= rule.sufficient * predicted[is_long] * 0.999).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "`fraction` must be positive"),
        ({"fraction": math.inf}, "`fraction` must be positive"),
        ({"sufficient": 0.0}, "`sufficient` must be in"),
        ({"sufficient": 1.5}, "`sufficient` must be in"),
        ({"max_halvings": -1}, "`max_halvings` must be an integer"),
        ({"max_halvings": True}, "`max_halvings` must be an integer"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RelativeRadius(**options)


def test_what_would_contradict_it_is_refused():
    with pytest.raises(ValueError, match="`learning_rate` must be given"):
        ngd.natural_gradient(None, curve, ngd.Gaussian(), max_kl=RelativeRadius())
    with pytest.raises(ValueError, match="`accept` refuses steps"):
        ngd.natural_gradient(
            1.0,
            curve,
            ngd.Gaussian(),
            max_kl=RelativeRadius(),
            accept=ngd.SufficientDecrease(),
        )
    tx = ngd.natural_gradient(1.0, curve, ngd.Gaussian(), max_kl=RelativeRadius())
    params = (jnp.asarray(0.0), jnp.asarray(0.0))
    with pytest.raises(ValueError, match=r"max_kl=RelativeRadius.* needs the loss"):
        jax.eval_shape(
            lambda: tx.update(params, tx.init(params), params, batch=jnp.ones((1, 2)))
        )
