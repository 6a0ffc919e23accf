"""What can be learned: each task has a file in `configs/task/` that names its maker.

The maker is a function that returns a `Task`: a data set with a model and a loss. For
anything else (a policy in an environment, an equation, a wave function) the file names
the class of its settings, for which `learners` has a learner.
"""

from typing import Any

from experiments.running.build import locate
from experiments.running.settings import ConfigError
from experiments.tasks.supervised.task import Task, num_examples

__all__ = ["Task", "make_task", "num_examples"]


def make_task(config: Any) -> Task:
    """Calls the function that `config._target_` names with the other settings.

    Raises:
      ConfigError: the function does not return a task.
    """
    settings = dict(vars(config))
    name, target = settings.pop("name"), settings.pop("_target_")
    task = locate(target, "task._target_")(**settings)
    if not isinstance(task, Task):
        raise ConfigError(
            f"`task._target_` must make an experiments.tasks.Task, but {target} made "
            f"{type(task).__name__} for the task {name}."
        )
    return task
