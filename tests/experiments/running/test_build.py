import pytest

import ngd_jax as ngd
from experiments.running.build import build, locate
from experiments.running.settings import ConfigError
from experiments.tasks.policies.settings import PPOConfig

CG = {"_target_": "ngd_jax.CG", "max_steps": 3}


def returns_all(first, second=2, third=3):
    return first, second, third


HERE = f"{__name__}:returns_all"


def test_builds_what_is_nested_and_leaves_the_rest():
    node = {"a": [1, CG], "b": {"_target_": "ngd_jax.Auto", "otherwise": CG}}
    assert build(node, "x") == {
        "a": [1, ngd.CG(3)],
        "b": ngd.Auto(otherwise=ngd.CG(3)),
    }


def test_offers_go_where_they_are_known_and_not_given():
    node = {"_target_": HERE, "first": {"_target_": HERE, "first": 1, "third": 0}}
    assert build(node, "x", {"third": 9, "fourth": 4}) == ((1, 2, 0), 2, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_stps": 1}, "`x.max_stps` is not a setting of ngd_jax.CG, which has max"),
        ({"max_steps": 0}, "`x.max_steps` must be at least 1, got 0"),
        ({"max_steps": 1.5}, "`x.max_steps` must be a whole number, got 1.5"),
        ({"max_steps": True}, "`x.max_steps` must be a whole number, got True"),
        ({"rtol": "small"}, "`x.rtol` must not be text, got 'small'"),
        ({"rtol": float("nan")}, "`x.rtol` must be a number, got nan"),
        ({"_target_": "ngd_jax.CGG"}, "`x._target_` must name what can be imported"),
        ({"_target_": "no_such.CG"}, "`x._target_` must name what can be imported"),
        ({"_target_": "ngd_jax:STATIC_ARGS"}, "must name what can be called"),
        ({"_target_": None}, "`x._target_` must name what can be imported, got None"),
    ],
)
def test_a_mistake_names_the_setting_and_what_there_is(changes, message):
    with pytest.raises(ConfigError) as caught:
        build(CG | changes, "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_argument_that_lacks_is_named():
    with pytest.raises(ConfigError, match=r"`x`: .*'first'"):
        build({"_target_": HERE}, "x")


def test_rules_of_settings_hold():
    node = {"_target_": f"{PPOConfig.__module__}.PPOConfig", "learning_rate": 1.0}
    node |= {"clip": 0.2, "epochs": 0, "minibatch_size": 10}
    with pytest.raises(ConfigError, match=r"`x\.epochs` must be at least 1, got 0"):
        build(node, "x")


def test_locates_by_dots_and_by_a_colon():
    assert locate("ngd_jax.CG", "x") is locate("ngd_jax:CG", "x") is ngd.CG
