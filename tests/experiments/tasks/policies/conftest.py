import pytest


@pytest.fixture(autouse=True)
def _gymnax():
    pytest.importorskip("gymnax")
