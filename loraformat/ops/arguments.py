"""Normalisation of arguments of the public functions, and progress reporting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from loraformat.errors import UsageError
from loraformat.storage.byte_sizes import parse_size

__all__ = ["Progress", "byte_count", "many", "reported"]

#: ``True`` for a bar on stderr, or a function that is called with the amounts done and in total.
Progress: TypeAlias = bool | Callable[[int, int], None]


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


def byte_count(size: int | str, option: str) -> int:
    """Return a number of bytes, from a number or a text like ``2GB``; ``option`` is for the error.

    Raises
    ------
    UsageError
        If it is no size.

    Examples
    --------
    >>> byte_count("2GB", "max-shard-size"), byte_count(512, "max-shard-size")
    (2000000000, 512)
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    try:
        return parse_size(str(size))
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None


@contextmanager
def reported(
    progress: Progress, label: str, unit: str = "B"
) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that is to be called with the amounts done and in total.

    ``label`` stands in front of the bar; ``unit`` is what is counted, ``B`` for bytes.
    """
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=label, unit=unit, unit_scale=unit == "B", total=0, delay=0.5) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
