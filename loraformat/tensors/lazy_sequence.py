"""Lazy sequences, created on first access."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TypeVar, overload

__all__ = ["Deferred"]

T = TypeVar("T")


class Deferred(Sequence[T]):
    """A sequence that is created when its items are first accessed.

    Parameters
    ----------
    make : callable
        Returns the items; called once, and not at all if nobody asks.

    Examples
    --------
    >>> found = Deferred(lambda: print("made") or [1, 2])
    >>> len(found), found[0], [*found]
    made
    (2, 1, [1, 2])
    """

    def __init__(self, make: Callable[[], Iterable[T]]) -> None:
        self._make = make

    @cached_property
    def _items(self) -> tuple[T, ...]:
        return tuple(self._make())

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        return self._items[index]
