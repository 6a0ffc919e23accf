"""Compressive strength in MPa of 1030 samples of concrete, from ingredients and age.

From the Debian package `r-cran-modeldata` (Yeh 1998), which installs it in one of R's
lazy-load databases: an index (`Rdata.rdx`) of positions in a file of compressed objects
(`Rdata.rdb`). The PyPI package `rdata` parses the objects.
"""

import lzma
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from experiments.running.settings import ConfigError
from experiments.tasks.data.files import check_sum, find_file, package_folders

__all__ = ["FEATURES", "INSTALL", "load_concrete"]

INSTALL = "apt-get install r-cran-modeldata"
FOLDER = "usr/lib/R/site-library/modeldata/data"
FEATURES = (
    "cement",
    "blast_furnace_slag",
    "fly_ash",
    "water",
    "superplasticizer",
    "coarse_aggregate",
    "fine_aggregate",
    "age",
)
TARGET = "compressive_strength"
# Checksum of the float64 table [1030, 9], features first, little-endian.
SUM = "d0e2d2f0f50277624d7d00b98c4e8b66465e8d5f2f51738500552b8b10a4689b"


def load_concrete(data_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features `[1030, 8]` and the strengths `[1030]`, float64.

    Raises:
      ConfigError: a file or the package `rdata` is missing, or the data is damaged.
    """
    folders = package_folders(data_dir, FOLDER)
    index_path = find_file("Rdata.rdx", folders, "concrete", INSTALL)
    try:
        import rdata  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"The data of concrete is in R's format, and its reader is not installed: "
            f"`pip install rdata` ({error})."
        ) from error
    frame = _read_object(rdata, index_path, "concrete")
    table = np.stack(
        [np.asarray(frame[name], "<f8") for name in (*FEATURES, TARGET)], axis=1
    )
    check_sum(table, SUM, str(index_path))
    return table[:, :-1], table[:, -1]


def _read_object(rdata: Any, index_path: Path, name: str) -> Any:
    """Returns the object called `name` of a lazy-load database, converted to Python."""

    def convert(content: bytes) -> Any:
        with warnings.catch_warnings():
            # It warns about how it maps R's classes: a tibble to a data frame.
            warnings.simplefilter("ignore")
            return rdata.conversion.convert(rdata.parser.parse_data(content))

    try:
        index = convert(index_path.read_bytes())
        offset, length = (int(number) for number in index["variables"][name])
        objects = index_path.with_suffix(".rdb").read_bytes()
        return convert(_decompress(objects[offset : offset + length]))
    except (KeyError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise ConfigError(f"{index_path} cannot be read: {error}.") from error


def _decompress(chunk: bytes) -> bytes:
    # Four bytes with the decompressed length; then zlib, or "Z" and raw LZMA2.
    if chunk[4:5] == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
        return lzma.decompress(chunk[5:], lzma.FORMAT_RAW, filters=filters)
    return zlib.decompress(chunk[4:])
