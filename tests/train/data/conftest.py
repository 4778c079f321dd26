"""Rows become data sets here, with tokenizers that are trained once."""

import json

import pytest

from loraformat.train.data import DataOptions, open_data
from tests.train.data.tokenizers_and_templates import TEMPLATES, byte_level, metaspace


@pytest.fixture(scope="session")
def tokenizers():
    return {"byte_level": byte_level(), "metaspace": metaspace()}


@pytest.fixture
def tokenizer(tokenizers):
    """The byte-level one, without a chat template."""
    tokenizers["byte_level"].chat_template = None
    return tokenizers["byte_level"]


@pytest.fixture
def chat(tokenizer):
    """The byte-level one with ChatML."""
    tokenizer.chat_template = TEMPLATES["chatml"]
    return tokenizer


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON Lines and returns the path."""

    def to(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return to


@pytest.fixture
def dataset(write, tokenizer):
    """Opens rows as data."""

    def opened(rows, *, tokenizer=tokenizer, rank=0, world=1, **options):
        path = write("rows.jsonl", rows)
        return open_data(path, tokenizer, DataOptions(**options), rank=rank, world=world)

    return opened
