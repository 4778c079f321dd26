"""``training_record.json``: what is to be known of how an adapter was trained.

It lies beside the adapter's weights, travels with them into bundles and to the Hub, and is what a
model card is written from. PEFT does not look at it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from loraformat.errors import LoraFormatError
from loraformat.model.checkpoint import CarriedFile
from loraformat.runtimes.chat import RECORD_NAME
from loraformat.train.lora.options import LoraOptions
from loraformat.version import __version__

__all__ = ["training_record"]


def training_record(
    options: LoraOptions | None,
    base: Mapping[str, Any],
    facts: Mapping[str, Any],
    parameters: int = 0,
) -> CarriedFile:
    """Return the record as a file to be carried.

    Parameters
    ----------
    options : LoraOptions or None
        What was asked for; None if an adapter was trained on.
    base : mapping
        ``fingerprint`` and ``source`` of the bundle.
    facts : mapping
        What the training says of itself: data, steps, loss. JSON values.
    parameters : int
        Numbers that are trained.

    Raises
    ------
    LoraFormatError
        If a fact is no JSON value.

    Examples
    --------
    >>> file = training_record(LoraOptions(rank=8), {"fingerprint": "ab"}, {"steps": 3})
    >>> record = json.loads(file.read())
    >>> record["schema"], record["lora"]["rank"], record["training"]
    ('loraformat.training_record', 8, {'steps': 3})
    """
    record = {
        "schema": "loraformat.training_record",
        "schema_version": 1,
        "created_by": f"loraformat {__version__}",
        "base": dict(base),
        "lora": None if options is None else {**asdict(options), "ranks": dict(options.ranks)},
        "trained_parameters": parameters,
        "training": dict(facts),
    }
    try:
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise LoraFormatError(f"the facts of the training are no JSON: {error}") from None
    data = text.encode("utf-8")
    return CarriedFile(RECORD_NAME, len(data), lambda: data)
