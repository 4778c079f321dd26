"""Explanations of exhausted resources: memory, address space, threads."""

from __future__ import annotations

import errno
import sys
from types import ModuleType

__all__ = ["limit_of", "refuse_torch_without_room"]

_THREADS = (
    "can't start new thread",
    "Resource temporarily unavailable",
    "libgomp",
    "pthread_create",
)
#: Address space that torch takes to be loaded (bytes): with less its C++ code aborts the process.
_TORCH = 800 << 20
_MEMORY = ("can't allocate memory", "out of memory", "failed to map segment", "std::bad_alloc")


def limit_of(error: BaseException) -> str | None:
    """Return which resource ran out and advice, if an error or its cause says so.

    Examples
    --------
    >>> limit_of(RuntimeError("can't start new thread"))[:35]
    'cannot start more threads; allow mo'
    >>> limit_of(ValueError("no")) is None
    True
    """
    seen: BaseException | None = error
    while seen is not None:
        if found := _limit_of(seen):
            return found
        seen = seen.__cause__ or seen.__context__
    return None


def _limit_of(error: BaseException) -> str | None:
    said = str(error)
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, (RuntimeError, OSError)) and (
        code == errno.EAGAIN or any(word in said for word in _THREADS)
    ):
        return (
            "cannot start more threads; allow more processes (ulimit -u, or the container's pids "
            "limit), or use fewer: OMP_NUM_THREADS=1"
        )
    if not (
        isinstance(error, MemoryError)
        or code == errno.ENOMEM
        or any(word in said for word in _MEMORY)
    ):
        return None
    if (allowed := _address_space()) is not None:
        return (
            f"not enough address space: {allowed / 1e9:.1f} GB are allowed to this process, and "
            "memory-mapped files count; raise the limit (ulimit -v unlimited) and limit memory "
            "by other means"
        )
    return "not enough memory; close other programs, or use a larger machine"


class _Room:
    """Meta path finder that refuses to import torch."""

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> None:  # fmt: skip
        if name == "torch":
            raise MemoryError


def refuse_torch_without_room() -> None:
    """Raise MemoryError when torch is imported, if it could not be loaded."""
    allowed = _address_space()
    if allowed is not None and allowed < _TORCH:
        sys.meta_path.insert(0, _Room())


def _address_space() -> int | None:
    """Return the limit on the address space, if there is one."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else int(limit)
