"""Handwritten digits: scikit-learn's 8 x 8 images, ten classes, a Flax MLP.

The split (1437 training and 360 test examples, the classes in equal proportions) is
part of the task and does not depend on the seed of a run.
"""

from typing import Annotated

import numpy as np
from sklearn.datasets import load_digits as load_sklearn_digits
from sklearn.model_selection import train_test_split

from experiments.running.settings import AT_LEAST_ONE
from experiments.tasks.supervised.classification import make_mlp_classifier
from experiments.tasks.supervised.task import PyTree, Task

__all__ = ["load_digits", "make_digits"]

NUM_CLASSES = 10
NUM_TEST = 360
MAX_PIXEL = 16.0


def load_digits() -> tuple[PyTree, PyTree]:
    """Returns the training and the test set: pixels `x` in [0, 1], labels `y`."""
    images, labels = load_sklearn_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        (images / MAX_PIXEL).astype(np.float32),
        labels.astype(np.int32),
        test_size=NUM_TEST,
        stratify=labels,
        random_state=0,
    )
    return {"x": x_train, "y": y_train}, {"x": x_test, "y": y_test}


def make_digits(hidden_sizes: Annotated[list[int], AT_LEAST_ONE]) -> Task:
    """Builds the task from its settings.

    Args:
      hidden_sizes: widths of the hidden layers.
    """
    train, test = load_digits()
    sizes = (*hidden_sizes, NUM_CLASSES)
    return make_mlp_classifier("digits", train, test, sizes=sizes)
