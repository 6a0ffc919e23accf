"""The tasks by name; a new one is a module here and a line in `TASKS`."""

from typing import Any

from experiments.tasks.digits import DigitsConfig, make_digits
from experiments.tasks.task import Task, num_examples

__all__ = ["TASKS", "TASK_CONFIGS", "Task", "make_task", "num_examples"]

TASKS = {"digits": (DigitsConfig, make_digits)}
TASK_CONFIGS = {name: config_class for name, (config_class, _) in TASKS.items()}


def make_task(config: Any) -> Task:
    """Builds the task that `config.name` names."""
    _, make = TASKS[config.name]
    return make(config)
