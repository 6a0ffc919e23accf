"""Fashion-MNIST with a fully connected network, 784-512-256-10 by default."""

from typing import Annotated

from experiments.running.settings import AT_LEAST_ONE
from experiments.tasks.supervised.classification import make_mlp_classifier
from experiments.tasks.supervised.images import load_images, to_unit_interval
from experiments.tasks.supervised.task import Task

__all__ = ["make_fashion_mlp"]

NUM_CLASSES = 10


def make_fashion_mlp(
    hidden_sizes: Annotated[list[int], AT_LEAST_ONE],
    data_dir: str | None,
    cache_dir: str | None,
) -> Task:
    """Builds the task from its settings.

    Args:
      hidden_sizes: widths of the hidden layers.
      data_dir: a folder to search for the data first; null for none.
      cache_dir: a folder for a memory-mapped copy of the pixels; null keeps them in
        memory.
    """
    train, test = load_images("fashion_mnist", data_dir, cache_dir)
    return make_mlp_classifier(
        "fashion_mlp",
        train,
        test,
        sizes=(*hidden_sizes, NUM_CLASSES),
        inputs_fn=to_unit_interval,
    )
