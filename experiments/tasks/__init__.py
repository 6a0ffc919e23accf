"""The tasks by name; a new one is a module here and a line in `TASKS`.

A task that is not a data set with a loss (a policy in an environment, a wave function)
has its settings in `OTHER_TASK_CONFIGS`, and what it does in `learners`.
"""

from collections.abc import Callable
from typing import Any

from experiments.tasks.equations.settings import PhysicsConfig
from experiments.tasks.policies.settings import PolicyConfig
from experiments.tasks.supervised.autoencoder import AutoencoderConfig, make_autoencoder
from experiments.tasks.supervised.charlm import CharLMConfig, make_charlm
from experiments.tasks.supervised.digits import DigitsConfig, make_digits
from experiments.tasks.supervised.fashion_cnn import FashionCNNConfig, make_fashion_cnn
from experiments.tasks.supervised.fashion_mlp import FashionMLPConfig, make_fashion_mlp
from experiments.tasks.supervised.imbalance import ImbalanceConfig, make_imbalance
from experiments.tasks.supervised.regression import RegressionConfig, make_regression
from experiments.tasks.supervised.task import Task, num_examples
from experiments.tasks.wave_functions.settings import WaveFunctionConfig

__all__ = [
    "OTHER_TASK_CONFIGS",
    "TASKS",
    "TASK_CONFIGS",
    "Task",
    "make_task",
    "num_examples",
]

TASKS: dict[str, tuple[type, Callable[[Any], Task]]] = {
    "autoencoder": (AutoencoderConfig, make_autoencoder),
    "charlm": (CharLMConfig, make_charlm),
    "digits": (DigitsConfig, make_digits),
    "fashion_cnn": (FashionCNNConfig, make_fashion_cnn),
    "fashion_mlp": (FashionMLPConfig, make_fashion_mlp),
    "imbalance": (ImbalanceConfig, make_imbalance),
    "regression": (RegressionConfig, make_regression),
}
OTHER_TASK_CONFIGS: dict[str, type] = {
    "pinn": PhysicsConfig,
    "trpo": PolicyConfig,
    "vmc": WaveFunctionConfig,
}
TASK_CONFIGS = {
    **{name: config_class for name, (config_class, _) in TASKS.items()},
    **OTHER_TASK_CONFIGS,
}


def make_task(config: Any) -> Task:
    """Builds the task that `config.name` names."""
    _, make = TASKS[config.name]
    return make(config)
