"""`describe`: what it says about a model, and that it notices what is wrong."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest

import ngd_jax as ngd

long = functools.partial(pytest.param, marks=pytest.mark.long)


def network(params, batch):
    return jnp.tanh(batch["x"] @ params["w"] + params["b"]) @ params["v"]


@pytest.fixture
def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "b": jnp.zeros(6),
        "v": jax.random.normal(keys[0], (6, 2)),
        "w": jax.random.normal(keys[1], (3, 6)),
    }
    return params, {"x": jax.random.normal(keys[2], (16, 3))}


def failing(description):
    return [check.claim for check in description.checks if not check.holds]


@pytest.mark.long
def test_layers_are_named_and_checked(problem):
    params, batch = problem
    settings = {
        "learning_rate": 1.0,
        "model_fn": network,
        "likelihood": ngd.Categorical(),
        "solver": ngd.CG(3, preconditioner=ngd.Kronecker()),
    }
    found = ngd.describe(settings, params, batch)
    assert found.parameters == [
        ("['b']", "6", "bias of ['w']"),
        ("['v']", "6 × 2", "dense 6 → 2"),
        ("['w']", "3 × 6", "dense 3 → 6 with bias ['b']"),
    ]
    assert failing(found) == []
    assert found.memory["direction"] == 0
    assert found.memory["solver"] > 1
    text = str(found)
    assert "dense 3 → 6" in text
    assert "FAILS" not in text


def test_functions_in_a_model_are_left_alone_and_no_factors_checked_without_any(
    problem,
):
    params, batch = problem

    def model_fn(params, batch):
        return params["activation"](batch["x"] @ params["w"])

    tx = ngd.natural_gradient(1.0, model_fn, ngd.Gaussian(), solver=ngd.CG(5))
    model = {"activation": jnp.tanh, "w": params["w"]}
    found = ngd.describe(tx, model, batch)
    assert found.parameters == [("['w']", "3 × 6", "products with F")]
    assert failing(found) == []
    claims = {check.claim for check in found.checks}
    assert "F is symmetric" in claims
    assert not any("Kronecker" in claim for claim in claims)


def test_the_choice_of_auto_is_told_with_its_reason(problem):
    params, batch = problem
    tx = ngd.natural_gradient(1.0, network, ngd.Gaussian(), max_kl=0.1)
    text = str(ngd.describe(tx, params, batch))
    assert "solver: Cholesky" in text
    assert "chosen by Auto: Cholesky, with" in text


@pytest.mark.long
def test_a_model_that_mixes_its_examples_is_noticed(problem):
    params, batch = problem

    def mixing(params, batch):
        outputs = network(params, batch)
        return outputs - outputs.mean(0)

    tx = ngd.natural_gradient(1.0, mixing, ngd.Gaussian(), solver=ngd.SampleSpace())
    found = ngd.describe(tx, params, batch)
    assert failing(found) == ["SampleSpace on a random system: NOT_SEPARABLE"]
    assert "mixes its examples" in str(found)
    tx = ngd.natural_gradient(1.0, network, ngd.Gaussian(), solver=ngd.SampleSpace())
    assert failing(ngd.describe(tx, params, batch)) == []


@pytest.mark.long
def test_a_divergence_that_is_none_is_noticed(problem):
    params, batch = problem
    wrong = {
        "slope": lambda p, q: jnp.sum(q - p + (q - p) ** 2, axis=-1),
        "sign": lambda p, q: -jnp.sum((q - p) ** 2, axis=-1),
        "zero": lambda p, q: 0.1 + jnp.sum((q - p) ** 2, axis=-1),
    }
    claims = {
        "slope": "the KL has no slope at equal outputs",
        "sign": "the KL of a short step is not negative",
        "zero": "the KL of equal outputs is 0",
    }
    for name, kl in wrong.items():
        tx = ngd.natural_gradient(1.0, network, ngd.FromKL(kl), solver=ngd.CG(3))
        assert claims[name] in failing(ngd.describe(tx, params, batch)), name


def test_a_chain_cannot_be_described(problem):
    params, batch = problem
    tx = ngd.natural_gradient(1.0, network, ngd.Gaussian())
    with pytest.raises(TypeError, match="without a chain around it"):
        ngd.describe(optax.chain(tx), params, batch)


def test_layers_whose_outputs_come_first_are_checked_too(problem):
    params, batch = problem
    params = params | {"w": params["w"].T}

    def turned(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["w"].T + params["b"])
        return hidden @ params["v"]

    tx = ngd.natural_gradient(1.0, turned, ngd.Gaussian(), solver=ngd.KFAC())
    found = ngd.describe(tx, params, batch)
    assert found.parameters[2][2] == "dense 3 → 6 with bias ['b']"
    assert failing(found) == []


@pytest.mark.parametrize("scale", [long(1.0), 77.0])
def test_the_radius_is_said_in_units_of_predictions_and_targets(scale):
    # Means of 0 and targets of ±77, so that the distance is 77 / scale.
    batch = {"x": jnp.ones((6, 2)), "y": 77.0 * jnp.asarray([[1.0, -1.0, 1.0]] * 6)}
    likelihood = ngd.Gaussian(scale=scale)

    def loss_fn(outputs, batch):
        return -likelihood.log_prob(outputs, batch["y"]).mean()

    def summary(loss=None, **options):
        settings = {"learning_rate": 1.0, "likelihood": likelihood, **options}
        settings["model_fn"] = lambda w, batch: batch["x"] @ w
        return str(ngd.describe(settings, jnp.zeros((2, 3)), batch, loss_fn=loss))

    text = summary(loss_fn, max_kl=0.1)
    assert "radius: 0.1 nats per example" in text
    assert "0.45 standard deviations of its prediction, or 0.26 in each" in text
    # KL = 3 · 77² / (2 scale²)
    steps = math.ceil(math.sqrt(1.5 * (77 / scale) ** 2 / 0.1))
    assert f"at least {steps} such steps away" in text
    assert "such steps" not in summary(max_kl=lambda count: 0.2 / (1 + count))
    assert "radius: 0.2 nats" in summary(max_kl=lambda count: 0.2 / (1 + count))
    assert "`loss_fn=` of describe" in summary(max_kl=0.2)
    assert "radius" not in summary()
    rule = ngd.contrib.RelativeRadius()
    assert "radius:" not in summary(max_kl=rule, loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("scale", "damping", "holds"),
    [
        (1.0, 1e-3, True),
        (1e4, 1e-3, False),
        long(1e4, ngd.RelativeDamping(1e-3), True),
        long(1e4, ngd.CovariantDamping(1e-3, jnp.full((2, 3), 1e4)), True),
        long(1e4, ngd.LevenbergMarquardt(initial=1.0), False),
    ],
)
def test_damping_that_drowns_the_metric_is_noticed(scale, damping, holds):
    settings = {
        "learning_rate": 1.0,
        "model_fn": lambda w, batch: batch @ w,
        "likelihood": ngd.Gaussian(scale=scale),
        "damping": damping,
    }
    if isinstance(damping, ngd.LevenbergMarquardt):
        settings["loss_fn"] = lambda outputs, _: jnp.mean(outputs**2)
    found = ngd.describe(settings, jnp.zeros((2, 3)), jnp.ones((6, 2)))
    (check,) = (check for check in found.checks if "tr F" in check.claim)
    assert check.holds == holds


def check_of(found, words):
    (check,) = (check for check in found.checks if words in check.claim)
    return check


@pytest.mark.parametrize(
    ("likelihood", "loss", "factor"),
    [
        (ngd.Gaussian(), lambda z, y: optax.l2_loss(z, y).sum(-1).mean(), 1),
        (ngd.Gaussian(), lambda z, y: ((z - y) ** 2).mean(), 2 / 3),
        long(ngd.Gaussian(), lambda z, y: optax.l2_loss(z, y).sum(), 6),
        long(ngd.Bernoulli(), lambda z, _: jax.nn.softplus(z).sum(-1).mean(), 1),
        long(ngd.Categorical(), lambda z, _: jax.nn.logsumexp(z, -1).mean(), 1),
        long(ngd.Categorical(), lambda z, _: jax.nn.logsumexp(z, -1).sum(), 6),
    ],
)
def test_a_loss_on_another_scale_than_the_likelihood_is_noticed(
    likelihood, loss, factor
):
    keys = jax.random.split(jax.random.key(0), 3)
    batch = {k: jax.random.normal(keys[i], (6, 3)) for i, k in enumerate("xy")}
    settings = {
        "learning_rate": 1.0,
        "model_fn": lambda w, batch: batch["x"] @ w,
        "likelihood": likelihood,
    }
    w = jax.random.normal(keys[2], (3, 3))
    found = ngd.describe(
        settings, w, batch, loss_fn=lambda z, batch: loss(z, batch["y"])
    )
    check = check_of(found, "curvature of the mean")
    assert f"has {factor:.3g} times" in check.claim
    assert check.error == pytest.approx(abs(factor - 1), abs=1e-5)
    assert check.holds == (factor == 1)


def test_what_is_not_finite_is_said_first(problem):
    params, batch = problem
    settings = {"learning_rate": 1.0, "model_fn": network}
    settings["likelihood"] = ngd.Gaussian()
    batch = {"x": batch["x"].at[0, 0].set(jnp.nan)}
    (check,) = ngd.describe(settings, params, batch).checks
    assert not check.holds
    assert "finite" in check.claim


def test_a_loss_of_the_parameters_is_refused(problem):
    params, batch = problem
    tx = ngd.natural_gradient(1.0, network, ngd.Gaussian())

    def loss_fn(params, batch):
        return jnp.mean(network(params, batch) ** 2)

    with pytest.raises(TypeError, match=r"\(outputs, batch\) -> loss"):
        ngd.describe(tx, params, batch, loss_fn=loss_fn)
    with pytest.raises(ValueError, match="must return a scalar"):
        ngd.describe(tx, params, batch, loss_fn=lambda outputs, _: outputs)


@pytest.mark.parametrize(
    ("likelihood", "remedy"),
    [
        long(ngd.Gaussian(), "give it event_ndims=0"),
        long(ngd.Bernoulli(), "give it event_ndims=0"),
        (ngd.Categorical(), r"are a Bernoulli\(event_ndims=0\)"),
    ],
)
def test_a_batch_that_counts_as_one_example_is_noticed(likelihood, remedy):
    settings = {
        "learning_rate": 1.0,
        "model_fn": lambda w, x: x @ w,
        "likelihood": likelihood,
    }
    with pytest.warns(UserWarning, match=f"are one example of 6 numbers.*{remedy}"):
        found = ngd.describe(settings, jnp.ones(2), jnp.ones((6, 2)))
    assert "6 outputs of 1 example, " in found.summary[0]
    assert "no leaf of the batch" in found.summary[1]
    settings["model_fn"] = lambda w, x: (x @ w)[:, None] * jnp.ones(3)
    found = ngd.describe(settings, jnp.ones(2), jnp.ones((6, 2)))
    assert not any("note" in line for line in found.summary)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masked_logits_and_narrow_outputs_are_no_fault(dtype):
    batch = {"x": jnp.ones((6, 2)), "y": jnp.arange(6) % 3}
    settings = {
        "learning_rate": 1.0,
        "model_fn": lambda w, batch: (
            (batch["x"] @ w).at[:, 3].set(-jnp.inf).astype(dtype)
        ),
        "likelihood": ngd.Categorical(),
    }

    def loss_fn(logits, batch):
        log_p = jax.nn.log_softmax(logits.astype("float32"))
        return -jnp.take_along_axis(log_p, batch["y"][:, None], 1).mean()

    w = jax.random.normal(jax.random.key(0), (2, 4))
    found = ngd.describe(settings, w, batch, loss_fn=loss_fn)
    assert len(found.checks) > 3
    assert check_of(found, "curvature of the mean").holds
    assert check_of(found, "tr F").holds


def test_a_model_without_curvature_is_noticed():
    settings = {
        "learning_rate": 1.0,
        "model_fn": lambda w, x: x @ (0 * w),
        "likelihood": ngd.Gaussian(),
    }
    found = ngd.describe(settings, jnp.ones((2, 3)), jnp.ones((6, 2)))
    assert not check_of(found, "tr F").holds
