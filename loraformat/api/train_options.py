"""Keyword arguments as the options of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraformat.api.arguments import byte_count, many
from loraformat.errors import UsageError
from loraformat.train.run.options import SETTINGS, Setting, TrainOptions

__all__ = ["options_of", "value_of"]


def options_of(given: Mapping[str, Any]) -> TrainOptions:
    """Return the options of those members whose names are options; None is the default.

    Parameters
    ----------
    given : mapping
        By the names of `TrainOptions`; other names are passed over.

    Raises
    ------
    UsageError
    """
    return TrainOptions(
        **{
            setting.name: value_of(setting, given[setting.name])
            for setting in SETTINGS
            if given.get(setting.name) is not None
        }
    )


def value_of(setting: Setting, value: Any) -> Any:
    """Return a value in the form that `TrainOptions` holds.

    Parameters
    ----------
    setting : Setting
    value : object
        A path, one text or several, a mapping of globs to ranks, a size such as ``4GB``.

    Raises
    ------
    UsageError
        If it is none of the words that the option knows.
    """
    if setting.kind == "texts":
        return tuple(str(part) for part in many(value))
    if setting.kind == "names":
        return tuple(s for one in many(value) for part in one.split(",") if (s := part.strip()))
    if setting.kind == "ranks":
        return tuple(value.items() if isinstance(value, Mapping) else value)
    if setting.kind == "size":
        return byte_count(value, setting.flag)
    if setting.kind != "text":
        return value
    if setting.choices and value not in setting.choices:
        raise UsageError(f"{setting.flag} is {value!r}, wanted one of {', '.join(setting.choices)}")
    return str(value)
