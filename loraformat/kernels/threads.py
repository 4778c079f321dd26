"""Coarse-grained threads: a range cut into pieces that Python threads take one by one.

ctypes and torch release the interpreter lock while they compute, so this scales without OpenMP,
whose barrier after every small operation collapses when the machine is shared.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from loraformat.errors import UsageError

__all__ = ["default_threads", "run"]

Task = Callable[[int, int], None]


def default_threads() -> int:
    """Count the CPUs that this process may use.

    Returns
    -------
    int
        At least 1.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="loraformat")


if hasattr(os, "register_at_fork"):
    # A forked child inherits the pool object but none of its threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def run(task: Task, total: int, grain: int, threads: int | None = None) -> None:
    """Call ``task(start, stop)`` on pieces that cover ``range(total)``.

    Parameters
    ----------
    task : callable
        Works on elements ``start`` to ``stop``; what it computes must not depend on the other
        pieces. The pieces are the same for every thread count.
    total : int
        Length of the range.
    grain : int
        Length of a piece; the last one may be shorter.
    threads : int, optional
        Most threads at work, the calling one included; default: every CPU of the process.

    Raises
    ------
    UsageError
        `threads` is less than 1.
    Exception
        Whatever `task` raised first; remaining pieces are dropped.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot work, wanted at least 1")
    starts = iter(range(0, total, grain))  # next() on a range iterator is atomic
    pieces = -(-total // grain)

    def work() -> None:
        for start in starts:
            task(start, min(start + grain, total))

    workers = min(default_threads() if threads is None else threads, pieces)
    helpers = [_pool(workers - 1).submit(work) for _ in range(workers - 1)]
    try:
        work()
    except BaseException:
        for _ in starts:  # leave nothing for the helpers
            pass
        raise
    finally:
        errors = [helper.exception() for helper in helpers]
    for error in errors:
        if error is not None:
            raise error
