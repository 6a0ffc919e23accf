"""The learner of a configuration: most tasks are data sets; others bring their own."""

from collections.abc import Callable

from experiments.config import TrainConfig
from experiments.learner import Learner
from experiments.physics.learner import PhysicsLearner
from experiments.policy.learner import PolicyLearner
from experiments.supervised import SupervisedLearner
from experiments.tasks import make_task
from experiments.wave_functions.learner import WaveFunctionLearner

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
