"""Small tables in their raw units with a rare class: ill-conditioned classification.

The columns of the wine data range from 0.1 (hue) to 1,700 (proline), so the Fisher
matrix of the first layer has eigenvalues that differ by a factor of 10^8. The rarest
class of the training set is thinned out; the test set keeps its proportions, so its
accuracy shows whether the rare class was learned.
"""

from typing import Annotated

import numpy as np
from sklearn import datasets
from sklearn.model_selection import train_test_split

from experiments.running.settings import AT_LEAST_ONE, ConfigError, Rule, one_of
from experiments.tasks.supervised.classification import make_mlp_classifier
from experiments.tasks.supervised.task import PyTree, Task

__all__ = ["load_imbalanced", "make_imbalance"]

TABLES = {"wine": datasets.load_wine, "breast_cancer": datasets.load_breast_cancer}
TEST_SHARE = 0.3
SHARE = Rule("in (0, 1]", lambda value: 0.0 < value <= 1.0)


def load_imbalanced(data: str, rare_share: float) -> tuple[PyTree, PyTree]:
    """Returns the training and the test set: columns `x` in raw units, labels `y`.

    The split is part of the task and does not depend on the seed of a run.

    Raises:
      ConfigError: `rare_share` would leave no examples of the rarest class.
    """
    columns, labels = TABLES[data](return_X_y=True)  # pyright: ignore[reportCallIssue]
    x_train, x_test, y_train, y_test = train_test_split(
        columns.astype(np.float32),
        labels.astype(np.int32),
        test_size=TEST_SHARE,
        stratify=labels,
        random_state=0,
    )
    rare = np.flatnonzero(y_train == np.bincount(y_train).argmin())
    num_kept = int(rare_share * len(rare))
    if num_kept == 0:
        raise ConfigError(
            f"`task.rare_share` must keep at least one of the {len(rare)} examples of "
            f"the rarest class of {data}, got {rare_share}."
        )
    kept = np.delete(np.arange(len(y_train)), rare[num_kept:])
    return {"x": x_train[kept], "y": y_train[kept]}, {"x": x_test, "y": y_test}


def make_imbalance(
    data: Annotated[str, one_of(*TABLES)],
    rare_share: Annotated[float, SHARE],
    standardize: bool,
    hidden_sizes: Annotated[list[int], AT_LEAST_ONE],
) -> Task:
    """Builds the task from its settings.

    Args:
      data: "wine" (13 columns, 3 classes) or "breast_cancer" (30 columns, 2 classes).
      rare_share: share of the rarest class that is kept in the training set.
      standardize: whether to scale every column to mean 0 and deviation 1; false keeps
        the ill-conditioning, which is the point of the task.
      hidden_sizes: widths of the hidden layers.
    """
    train, test = load_imbalanced(data, rare_share)
    if standardize:
        mean, deviation = train["x"].mean(0), train["x"].std(0)
        for part in (train, test):
            part["x"] = (part["x"] - mean) / deviation
    num_classes = int(test["y"].max()) + 1
    return make_mlp_classifier(
        "imbalance",
        train,
        test,
        sizes=(*hidden_sizes, num_classes),
        # No unit saturates at the start, whatever the units of measurement.
        first_scale=1.0 / max(1.0, float(np.sqrt(np.mean(np.square(train["x"]))))),
    )
