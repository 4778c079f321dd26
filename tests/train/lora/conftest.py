"""Make the modules beside this file importable with ``--import-mode=importlib``; tiny bases."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_bases import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Return a function: the paths of a tiny base by name."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = make_base(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make
