"""The tasks by name; a new one is a module here and a line in `TASKS`.

A task that is not a data set with a loss (a policy in an environment, a wave function)
has its settings in `OTHER_TASK_CONFIGS` and what it does in `experiments.learners`.
"""

from collections.abc import Callable
from typing import Any

from experiments.physics.settings import PhysicsConfig
from experiments.policy.settings import PolicyConfig
from experiments.tasks.autoencoder import AutoencoderConfig, make_autoencoder
from experiments.tasks.charlm import CharLMConfig, make_charlm
from experiments.tasks.digits import DigitsConfig, make_digits
from experiments.tasks.fashion_cnn import FashionCNNConfig, make_fashion_cnn
from experiments.tasks.fashion_mlp import FashionMLPConfig, make_fashion_mlp
from experiments.tasks.imbalance import ImbalanceConfig, make_imbalance
from experiments.tasks.regression import RegressionConfig, make_regression
from experiments.tasks.task import Task, num_examples
from experiments.wave_functions.settings import WaveFunctionConfig

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
