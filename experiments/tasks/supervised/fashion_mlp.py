"""Fashion-MNIST with a fully connected network, 784-512-256-10 as shipped."""

import dataclasses
from typing import Annotated

from experiments.running.settings import AT_LEAST_ONE
from experiments.tasks.supervised.classification import make_mlp_classifier
from experiments.tasks.supervised.images import load_images, to_unit_interval
from experiments.tasks.supervised.task import Task

__all__ = ["FashionMLPConfig", "make_fashion_mlp"]

NUM_CLASSES = 10


@dataclasses.dataclass
class FashionMLPConfig:
    """Settings of the task `fashion_mlp`.

    Attributes:
      name: "fashion_mlp".
      hidden_sizes: widths of the hidden layers.
      data_dir: a folder where the data is looked for first; null for none.
      cache_dir: a folder for a memory-mapped copy of the pixels; null keeps them in
        memory.
    """

    name: str
    hidden_sizes: Annotated[list[int], AT_LEAST_ONE]
    data_dir: str | None
    cache_dir: str | None


def make_fashion_mlp(config: FashionMLPConfig) -> Task:
    """Builds the task from its settings."""
    train, test = load_images("fashion_mnist", config.data_dir, config.cache_dir)
    return make_mlp_classifier(
        config.name,
        train,
        test,
        sizes=(*config.hidden_sizes, NUM_CLASSES),
        inputs_fn=to_unit_interval,
    )
