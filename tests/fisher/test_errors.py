"""Misuse of the Fisher functions: errors that name the argument."""

import inspect

import jax
import jax.numpy as jnp
import pytest

import ngd_jax as ngd

pytestmark = pytest.mark.usefixtures("strict_ranks")

# Without the run-time types of the tests, as users see them.
linearize_fisher = inspect.unwrap(ngd.linearize_fisher)


def linear(params, x):
    return x @ params["w"]


GOOD = {
    "model_fn": linear,
    "params": {"w": jnp.ones((2, 3))},
    "batch": jnp.ones((4, 2)),
    "likelihood": ngd.Categorical(),
}


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"kind": "exakt"}, ValueError, "`kind` must be one of .*'exakt'"),
        ({"kind": "sampled"}, ValueError, "`key` is needed"),
        ({"kind": "empirical"}, ValueError, "`targets` are needed"),
        (
            {
                "kind": "sampled",
                "key": jax.random.key(0),
                "likelihood": ngd.LogDensity(),
                "model_fn": lambda p, x: (x @ p["w"])[:, 0],
            },
            ValueError,
            '`kind` must be "exact"',
        ),
        ({"params": {"w": jnp.ones((2, 3), int)}}, TypeError, "`params` must hold"),
        ({"batch": jnp.ones((0, 2))}, ValueError, "`batch` must hold at least one"),
        (
            {"model_fn": lambda p, x: {"logits": x @ p["w"]}},
            TypeError,
            "`outputs` of Categorical",
        ),
        ({"microbatch_size": 0}, ValueError, "`microbatch_size` must be at least 1"),
        ({"microbatch_size": 2.0}, TypeError, "`microbatch_size` must be a Python int"),
        ({"microbatch_size": True}, TypeError, "`microbatch_size` must be a Python"),
        (
            {"model_fn": lambda p, _: jnp.ones((5, 2)) @ p["w"], "microbatch_size": 2},
            ValueError,
            "`microbatch_size` needs a leaf of `batch`",
        ),
        (
            {
                "model_fn": lambda p, x: {"a": x @ p["w"], "b": x[:3] @ p["w"]},
                "likelihood": ngd.Product(
                    {"a": ngd.Categorical(), "b": ngd.Categorical()}
                ),
                "microbatch_size": 2,
            },
            ValueError,
            "share one leading axis",
        ),
        ({"weights": jnp.ones(3)}, ValueError, "`weights` must broadcast"),
        ({"weights": jnp.ones((4, 1))}, ValueError, "`weights` must broadcast"),
        (
            {
                "model_fn": lambda p, x: {"a": x @ p["w"]},
                "likelihood": ngd.Product({"a": ngd.Categorical()}),
                "weights": {"b": jnp.ones(4)},
            },
            ValueError,
            "`weights` must have an entry for each block",
        ),
    ],
)
def test_misuse_raises_an_error_that_names_the_argument(changes, error, match):
    arguments = GOOD | changes
    positional = [arguments.pop(name) for name in GOOD]
    with pytest.raises(error, match=match):
        linearize_fisher(*positional, **arguments)


def test_vectors_and_parameters_that_do_not_fit_raise():
    fisher = ngd.linearize_fisher(*GOOD.values())
    wrong_shape, wrong_structure = {"w": jnp.ones((3, 2))}, {"v": jnp.ones((2, 3))}
    for method in (fisher.matvec, fisher.quadratic):
        with pytest.raises(ValueError, match=r"`vector`.*`params`.*\['w'\]"):
            method(wrong_shape)
        with pytest.raises(ValueError, match="`vector` must have the tree structure"):
            method(wrong_structure)
    with pytest.raises(ValueError, match="`new_params` must have the shapes"):
        ngd.mean_kl(
            linear, GOOD["params"], wrong_shape, GOOD["batch"], ngd.Categorical()
        )
