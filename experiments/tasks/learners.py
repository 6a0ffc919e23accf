"""Chooses the learner of a configuration: for a data set, or the task's own."""

from collections.abc import Callable

from experiments.running.config import TrainConfig
from experiments.running.learner import Learner
from experiments.tasks import make_task
from experiments.tasks.equations.learner import PhysicsLearner
from experiments.tasks.equations.settings import PhysicsConfig
from experiments.tasks.policies.learner import PolicyLearner
from experiments.tasks.policies.settings import PolicyConfig
from experiments.tasks.supervised.learner import SupervisedLearner
from experiments.tasks.wave_functions.learner import WaveFunctionLearner
from experiments.tasks.wave_functions.settings import WaveFunctionConfig

__all__ = ["make_learner"]

OTHER_LEARNERS: dict[type, Callable[[TrainConfig], Learner]] = {
    PhysicsConfig: PhysicsLearner,
    PolicyConfig: PolicyLearner,
    WaveFunctionConfig: WaveFunctionLearner,
}


def make_learner(config: TrainConfig) -> Learner:
    """Builds the learner of `config.task`, with the optimizer of the configuration.

    Raises:
      ConfigError: a setting does not fit the task.
    """
    for kind, make_other in OTHER_LEARNERS.items():
        if isinstance(config.task, kind):
            return make_other(config)
    return SupervisedLearner(config, make_task(config.task))
