"""`describe`: what it says of a model, and that it notices what is wrong."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

import ngd_jax as ngd


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
    assert failing(found) == ["SampleSpace solves a random system: NOT_SEPARABLE"]
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


@pytest.mark.parametrize("scale", [1.0, 77.0])
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
    assert "radius: 0.1 nats an example" in text
    assert "0.45 standard deviations of its prediction, or 0.26 in each" in text
    # KL = 3 · 77² / (2 scale²)
    steps = math.ceil(math.sqrt(1.5 * (77 / scale) ** 2 / 0.1))
    assert f"at least {steps} such steps away" in text
    assert "such steps" not in summary(max_kl=lambda count: 0.2 / (1 + count))
    assert "radius: 0.2 nats" in summary(max_kl=lambda count: 0.2 / (1 + count))
    assert "radius" not in summary()
    rule = ngd.contrib.RelativeRadius()
    assert "radius:" not in summary(max_kl=rule, loss_fn=loss_fn)
