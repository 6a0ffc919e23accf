"""Small files of random data in the formats of the real ones."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np

from experiments.tasks.data import mnist5k


def sum_of(content: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(content).data).hexdigest()


def write_fashion_mnist(folder: Path, num_train: int, num_test: int) -> dict[str, str]:
    """Writes the four files; returns their sums by name."""
    random, sums = np.random.default_rng(0), {}
    for part, count in (("train", num_train), ("t10k", num_test)):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        labels = random.integers(0, 10, count).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = gzip.compress(_idx(array))
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(content)
            sums[f"{part}-{kind}-ubyte.gz"] = hashlib.sha256(content).hexdigest()
    return sums


def write_mnist5k(folder: Path, count: int) -> np.ndarray:
    """Writes the file; returns its table, pixels and label in each row."""
    table = np.random.default_rng(0).integers(0, 256, (count, 785), np.uint8)
    table[:, -1] = np.sort(np.arange(count) % 10)
    lines = "".join(",".join(map(str, row)) + "\n" for row in table.tolist())
    (folder / mnist5k.FILE).write_bytes(gzip.compress(lines.encode()))
    return table


def _idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
