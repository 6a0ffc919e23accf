"""Fashion-MNIST: 60,000 + 10,000 grey images of 28 x 28 pixels, ten kinds of clothes.

Four gzipped IDX files, as published by their authors (Xiao, Rasul and Vollgraf 2017)
and installed by the Debian package `dataset-fashion-mnist`.
"""

import gzip
from pathlib import Path

import numpy as np

from experiments.running.settings import ConfigError
from experiments.tasks.data.files import (
    check_sum,
    find_file,
    memory_mapped,
    package_folders,
)

__all__ = ["INSTALL", "load_fashion_mnist", "read_idx"]

INSTALL = "apt-get install dataset-fashion-mnist"
FOLDER = "usr/share/datasets/fashion-mnist"
SUMS = {
    "train-images-idx3-ubyte.gz": (
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
    ),
    "train-labels-idx1-ubyte.gz": (
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
    ),
}

Images = dict[str, np.ndarray]


def load_fashion_mnist(
    data_dir: str | None = None, cache_dir: str | None = None
) -> tuple[Images, Images]:
    """Returns the training and the test set.

    Each has the pixels `x`, uint8 `[N, 784]`, and the labels `y`, int32 `[N]`. With
    `cache_dir`, the pixels are read as needed from files in that folder.

    Raises:
      ConfigError: a file is missing or damaged.
    """

    def load(name: str) -> np.ndarray:
        def read() -> np.ndarray:
            folders = package_folders(data_dir, FOLDER)
            path = find_file(name, folders, "Fashion-MNIST", INSTALL)
            content = path.read_bytes()
            check_sum(np.frombuffer(content, np.uint8), SUMS[name], str(path))
            array = read_idx(content, path)
            return array.reshape(len(array), -1)

        # A copy of different contents gets a different name.
        short = f"fashion-mnist-{Path(name).stem}-{SUMS[name][:12]}"
        return memory_mapped(cache_dir, short, read)

    return tuple(
        {
            "x": load(f"{part}-images-idx3-ubyte.gz"),
            "y": np.asarray(load(f"{part}-labels-idx1-ubyte.gz"))[:, 0].astype(
                np.int32
            ),
        }
        for part in ("train", "t10k")
    )  # pyright: ignore[reportReturnType]


def read_idx(content: bytes, path: Path) -> np.ndarray:
    """Returns the array in a gzipped IDX file of unsigned bytes.

    Raises:
      ConfigError: the content is not such a file.
    """
    try:
        raw = gzip.decompress(content)
        zeros, kind, rank = int.from_bytes(raw[:2]), raw[2], raw[3]
        shape = np.frombuffer(raw, ">u4", count=rank, offset=4)
        array = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
        array = array.reshape(tuple(int(length) for length in shape))
    except (EOFError, IndexError, OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    if (zeros, kind) != (0, 8):
        raise ConfigError(f"{path} cannot be read: it holds no unsigned bytes.")
    return array
