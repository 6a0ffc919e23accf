"""The learner of a configuration: most tasks are data sets; others bring their own."""

from collections.abc import Callable

from experiments.running.config import TrainConfig
from experiments.running.learner import Learner
from experiments.tasks import make_task
from experiments.tasks.equations.learner import PhysicsLearner
from experiments.tasks.policies.learner import PolicyLearner
from experiments.tasks.supervised.learner import SupervisedLearner
from experiments.tasks.wave_functions.learner import WaveFunctionLearner

__all__ = ["make_learner"]

# By the name of the task, for those in `experiments.tasks.OTHER_TASK_CONFIGS`.
OTHER_LEARNERS: dict[str, Callable[[TrainConfig], Learner]] = {
    "pinn": PhysicsLearner,
    "trpo": PolicyLearner,
    "vmc": WaveFunctionLearner,
}


def make_learner(config: TrainConfig) -> Learner:
    """Builds what `config.task` names, with the optimizer that the rest describes.

    Raises:
      ConfigError: a setting does not fit the task.
    """
    if make_other := OTHER_LEARNERS.get(config.task.name):
        return make_other(config)
    return SupervisedLearner(config, make_task(config.task))
