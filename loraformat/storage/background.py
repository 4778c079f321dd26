"""A background consumer thread with bounded memory.

Computing a tensor, and hashing and writing the ones before it, then overlap. The
producer waits when what it has handed over, and is not yet consumed, takes more than a
fixed number of bytes; a single item may be larger, and then waits alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["BackgroundConsumer"]

Item = TypeVar("Item")

_MOST_PENDING_BYTES = 16 << 20


class BackgroundConsumer(Generic[Item]):
    """Consumer thread that processes items in order; its failure is raised in the producer.

    Parameters
    ----------
    consume : callable
        Called with one item after the other, with none after one that it failed for.

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
        self._failed = False
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._pending_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loraformat-background")

    def put(self, item: Item, *, nbytes: int) -> None:
        """Enqueue an item; block while too much is pending.

        `nbytes` is the anonymous memory that it holds: 0 for what is mapped from a file.
        """
        while self._pending and (self._pending[0][0].done() or self._is_full(nbytes)):
            consumed, size = self._pending.popleft()
            consumed.result()
            self._pending_bytes -= size
        self._pending.append((self._thread.submit(self._run, item), nbytes))
        self._pending_bytes += nbytes

    def _is_full(self, nbytes: int) -> bool:
        return self._pending_bytes > 0 and self._pending_bytes + nbytes > _MOST_PENDING_BYTES

    def _run(self, item: Item) -> None:
        if self._failed:
            return
        try:
            self._consume(item)
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> BackgroundConsumer[Item]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._thread.shutdown(cancel_futures=kind is not None)
        for consumed, _ in self._pending if kind is None else ():
            consumed.result()
