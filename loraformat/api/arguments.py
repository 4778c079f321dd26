"""How the public functions read arguments that may have several forms."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraformat.errors import UsageError
from loraformat.storage.byte_sizes import parse_size

__all__ = ["byte_count", "many"]


def many(value: Any) -> tuple[Any, ...]:
    """Return one or several values as a tuple; text and paths are one value.

    Examples
    --------
    >>> many("a path"), many(0.5), many(["one", "other"])
    (('a path',), (0.5,), ('one', 'other'))
    """
    if isinstance(value, str | bytes | Path) or not isinstance(value, Iterable):
        return (value,)
    return tuple(value)


def byte_count(size: int | str | None, option: str) -> int | None:
    """Return a number of bytes, from a number or a text such as ``2GB``.

    Parameters
    ----------
    size : int, str or None
    option : str
        For the message.

    Raises
    ------
    UsageError
        If it is no size.

    Examples
    --------
    >>> byte_count("2GB", "max-shard-size"), byte_count(512, "max-shard-size")
    (2000000000, 512)
    """
    if size is None:
        return None
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    try:
        return parse_size(str(size))
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None
