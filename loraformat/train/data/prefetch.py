"""The next items of an iterator are made on a second thread while the last one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["prefetch"]

Item = TypeVar("Item")


def prefetch(items: Iterator[Item], depth: int = 2) -> Iterator[Item]:
    """Yield the items in order, ``depth`` of them made in advance.

    An error is raised where the item would have come. The thread ends with the iterator.

    Examples
    --------
    >>> list(prefetch(iter("abc")))
    ['a', 'b', 'c']
    """
    end = object()
    pending: deque[Future[Item | object]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="loraformat-data") as pool:
        try:
            pending.extend(pool.submit(next, items, end) for _ in range(depth))
            while (item := pending.popleft().result()) is not end:
                pending.append(pool.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            for future in pending:
                future.cancel()
