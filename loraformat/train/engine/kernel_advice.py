"""What the kernel and the C library are told about memory: calls that Python does not offer.

ctypes releases the interpreter lock around each, so a thread that brings pages in does not stop
the one that computes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import cache
from typing import Any

__all__ = ["drop_cached", "forget_pages", "pin_malloc_threshold", "read_pages"]

_MADV_WILLNEED = 3
_MADV_DONTNEED = 4
_MADV_POPULATE_READ = 22  # Linux 5.14
_M_MMAP_THRESHOLD = -3
_THRESHOLD = 128 << 10


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


def pin_malloc_threshold() -> bool:
    """Let every block of 128 KiB or more be a mapping of its own, for this process.

    glibc raises that bound by itself as soon as a large block is freed, up to 32 MiB; the large
    tensors of a layer then come from a heap full of holes, which grows with every layer almost as
    if nothing were recomputed.

    Returns
    -------
    bool
        Whether the C library is one that knows this.
    """
    libc = _libc()
    return libc is not None and hasattr(libc, "mallopt") and bool(
        libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
    )  # fmt: skip
