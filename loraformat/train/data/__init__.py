"""The trainer's data: files of rows in, batches of tokens out, in an order that can be continued.

::

    sources   → rows        files, byte offsets, one row at a time
    rows      → samples     what kind of row; chat template; token ids and what is learned
    samples   → audit       one pass over all before training: lengths, masks, refusals
    lengths   → plan        which samples share a row, which rows a batch; pure arithmetic
    plan      → batches     tokenized again on a second thread, and a cursor after each

Memory holds some tens of bytes per sample, never the text.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraformat.train.data.data_position import DataPosition as DataPosition
    from loraformat.train.data.dataset import Dataset as Dataset
    from loraformat.train.data.dataset import open_data as open_data
    from loraformat.train.data.dataset_stats import DatasetStats as DatasetStats
    from loraformat.train.data.options import DataOptions as DataOptions

_HOMES = {
    "DatasetStats": ("loraformat.train.data.dataset_stats", "DatasetStats"),
    "DataPosition": ("loraformat.train.data.data_position", "DataPosition"),
    "DataOptions": ("loraformat.train.data.options", "DataOptions"),
    "Dataset": ("loraformat.train.data.dataset", "Dataset"),
    "open_data": ("loraformat.train.data.dataset", "open_data"),
}

__all__ = [
    "DataOptions",
    "DataPosition",
    "Dataset",
    "DatasetStats",
    "open_data",
]


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'loraformat.train.data' has no attribute {name!r}") from None
    return getattr(import_module(module), attribute)
