"""Atomic exchange of two directories."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from pathlib import Path

__all__ = ["swap_directories", "undo_interrupted_swap"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
#: The kernel or the file system does not know how.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def swap_directories(one: Path, other: Path) -> None:
    """Swap two directories on one file system; after an `OSError` both are where they were.

    On Linux this is one system call, so that nobody ever sees neither. Elsewhere, and on file
    systems without it, it is three renames, with a moment between them in which ``other`` is
    missing.
    """
    try:
        _exchange_at_once(one, other)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        _exchange_by_renames(one, other)


def undo_interrupted_swap(one: Path, other: Path) -> None:
    """Restore ``other`` if a process was killed during a swap; no other process may be writing."""
    aside = _aside(one)
    if not os.path.lexists(other):
        with contextlib.suppress(FileNotFoundError):
            os.rename(aside, other)
    elif aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside)


def _exchange_at_once(one: Path, other: Path) -> None:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


def _exchange_by_renames(one: Path, other: Path) -> None:
    aside = _aside(one)
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except BaseException:
        os.rename(aside, other)
        raise
    os.rename(aside, one)


def _aside(one: Path) -> Path:
    return one.with_name(one.name + ".old")
