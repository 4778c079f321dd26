"""What the loop's tests share: one tiny bundle and its data."""

import pytest

from loraformat.train.run.train import train
from tests.cli.conftest import run  # noqa: F401
from tests.train.loop import tiny_runs


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A directory with ``bundle``, ``data.jsonl`` and ``held.jsonl``; to be read only."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_runs.make_bundle(directory)
    tiny_runs.write_rows(directory / "data.jsonl", 40)
    tiny_runs.write_rows(directory / "held.jsonl", 12, seed=1)
    return directory


@pytest.fixture
def options(place):
    """Returns the options of a tiny run into a directory."""

    def get(output, **changes):
        base = changes.pop("base", place / "bundle")
        data = changes.pop("data", place / "data.jsonl")
        return tiny_runs.options(base, data, output, **changes)

    return get


@pytest.fixture
def train_to(options):
    """Trains into a directory and returns the report."""

    def go(output, *, resume=False, force=False, dry_run=False, observe=None, **changes):
        return train(
            options(output, **changes), resume=resume, force=force, dry_run=dry_run,
            observe=observe or (lambda event: None),
        )  # fmt: skip

    return go
