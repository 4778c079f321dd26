"""A data set on the Hugging Face Hub, through the optional package ``datasets``."""

from __future__ import annotations

from typing import Any

from loraformat.errors import HubError, InputError, MissingDependencyError, printable
from loraformat.train.data.row import Row
from loraformat.train.data.row_formats import FIELDS
from loraformat.train.data.spooled_rows import without_nulls

__all__ = ["HubRows", "open_hub"]


class HubRows:
    """The rows of one split; ``datasets`` keeps them on disk and maps them.

    Parameters
    ----------
    name : str
        The id.
    table : datasets.Dataset
        Columns that mean nothing to the trainer are never read.
    """

    def __init__(self, name: str, table: Any) -> None:
        self._name = name
        known = [column for column in table.column_names if column in FIELDS]
        if not known:
            raise InputError(
                f"columns {printable(', '.join(table.column_names))}; "
                f"wanted some of {', '.join(sorted(FIELDS))}",
                path=name,
            )
        self._table = table.select_columns(known)

    @property
    def name(self) -> str:
        """The id."""
        return self._name

    def __len__(self) -> int:
        return len(self._table)

    def place(self, number: int) -> str:
        """Say which row it is, counted from 1."""
        return f"row {number + 1}"

    def read(self, number: int) -> Row:
        """Return a row."""
        return Row(without_nulls(dict(self._table[number])))


def open_hub(repo: str, revision: str | None, subset: str, split: str) -> HubRows:
    """Download one split of a data set, or find it in the cache.

    Raises
    ------
    MissingDependencyError
        If ``datasets`` is not installed.
    HubError
        If it cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            "is no local path, and data sets on the Hub need the package datasets, "
            "which is not installed",
            path=repo,
            hint="run: pip install 'loraformat[data]'",
        ) from None
    try:
        table = datasets.load_dataset(repo, subset or None, split=split, revision=revision)
    except Exception as error:  # HTTP, offline, cache, builder and parser errors of several trees
        words = " ".join(str(error).split())[:300]
        raise HubError(
            f"is no local path, and cannot be had from the Hub as a data set: {words}",
            path=repo,
            hint="check the id, the split and the subset",
        ) from error
    return HubRows(repo, table)
