import pytest

from experiments.optimizers import make_optimizer
from experiments.settings import ConfigError
from experiments.tasks import make_task
from tests.experiments.helpers import make_config


def test_natural_gradient_without_any_length_of_step_is_an_error():
    config = make_config("optimizer.learning_rate=null", "optimizer.max_kl=null")
    with pytest.raises(ConfigError, match="cannot both be null"):
        make_optimizer(config.optimizer, make_task(config.task))


def test_a_configuration_that_no_optimizer_has_is_an_error():
    config = make_config()
    with pytest.raises(TypeError, match="No optimizer is built from"):
        make_optimizer(config.task, make_task(config.task))
