"""Advice to the kernel and the C library about memory: calls that Python does not offer.

ctypes releases the interpreter lock around each, so a thread that reads pages does not stop the one
that computes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import cache
from typing import Any

__all__ = ["drop_cached", "forget_pages", "keep_freed_memory", "read_pages"]

_MADV_WILLNEED = 3
_MADV_DONTNEED = 4
_MADV_POPULATE_READ = 22  # Linux 5.14
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
#: Largest block that comes from the heap where memory is plentiful (glibc allows no more), and
#: where it is scarce (bytes).
_LARGEST_IN_HEAP = 32 << 20, 1 << 20
_NEVER = 2**31 - 1


@cache
def _libc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library


def _pages(address: int, nbytes: int) -> tuple[int, int]:
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    return first, -(-(address + nbytes - first) // mmap.PAGESIZE) * mmap.PAGESIZE


def read_pages(address: int, nbytes: int) -> None:
    """Bring mapped bytes into memory; where the kernel is older, ask it to do so in time.

    Parameters
    ----------
    address, nbytes : int
        Of a file mapping.
    """
    if (libc := _libc()) is None or not nbytes:
        return
    first, length = _pages(address, nbytes)
    if libc.madvise(first, length, _MADV_POPULATE_READ):
        libc.madvise(first, length, _MADV_WILLNEED)


def forget_pages(address: int, nbytes: int) -> None:
    """Give the pages of a read-only, shared file mapping back; the next look reads them anew.

    Never of other memory, which would become zero.
    """
    if (libc := _libc()) is not None and nbytes:
        libc.madvise(*_pages(address, nbytes), _MADV_DONTNEED)


def drop_cached(descriptor: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to drop a range of a file from its page cache."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


def keep_freed_memory(plentiful: bool) -> bool:
    """Let freed memory stay with the process, for its next tensors.

    By default glibc gives a block of more than 128 KiB back when it is freed, and the end of its
    heap, too; the kernel must then find and clear fresh pages for every tensor of every layer,
    which took a quarter of a step's CPU time. Kept in the heap, large blocks leave holes between
    them, a sixth to a third of what a step holds.

    Parameters
    ----------
    plentiful : bool
        Keep blocks of up to 32 MiB; else those of up to 1 MiB, and a step takes a tenth longer.

    Returns
    -------
    bool
        Whether the C library is one that knows this.
    """
    libc = _libc()
    if libc is None or not hasattr(libc, "mallopt"):
        return False
    largest = _LARGEST_IN_HEAP[0 if plentiful else 1]
    settings = (_M_MMAP_THRESHOLD, largest), (_M_TRIM_THRESHOLD, _NEVER)
    return all([bool(libc.mallopt(*setting)) for setting in settings])
