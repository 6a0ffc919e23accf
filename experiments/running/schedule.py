"""When a run pauses between steps: to show, to evaluate, to save, to end."""

from experiments.running.config import TrainConfig

__all__ = ["next_stop"]


def next_stop(step: int, config: TrainConfig) -> int:
    """Returns the next step after `step` at which control must return to Python."""
    intervals = (config.steps_per_dispatch, config.eval_every, config.checkpoint_every)
    return min(config.steps, *((step // every + 1) * every for every in intervals))
