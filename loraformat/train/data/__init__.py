"""Training data: files of rows in, batches of tokens out, in an order that can be resumed.

In which order to read:

- sources to rows: `row_sources` (files, directories, the Hub), `row` (a row, and byte ranges of a
  file); one module for each format: `json_file`, `csv_file`, `text_file`, and `spooled_rows`
  (compressed files, Arrow and Parquet: what must be unpacked first)
- rows to samples: `row_formats` (what a row means), `chat` (conversations rendered by
  `loraformat.chat_templates`), `tokenizer`, `encode` (token ids and loss mask)
- samples to statistics: `dataset_scan`, one pass over all rows before training
- lengths to batches: `batch_plan` (which samples share a row, which rows a batch)
- `dataset`, which holds all this together, and `options`

Memory holds some tens of bytes per sample, never the text.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraformat.train.data.dataset import open_data as open_data
    from loraformat.train.data.options import DataOptions as DataOptions

_MODULES = {"DataOptions": "options", "open_data": "dataset"}

__all__ = ["DataOptions", "open_data"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
