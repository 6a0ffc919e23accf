"""Texts as lists of documents: the King James Bible, and Python's documentation topics.

The Bible, 66 books with 4.1 million characters, is in the Debian packages `bible-kjv`
and `bible-kjv-text`; the program `bible` prints it. The topics, half a million
characters, are part of Python itself; they differ between its versions, so they have no
checksum.
"""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np

from experiments.running.settings import ConfigError
from experiments.tasks.data.files import check_sum, find_file, package_folders

__all__ = ["INSTALL", "load_kjv", "load_python_topics", "load_text"]

INSTALL = "apt-get install bible-kjv bible-kjv-text"
# Checksum of the program's output.
KJV_SUM = "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d"
KJV_VERSES = "gen1:1-rev22:21"


def load_text(name: str, data_dir: str | None = None) -> list[str]:
    """Returns the documents of the text `name`, "kjv" or "python".

    Raises:
      ConfigError: the text is missing or damaged.
    """
    return load_kjv(data_dir) if name == "kjv" else load_python_topics()


def load_kjv(data_dir: str | None = None) -> list[str]:
    """Returns the books of the King James Bible, one verse per line, no references.

    Raises:
      ConfigError: the program or its data is missing, or the text is not as expected.
    """
    what = "the King James Bible"
    folders = package_folders(data_dir, "usr/bin")
    found = None if data_dir else shutil.which("bible")
    program = Path(found) if found else find_file("bible", folders, what, INSTALL)
    data_folders = package_folders(data_dir, "usr/lib")
    data = find_file("bible.data", data_folders, what, INSTALL)
    try:
        printed = subprocess.run(  # noqa: S603
            [program, "-p", f"{data.parent}/", "-f", KJV_VERSES],
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{program} does not run: {error}.") from error
    check_sum(np.frombuffer(printed, np.uint8), KJV_SUM, f"{what} from {program}")
    books: dict[str, list[str]] = {}
    for line in printed.decode("ascii").splitlines():
        reference, _, verse = line.partition(" ")
        match = re.match(r"(\d?[A-Za-z]+)\d+:\d+$", reference)
        assert match is not None
        books.setdefault(match[1], []).append(verse)
    return ["\n".join(verses) + "\n" for verses in books.values()]


def load_python_topics() -> list[str]:
    """Returns the topics of Python's documentation, in the order of their names."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
