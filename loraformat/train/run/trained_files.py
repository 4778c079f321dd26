"""Evaluation files that an adapter was trained on, recognised by the hashes in its record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loraformat.model.tokenizer_files import CarriedTokenizer
from loraformat.ops.opening.adapter import open_adapter
from loraformat.runtimes.chat import RECORD_NAME
from loraformat.train.run.training_facts import hash_of

__all__ = ["trained_on"]


def trained_on(adapter: str, sources: Sequence[tuple[str, int]]) -> list[str]:
    """Say which of some files an adapter's record names as training data.

    Files are told by their hashes, since the record holds no rows. An adapter without a record, or
    without hashes in it, was trained on something that is not known.

    Parameters
    ----------
    adapter : str
        A path, or a Hub id.
    sources : sequence of (str, int)
        Names and rows of what is evaluated, as in `loraformat.train.data.DatasetStats`.

    Returns
    -------
    list of str
        Sentences for people.
    """
    with open_adapter(adapter) as opened:
        record = CarriedTokenizer(opened.files, opened.path).json(RECORD_NAME)
    known = set(_hashes(record))
    return [
        f"{Path(adapter).name} was trained on {Path(name).name} ({rows} rows): its loss there is "
        "no held-out loss"
        for name, rows in sources
        if known and hash_of(Path(name)) in known
    ]


def _hashes(record: dict[str, Any]) -> Iterator[str]:
    data: Any = record
    for name in ("training", "data", "files"):
        data = data.get(name) if isinstance(data, dict) else None
    for one in data if isinstance(data, list) else []:
        if isinstance(one, dict) and isinstance(one.get("sha256"), str):
            yield one["sha256"]
