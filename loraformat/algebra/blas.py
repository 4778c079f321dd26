"""Control of the BLAS threads of numpy's matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

from threadpoolctl import ThreadpoolController

__all__ = ["one_blas_thread"]

_lock = Lock()
#: One limit of the process for each caller at work; only the first changes anything.
_limits: list[Any] = []


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit BLAS to the calling thread, in the whole process.

    For work that is spread over threads already: BLAS's own threads would wait for each other
    after every product, and two callers at once for the one pool that they share.

    Examples
    --------
    >>> import numpy
    >>> with one_blas_thread():
    ...     numpy.ones((2, 2)) @ numpy.ones((2, 1))
    array([[2.],
           [2.]])
    """
    with _lock:
        _limits.append(_limits[0] if _limits else _controller().limit(limits=1, user_api="blas"))
    try:
        yield
    finally:
        with _lock:
            limit = _limits.pop()
            if not _limits:  # whoever ends last: another may have begun before and still compute
                limit.restore_original_limits()
