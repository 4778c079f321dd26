"""Traces of the training data in an adapter's files, which push leaves out unless asked.

Activation statistics are second moments of what the data made the layers see. A training record
has hashes of the data, by which anybody who has a copy can tell that it was trained on, and prompts
that were tried on the way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["TRACES", "without_traces"]

#: What the plan says when they are published.
TRACES = "hashes of the training data and the prompts of its samples"

_DATA = ("data", "held_out_data")
_HASHES = ("sha256", "fingerprint")


def without_traces(record: dict[str, Any]) -> dict[str, Any]:
    """Return a training record without hashes of its data and without its sample prompts.

    Examples
    --------
    >>> without_traces({"training": {"data": {"rows": 3, "fingerprint": "ab"}, "steps": 5}})
    {'training': {'data': {'rows': 3}, 'steps': 5}}
    """
    told = record.get("training")
    if isinstance(told, dict):
        return {**record, "training": without_traces(told)}
    found = {
        name: _without(value, _HASHES) if name in _DATA else value for name, value in record.items()
    }
    if isinstance(found.get("settings"), dict):
        found["settings"] = {n: v for n, v in found["settings"].items() if n != "prompt"}
    return found


def _without(value: Any, names: Iterable[str]) -> Any:
    if isinstance(value, dict):
        return {name: _without(one, names) for name, one in value.items() if name not in names}
    if isinstance(value, list):
        return [_without(one, names) for one in value]
    return value
