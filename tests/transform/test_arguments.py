"""Mistakes raise errors at construction or trace time that name the argument."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import ngd_jax as ngd
from tests.transform.problems import make_problem, model_fn

PARAMS, BATCH = make_problem()
LIKELIHOOD = ngd.Categorical()


def make(learning_rate=1.0, model_fn=model_fn, likelihood=LIKELIHOOD, **options):
    return ngd.natural_gradient(learning_rate, model_fn, likelihood, **options)


CONSTRUCTION = {
    "both rates None": (
        {"learning_rate": None},
        "`learning_rate` and `max_kl` are both None",
    ),
    "negative rate": ({"learning_rate": -0.1}, r"`learning_rate`.*got -0\.1"),
    "infinite rate": ({"learning_rate": float("inf")}, "`learning_rate`.*inf"),
    "rate of words": ({"learning_rate": "fast"}, "`learning_rate` must be a number"),
    "zero radius": ({"max_kl": 0.0}, r"`max_kl` must be positive, got 0\.0"),
    "negative radius": ({"max_kl": -0.1}, r"`max_kl` must be positive, got -0\.1"),
    "radius NaN": ({"max_kl": float("nan")}, "`max_kl` must be positive, got nan"),
    "negative damping": ({"damping": -1e-3}, r"`damping`.*not negative, got -0\.001"),
    "no damping": ({"damping": None}, "`damping` must be a number or a rule"),
    "negative momentum": ({"momentum": -0.5}, "`momentum`.*not negative"),
    "momentum above 1": ({"momentum": 1.5}, r"`momentum` must be at most 1, got 1\.5"),
    "class for instance": (
        {"likelihood": ngd.Categorical},
        r"`likelihood` must be an instance such as ngd_jax\.Categorical\(\)",
    ),
    "name for likelihood": ({"likelihood": "categorical"}, "`likelihood` must be"),
    "model that is none": ({"model_fn": {}}, "`model_fn` must be callable"),
    "module of linen": ({"model_fn": nn.Dense(1)}, "wrap it in .*linen_model_fn"),
    "module of nnx": (
        {"model_fn": nnx.Linear(1, 1, rngs=nnx.Rngs(0))},
        "wrap it in .*nnx_model_fn",
    ),
    "solver that is none": (
        {"solver": "cg"},
        r"`solver` must be an ngd_jax\.Solver such as ngd_jax\.CG\(\), got 'cg'",
    ),
    "solver as a function": (
        {"solver": lambda _fisher, gradient: gradient},
        r"`solver` must be an ngd_jax\.Solver",
    ),
    "metric that is none": (
        {"metric": "exact"},
        r"`metric` must be an ngd_jax\.Metric\(\.\.\.\), got 'exact'",
    ),
    "number to accept by": (
        {"accept": 0.1},
        r"`accept` must be None or SufficientDecrease\(\.\.\.\), got 0\.1",
    ),
    "loss for constant damping": (
        {"loss_fn": lambda *_: 0.0, "solver": ngd.CG()},
        "`loss_fn` is for rules that weigh the loss",
    ),
    # Names of the first edition: Python's own TypeError.
    "old name of the loss": ({"output_loss_fn": lambda *_: 0.0}, "output_loss_fn"),
    "option of Metric": ({"kind": "empirical"}, "kind"),
    "unknown keyword": ({"lr": 0.1}, "lr"),
}


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_construction_refuses(name):
    options, message = CONSTRUCTION[name]
    with pytest.raises((TypeError, ValueError), match=message):
        make(**options)


def test_direction_alone_is_checked_likewise():
    with pytest.raises(ValueError, match="`max_kl` must be positive"):
        ngd.scale_by_natural_gradient(model_fn, LIKELIHOOD, max_kl=-1.0)
    with pytest.raises(TypeError, match="`likelihood` must be an instance"):
        ngd.scale_by_natural_gradient(model_fn, ngd.Categorical)


def update(tx, grads, params=PARAMS, **extra_args):
    """Traces only: every mistake must be found without running anything."""
    return jax.eval_shape(
        lambda grads, params: tx.update(grads, tx.init(PARAMS), params, **extra_args),
        grads,
        params,
    )


CALLS = {
    "no batch": ({}, PARAMS, PARAMS, "`batch` is missing.*batch=batch"),
    "no params": ({"batch": BATCH}, PARAMS, None, "`params` is missing"),
    "gradients of other structure": (
        {"batch": BATCH},
        {"hidden": PARAMS["hidden"]},
        PARAMS,
        "`updates` must have the tree structure of `params`",
    ),
    "gradients of other shape": (
        {"batch": BATCH},
        PARAMS | {"scale": jnp.ones(2)},
        PARAMS,
        r"`updates` must have the shapes of `params`: at \['scale'\] got \(2,\)",
    ),
    "integer parameters": (
        {"batch": BATCH},
        PARAMS,
        PARAMS | {"scale": jnp.ones((), jnp.int32)},
        r"`params` must hold floating point.*\['scale'\].*int32",
    ),
    "empty batch": (
        {"batch": {"x": jnp.zeros((0, 2)), "y": jnp.zeros(0, int)}},
        PARAMS,
        PARAMS,
        "`batch` must hold at least one example",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_update_refuses(name):
    extra_args, grads, params, message = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        update(make(), grads, params, **extra_args)


OUTPUTS = {
    "scalar for classes": (ngd.Categorical(), lambda z: z.sum(), "Categorical"),
    "array for a dict": (ngd.DiagonalGaussian(), lambda z: z, "DiagonalGaussian"),
    "no rank for events": (ngd.Gaussian(event_ndims=3), lambda z: z, "Gaussian"),
    "block missing": (
        ngd.Product({"a": ngd.Gaussian(), "b": ngd.Gaussian()}),
        lambda z: {"a": z},
        "(?s)Product.*b|outputs.*b",
    ),
    "integers": (ngd.Gaussian(), lambda z: z.astype(int), "float|int32|int64"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_do_not_fit_the_likelihood_are_refused(name):
    likelihood, outputs_fn, message = OUTPUTS[name]
    tx = make(likelihood=likelihood, model_fn=lambda p, b: outputs_fn(model_fn(p, b)))
    with pytest.raises((TypeError, ValueError), match=message):
        update(tx, PARAMS, batch=BATCH)


def test_rules_without_a_loss_say_how_to_give_one():
    uses = {
        r"damping=LevenbergMarquardt": {"damping": ngd.LevenbergMarquardt()},
        r"accept=SufficientDecrease": {"accept": ngd.SufficientDecrease()},
        r"max_kl=RelativeRadius": {"max_kl": ngd.contrib.RelativeRadius()},
        r"solver=DampingSearch": {"solver": ngd.contrib.DampingSearch()},
    }
    for name, options in uses.items():
        match = rf"{name}.* needs the loss: give `loss_fn`.*value_fn=value_fn"
        with pytest.raises(ValueError, match=match):
            update(make(**options), PARAMS, batch=BATCH)


def test_microbatches_of_a_batch_that_cannot_be_split_are_refused():
    tx = make(
        metric=ngd.Metric(microbatch_size=4),
        model_fn=lambda p, b: model_fn(p, {"x": b["x"].swapaxes(0, 1)}),
    )
    with pytest.raises(ValueError, match="`microbatch_size` needs a leaf of `batch`"):
        update(tx, PARAMS, batch={"x": BATCH["x"].swapaxes(0, 1)})


# --- Wrappers that pass on something other than the model's parameters and batch.


def test_multi_steps_is_refused_with_the_way_out():
    tx = optax.MultiSteps(optax.chain(make()), 4)
    message = r"natural_gradient cannot be inside optax\.MultiSteps.*microbatch_size"
    with pytest.raises(TypeError, match=message):
        tx.init(PARAMS)
    with pytest.raises(TypeError, match="MultiSteps"):
        jax.eval_shape(tx.gradient_transformation().init, PARAMS)


def test_flatten_is_refused_with_the_way_out():
    message = r"natural_gradient cannot be inside optax\.flatten.*Leave optax\.flatten"
    for tx in (make(), optax.chain(optax.clip(1.0), make())):
        with pytest.raises(TypeError, match=message):
            optax.flatten(tx).init(PARAMS)
        with pytest.raises(TypeError, match=message):
            jax.eval_shape(optax.flatten(tx).init, PARAMS)
    # Beside it in a chain it does no harm.
    optax.chain(make(), optax.flatten(optax.scale(1.0))).init(PARAMS)
