"""Card sections on training: data, prompt format, settings, evaluation.

The members that are looked for are those of ``docs/hub.md``; every one may be missing, or be
something else, and is left out then. The whole record stands in a fold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from loraformat.card.markup import code, fence, fold, json_block, numbers, plain, table

__all__ = ["evaluation", "settings", "training_data", "without_paths"]

_MAX_ROWS = 50
_MAX_FOLD = 20_000
_MAX_PROMPT = 4_000
_MAX_COLUMNS = 8
_MAX_LINE = 80
#: Nats per token; no loss that means anything is larger.
_MAX_LOSS = 100.0
_LOCAL = re.compile(r"(?:[A-Za-z]:[\\/]|\\\\|/|~/)(?:[^\\/\0\n]+[\\/])*([^\\/\0\n]*)")
_STATES = ("before", "after")


def without_paths(value: Any) -> Any:
    """Return JSON with absolute paths reduced to file names, for privacy.

    Examples
    --------
    >>> without_paths({"file": "/home/me/data.jsonl", "url": "https://x/y"})
    {'file': 'data.jsonl', 'url': 'https://x/y'}
    """
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and (match := _LOCAL.fullmatch(value)):
        return match[1] or value
    return value


def training_data(record: Mapping[str, Any]) -> str:
    """Return the section on data and prompt format; empty if nothing is known."""
    told = _told(record)
    parts = [*_data(told.get("data")), *_prompt(told.get("prompt_format"))]
    return "\n\n".join(["## Training data", *parts]) if parts else ""


def _data(found: Any) -> list[str]:
    """Return a table of files or sources, and a line with totals."""
    whole = found if isinstance(found, dict) else {}
    listed = whole.get("files", found)
    rows = [
        row for row in (listed if isinstance(listed, list) else [listed]) if isinstance(row, dict)
    ]
    names = list(dict.fromkeys(key for row in rows for key in row if _is_scalar(row[key])))
    names = names[:_MAX_COLUMNS]
    lines = [[_cell(row.get(name)) for name in names] for row in rows[:_MAX_ROWS]]
    shown = [table([plain(name) for name in names], lines)] if names else []
    if len(rows) > _MAX_ROWS:
        shown.append(f"and {len(rows) - _MAX_ROWS} more.")
    if listed is not found:
        sums = {key: value for key, value in whole.items() if _is_scalar(value)}
        said = [f"{plain(key.replace('_', ' '))}: {_cell(value)}" for key, value in sums.items()]
        shown += ["; ".join(said[:_MAX_COLUMNS])] if said else []
    return shown


def _prompt(found: Any) -> list[str]:
    if not isinstance(found, str) or not found.strip():
        return []
    if "\n" in found.strip() or len(found) > _MAX_LINE:
        return [f"Prompt format:\n\n{fence(_readable(found[:_MAX_PROMPT]))}"]
    return [f"Prompt format: {code(found)}"]


def evaluation(record: Mapping[str, Any]) -> str:
    """Return the table of metrics before and after; empty if there are none.

    ``evaluation`` is an object with ``before`` and ``after``, or several of them by name; a loss
    (nats per token) on held-out data is one of them, too.
    """
    told = _told(record)
    found = told.get("evaluation", _losses(told))
    if not isinstance(found, dict):
        return ""
    sets = {"": found} if any(state in found for state in _STATES) else found
    rows = []
    for name, both in sets.items():
        if not isinstance(both, dict):
            continue
        before, after = (_numbers(both.get(state)) for state in _STATES)
        for measure in dict.fromkeys([*before, *after]):
            label = f"{name}, {measure}" if name and measure else name or measure
            values = [numbers([of[measure]]) if measure in of else "-" for of in (before, after)]
            rows.append([plain(label), *values])
    if not rows:
        return ""
    head = ["", "base alone", "with the adapter"]
    return f"## Evaluation\n\n{table(head, rows[:_MAX_ROWS])}"


def _losses(told: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the trainer's held-out losses as an evaluation."""
    both = {state: _numbers(told.get(f"heldout_{state}")).get("") for state in _STATES}
    if None not in both.values():
        measured = {
            state: {"loss": loss, "perplexity": math.exp(min(loss, _MAX_LOSS))}
            for state, loss in both.items()
            if loss is not None
        }
        return {"held-out data": measured}
    loss = told.get("loss")
    return {"loss": loss} if isinstance(loss, dict) else None


def settings(record: Mapping[str, Any]) -> str:
    """Return the whole record in a collapsed section; empty if there is none."""
    if not record:
        return ""
    block = json_block(record)
    if len(block) > _MAX_FOLD:
        return "The settings, seeds and versions are in `training_record.json`."
    return fold("Settings, seeds and versions of the training", block)


def _told(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the training facts, which the trainer stores under ``training``."""
    inner = record.get("training")
    return inner if isinstance(inner, dict) else record


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return code(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return numbers([value]) if isinstance(value, float) else "-"


def _numbers(value: Any) -> dict[str, float]:
    """Return the finite numbers of an object; a lone number gets an empty name."""
    found = value if isinstance(value, dict) else {"": value}
    return {
        str(key): float(number)
        for key, number in found.items()
        if isinstance(number, int | float)
        and not isinstance(number, bool)
        and math.isfinite(number)
    }


def _readable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
