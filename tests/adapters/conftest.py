"""A bundle with an adapter beside it, fresh for each test."""

import shutil
from types import SimpleNamespace

import pytest

from tests.adapters.bundles import build


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shelf")
    build(directory)
    return directory


@pytest.fixture
def work(shelf, tmp_path):
    """Paths of ``base``, ``bundle`` and ``adapter``, which may be changed."""
    for name in ("bundle", "adapter"):
        shutil.copytree(shelf / name, tmp_path / name)
    return SimpleNamespace(
        base=shelf / "base", bundle=tmp_path / "bundle", adapter=tmp_path / "adapter", path=tmp_path
    )
