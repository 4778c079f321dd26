"""A parallel for loop over element ranges, with Python threads.

ctypes, numpy and torch release the interpreter lock while they compute, so this scales without
OpenMP, whose barrier after every small operation collapses when the machine is shared. torch is
not imported here: only where it is loaded already its threads are kept from starting.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

from loraformat.errors import UsageError

__all__ = ["default_threads", "run"]

Task = Callable[[int, int], None]

_SECONDS_DEAF = 0.2


def default_threads() -> int:
    """Count the CPUs that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Thread(threading.local):
    ours = False
    alone = False


_this = _Thread()
_settling = threading.Lock()


def _torch() -> Any:
    """Return torch if this process has loaded it."""
    loaded = sys.modules.get("torch")
    return loaded if hasattr(loaded, "set_num_threads") else None


def _is_ours() -> None:
    """Mark this thread as one of the pool, in which `run` starts no others."""
    _this.ours = True


def _compute_alone() -> None:
    """Limit torch to one thread in this thread of the pool."""
    torch = _torch()
    if _this.alone or torch is None:
        return
    _this.alone = True
    with _settling:
        count = torch.get_num_threads()
        torch.set_num_threads(1)
        # That is also what threads to come would start with; one that ends at once sets it back.
        restoring = threading.Thread(target=torch.set_num_threads, args=(count,))
        restoring.start()
        restoring.join()


@contextmanager
def _one_of_ours() -> Iterator[None]:
    """Context in which the calling thread acts as one of the pool.

    A thread elsewhere that calls torch for the first time meanwhile computes alone, too.
    """
    torch, before = _torch(), _this.ours
    count = torch.get_num_threads() if torch else 1
    try:
        _this.ours = True
        _use(torch, 1)
        yield
    finally:
        _this.ours = before
        _use(torch, count)


def _use(torch: Any, count: int) -> None:
    """Set torch's number of threads for the calling thread and new ones."""
    if torch and torch.get_num_threads() != count:
        with _settling:
            torch.set_num_threads(count)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="loraformat", initializer=_is_ours)


def _forget_threads() -> None:
    """Reset the pool and lock in a forked child, which lacks the parent's threads."""
    global _settling
    _settling = threading.Lock()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def run(
    task: Task, total: int, grain: int, threads: int | None = None, *, in_torch: bool = False
) -> None:
    """Call ``task(start, stop)`` on pieces that cover ``range(total)``.

    Parameters
    ----------
    task : callable
        Works on elements ``start`` to ``stop``; what it computes must not depend on the other
        pieces. These are the same for every thread count, of `grain` elements but for the last.
    threads : int, optional
        Most threads at work, the calling one included; default: every CPU of the process. No more
        than these, or two, work in any case.
    in_torch : bool
        The task computes with torch: keep it from starting threads in the calling one, too, which
        is one of ours while this lasts.

    Raises
    ------
    Exception
        Whatever `task` raised first, or a signal in the calling thread; remaining pieces are
        dropped, and none is at work any more.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads requested, wanted at least 1")
    starts = iter(range(0, total, grain))  # next() on a range iterator is atomic
    pieces = -(-total // grain)

    def work() -> None:
        try:
            for start in starts:
                task(start, min(start + grain, total))
        except BaseException:
            drop()
            raise

    def work_alone() -> None:
        _compute_alone()
        work()

    def drop() -> None:
        for _ in starts:
            pass

    cpus = default_threads()
    workers = min(cpus if threads is None else threads, pieces)
    if _this.ours:  # one of them that waited for the others could wait for ever
        workers = min(workers, 1)
    # One pool for all counts, no larger than it must be: threads have buffers of their own.
    others = max(cpus - 1, 1)
    helpers = [_pool(others).submit(work_alone) for _ in range(min(workers - 1, others))]
    try:
        with _one_of_ours() if in_torch else nullcontext():
            work()
        # In parts: a signal that comes just before a wait is seen only when it ends.
        while wait(helpers, timeout=_SECONDS_DEAF).not_done:
            pass
    except BaseException:  # of the calling thread: nobody is to write where it may not expect it
        drop()
        wait(helpers)
        raise
    for helper in helpers:
        error = helper.exception()
        if error is not None:
            raise error
