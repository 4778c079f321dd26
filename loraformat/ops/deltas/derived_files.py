"""Files that accompany an adapter computed from others.

Tokenizer, licence and words come along. Weights, and pictures of how others were trained, do not;
records of trainings become the history of the new one, which was measured by none of them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence

from loraformat.bundle.run_paths import CURVE_NAME
from loraformat.model.adapter import Adapter
from loraformat.model.checkpoint import CarriedFile
from loraformat.storage import strict_json

__all__ = ["derived_files"]

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".gguf")
_RECORD = "training_record.json"
_OF_THE_OLD = ("adapter_config.json", CURVE_NAME, _RECORD)
_MAX_RECORD_BYTES = 16 << 20


def derived_files(adapters: Sequence[Adapter]) -> tuple[CarriedFile, ...]:
    """Return the files of the first adapter that remain valid for the result.

    Parameters
    ----------
    adapters : sequence of Adapter
        At least one.

    Returns
    -------
    tuple of CarriedFile
        With a ``training_record.json`` whose ``derived_from`` lists the records, if there are any.
    """
    kept = tuple(file for file in adapters[0].files if not _is_of_the_old(file.path))
    records = [record for adapter in adapters for record in _records(adapter)]
    if not records:
        return kept
    data = (json.dumps({"derived_from": records}, indent=2, ensure_ascii=False) + "\n").encode()
    return (*kept, CarriedFile(_RECORD, len(data), lambda: data))


def _is_of_the_old(path: str) -> bool:
    return path.endswith(_WEIGHTS) or path.rsplit("/", 1)[-1] in _OF_THE_OLD


def _records(adapter: Adapter) -> Iterator[object]:
    for file in adapter.files:
        if file.path == _RECORD and file.nbytes <= _MAX_RECORD_BYTES:
            with contextlib.suppress(strict_json.StrictJsonError):
                yield strict_json.loads(file.read())
