"""A background consumer thread with bounded memory.

Computing a tensor, and hashing and writing the ones before it, then overlap. The
producer waits when what it has handed over, and is not yet consumed, takes more than a
fixed number of bytes; a single item may be larger, and then waits alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["BackgroundConsumer"]

Item = TypeVar("Item")

_MOST_PENDING_BYTES = 16 << 20


class BackgroundConsumer(Generic[Item]):
    """Consumer thread that processes items in order; its failure is raised in the producer.

    Parameters
    ----------
    consume : callable
        Called with one item after the other.

    Examples
    --------
    >>> seen = []
    >>> with BackgroundConsumer(seen.append) as consumer:
    ...     consumer.put("a", nbytes=1)
    ...     consumer.put("b", nbytes=1)
    >>> seen
    ['a', 'b']
    """

    def __init__(self, consume: Callable[[Item], None]) -> None:
        self._consume = consume
        self._items: deque[tuple[Item, int]] = deque()
        self._pending_bytes = 0
        self._ended = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="loraformat-background", daemon=True)

    def put(self, item: Item, *, nbytes: int) -> None:
        """Enqueue an item; block while too much is pending.

        Parameters
        ----------
        item : object
        nbytes : int
            Anonymous memory that it holds; 0 for what is mapped from a file.
        """
        with self._changed:
            while self._failure is None and self._is_full(nbytes):
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
            self._items.append((item, nbytes))
            self._pending_bytes += nbytes
            self._changed.notify_all()

    def _is_full(self, nbytes: int) -> bool:
        return self._pending_bytes > 0 and self._pending_bytes + nbytes > _MOST_PENDING_BYTES

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            item, nbytes = taken
            try:
                self._consume(item)
            except BaseException as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            del item, taken  # or the bytes stay in memory until the next item comes
            with self._changed:
                self._pending_bytes -= nbytes
                self._changed.notify_all()

    def _take(self) -> tuple[Item, int] | None:
        with self._changed:
            while not self._items and not self._ended:
                self._changed.wait()
            return self._items.popleft() if self._items else None

    def __enter__(self) -> BackgroundConsumer[Item]:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._ended = True
            if kind is not None:
                self._items.clear()  # the producer failed: what is pending is not wanted
            self._changed.notify_all()
        self._thread.join()
        if kind is None and self._failure is not None:
            raise self._failure
