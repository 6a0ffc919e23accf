"""Data that the tests of all supervised tasks share."""

import pytest

from experiments.tasks.data import fashion_mnist, mnist5k
from experiments.tasks.supervised import charlm, regression
from tests.experiments.data_files import sum_of, write_fashion_mnist, write_mnist5k
from tests.experiments.tasks.supervised.small_tasks import (
    DOCUMENTS,
    concrete_like,
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with small data in place of the real one, under its known sums."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion_mnist, "SUMS", write_fashion_mnist(folder, 40, 20))
        patch.setattr(mnist5k, "SUM", sum_of(write_mnist5k(folder, 50)))
        patch.setattr(charlm, "load_text", lambda *_: DOCUMENTS)
        patch.setattr(regression, "load_concrete", lambda _: concrete_like(60))
        yield folder
